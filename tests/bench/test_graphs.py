"""`bench linear` on a GPU that a CPU plays: CUDA graphs beside eager calls, and the rates of single products."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

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


class Streams:
    """torch.cuda, as far as a capture needs it: which stream is current, and graphs that record nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: object = "default"
        self.waits: list[tuple[object, object]] = []
        outer = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                outer.waits.append((self, other))

        @contextmanager
        def stream(to: object) -> Iterator[None]:
            before, outer.current = outer.current, to
            try:
                yield
            finally:
                outer.current = before

        class Graph:
            def replay(self) -> None:
                pass

        class graph:  # as torch's: its own stream stays current when the end of a capture raises
            def __init__(self, graph: Graph, stream: object) -> None:
                assert stream != "default"
                self.stream = stream

            def __enter__(self) -> None:
                self.before, outer.current = outer.current, "captured"

            def __exit__(self, kind: object, *_: object) -> None:
                if kind is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                outer.current = self.before

        default = Stream()
        self.current = default
        fakes = {"Stream": Stream, "stream": stream, "CUDAGraph": Graph, "graph": graph}
        fakes |= {"device": nullcontext, "synchronize": lambda: None, "current_stream": lambda: self.current}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_graph_keeps_what_it_reads_and_did_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch)
    saved = torch.ones(1)
    gone = weakref.ref(saved)
    replay = timing.captured(partial(partial, torch.neg, saved), CPU)
    del saved
    assert gone() is not None
    assert replay().item() == -1
    del replay
    assert gone() is None


def test_what_is_captured_ran_on_the_stream_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    default, seen = streams.current, []
    with timing.own_stream(torch.device("cuda")):
        own = streams.current
        timing.captured(lambda: lambda: seen.append(streams.current), CPU)

        def fails() -> None:
            if streams.current == "captured":
                raise ValueError("the first error")

        with pytest.raises(RuntimeError, match="previous error"):
            timing.captured(lambda: fails, CPU)
        assert streams.current is own  # or all that follows runs on the capture's stream
    assert own is not default
    assert seen == [own, own, "captured"]
    assert streams.waits == [(own, default), (default, own)]
    assert streams.current is default


def test_of_a_failed_capture_the_first_error_is_told() -> None:
    [case] = micro.plan(TINY, CPU)
    found = micro.candidates(micro.operands_of(case, TINY, CPU), "backward", None, ("dense",))

    def fails(prepare: object, device: object) -> None:
        try:
            raise ValueError("the first error")
        except ValueError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, "captured", fails)
        _, reasons = micro._captured(found[:1], CPU, lambda message: None)
    assert list(reasons.values()) == ["ValueError: the first error"]


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
