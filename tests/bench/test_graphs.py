"""`bench linear` on a GPU that a CPU plays: CUDA graphs beside eager calls, and the rates of single products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_bench import CEILINGS, CPU, TINY, quiet, written

from loge_kernels.bench.linear import rates
from loge_kernels.bench.linear import run as micro
from loge_kernels.bench.measure import output, timing


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU that is timed as a GPU: every call but unfused ones can be captured, and replays take 1 s, others 2 s."""
    captured: list[str] = []

    def capture(prepare, device):  # type: ignore[no-untyped-def]
        if prepare.func.__name__ == "_unfused":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        captured.append(prepare.func.__name__)
        call = prepare()
        replay = lambda: call()  # noqa: E731
        replays.add(replay)
        return replay

    class Clock:
        def record(self, call):  # type: ignore[no-untyped-def]
            return (1.0 if call in replays else 2.0), call()

        def settle(self, tickets):  # type: ignore[no-untyped-def]
            return list(tickets)

    replays: set[object] = set()
    monkeypatch.setattr(micro, "captured", capture)
    monkeypatch.setattr(micro, "has_graphs", lambda device: True)
    monkeypatch.setattr(micro, "clock_for", lambda device: Clock())
    return captured


def test_graphs_and_eager_calls_are_both_timed(graphs: list[str]) -> None:
    [case] = micro.plan(TINY, CPU)
    rows = micro.measure(case, replace(TINY, budget=1e-3), micro.operands_of(case, TINY, CPU), CEILINGS)
    assert {row.status for row in rows} == {"ok"}
    assert set(graphs) == {"_dense", "_peft", "_op"}
    for row in rows:
        assert row.eager_seconds == 2.0
        if row.kind == "unfused":
            assert (row.mode, row.seconds, row.graph_seconds) == ("eager", 2.0, None)
            assert row.graph_note == "RuntimeError: operation not permitted when stream is capturing"
            assert row.speedup["dense"] == 1.0  # two eager calls, not a replay and one
        else:
            assert (row.mode, row.seconds, row.graph_seconds) == ("graph", 1.0, 1.0)
            assert row.speedup.get("unfused", 1.0) == 1.0
    console = quiet()
    output.print_case(console, case.title, "backward", rows)
    assert "unfused R=16 in no CUDA graph: RuntimeError: operation not permitted" in written(console)
    [dense] = [line.split() for line in written(console).splitlines() if line.lstrip().startswith("dense ")]
    assert dense[1] == "graph"


def test_a_wrong_replay_gets_no_figure(graphs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    capture = micro.captured

    def stale(prepare, device):  # type: ignore[no-untyped-def]
        replay = capture(prepare, device)
        results = {name: torch.zeros_like(result) for name, result in prepare()().items()}
        return lambda: (replay(), results)[1]

    monkeypatch.setattr(micro, "captured", stale)
    [case] = micro.plan(TINY, CPU)
    rows = micro.measure(case, replace(TINY, budget=1e-3), micro.operands_of(case, TINY, CPU), CEILINGS)
    assert {row.status for row in rows if row.kind != "unfused"} == {"wrong result"}


def test_without_graphs_a_row_is_eager() -> None:
    [case] = micro.plan(TINY, CPU)
    for row in micro.measure(case, TINY, micro.operands_of(case, TINY, CPU), CEILINGS):
        assert (row.mode, row.graph_seconds, row.graph_note) == ("eager", None, "")
        assert row.eager_seconds == row.seconds


def test_rates_of_every_product() -> None:
    [case] = micro.plan(TINY, CPU)
    operands = micro.operands_of(case, TINY, CPU)
    rows = rates.measure(case, operands, timing.CpuClock(), timing.TimingOptions(budget_seconds=1e-3))
    assert [row["product"] for row in rows if row["R"] in (None, 32)] == [
        "dX = dY W",
        "dB = dY' xa",
        "T = dY [left | s B]",
        "dX = T [right ; A]",
        "dA = T_P' x",
    ]
    for row, (sizes, call) in zip(rows, rates.products(operands).values(), strict=True):
        I, J, L = sizes
        assert call().shape == (I, L)
        assert row["tflops"] == pytest.approx(2 * I * J * L / row["seconds"] / 1e12)
        assert row["gbytes_per_second"] == pytest.approx(4 * (I * J + J * L + I * L) / row["seconds"] / 1e9)
