"""`bench --tune`, end to end in Triton's interpreter.

That two processes can write the table at once is tested in `test_triton_dispatch.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from interpreter import INTERPRETED, assert_passes_interpreted, needs_triton
from rich.console import Console

from loge_kernels import triton_kernels as tk
from loge_kernels.bench.linear import run as micro
from loge_kernels.bench.linear import tune
from loge_kernels.triton_kernels import availability, dispatch, tuning
from loge_kernels.triton_kernels.configs import Config, OneLaunchConfig, TwoLaunchConfig
from loge_kernels.triton_kernels.devices import DEFAULT

ONE = OneLaunchConfig(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=2)
OTHER = OneLaunchConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=2)
TWO = TwoLaunchConfig(
    block_m=32, block_n=64, project_r=16, block_k=64, slab_stages=2, tile_k=64, tile_r=16, num_warps=4, num_stages=2
)
SLUG = "triton_interpreter"
SPEC = replace(DEFAULT, name=tune.INTERPRETER)
OPTIONS = micro.MicroOptions(
    shapes=("24,64,64",), ranks=(16,), lora_ranks=(4,), dtypes=("float16",), device="cpu", budget=0.05
)


def space(kernel: str, bits: int, rank: int, adapter: int) -> Iterator[Config]:
    yield from (ONE, OTHER) if kernel == "one_launch" else (TWO,)


class Clock:
    """A clock on which each configuration takes the seconds it is given, the others one second."""

    def __init__(self, seconds: dict[Config, float]) -> None:
        self.seconds = seconds

    def record(self, call: Any) -> tuple[float, None]:
        return self.seconds.get(call.keywords["config"], 1.0), None

    def settle(self, tickets: Sequence[float]) -> list[float]:
        return list(tickets)


def run(options: micro.MicroOptions = OPTIONS, **arguments: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=200)
    report = tune.run(options, console, **{"candidates": space} | arguments)
    json.dumps(report)
    return report, console.file.getvalue()  # type: ignore[attr-defined]


def class_of(report: dict[str, Any], kernel: str) -> dict[str, Any]:
    [found] = [row for row in report["classes"] if row["kernel"] == kernel]
    return found


def dropped(report: dict[str, Any], config: Config) -> str | None:
    rows = [one for row in report["classes"] for one in row["candidates"]]
    [found] = [one["dropped"] for one in rows if one["config"] == tune.asdict(config)]
    return found


def written() -> dict[str, Config]:
    return {entry.kernel: entry.config for entry in tuning.read_table(SLUG)}


def break_backward(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Have `change(config, R, outputs)` see, and alter, what `backward` returns."""
    real = tk.backward

    def broken(*inputs: Any, config: Config, **options: Any) -> Any:
        outputs = real(*inputs, config=config, **options)
        change(config, inputs[3].shape[1], outputs)
        return outputs

    monkeypatch.setattr(tk, "backward", broken)


@needs_triton
@pytest.mark.slow
def test_in_a_process_of_its_own() -> None:
    assert_passes_interpreted(__file__)


@needs_triton
class TestTuning:
    __test__ = INTERPRETED

    def test_the_fastest_is_written_and_read_back(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from loge_kernels.triton_kernels import launch

        def chosen() -> Config | None:
            with monkeypatch.context() as context:
                context.delenv("TRITON_INTERPRET")  # where the interpreter's own table serves everything
                return dispatch.form_configs(torch.float16, 16, 4, True, SPEC)[0]

        shipped = chosen()
        assert shipped not in (ONE, OTHER)
        monkeypatch.setattr(tune, "clock_for", lambda device: Clock({OTHER: 0.25, ONE: 0.5}))
        report, text = run(replace(OPTIONS, shapes=("24,64,64", "20,64,72"), json=tmp_path / "tune.json"))

        row = class_of(report, "one_launch")
        assert (row["bits"], row["rank"], row["adapter"], row["aligned"]) == (16, 64, 16, True)
        assert row["best"]["config"] == tune.asdict(OTHER)
        assert (row["shipped"]["seconds"], row["best"]["seconds"]) == pytest.approx((1.0, 0.25))
        assert row["ratio"] == pytest.approx(4.0)
        assert [len(one["times"]) for one in row["candidates"]] == [2, 2, 2]
        assert "4.00x" in text
        assert report["passed"]
        assert report["written"] in text
        assert json.loads((tmp_path / "tune.json").read_text()) == json.loads(json.dumps(report))
        assert tuning.table_path(SLUG) == Path(report["written"])
        assert report["environment"]["versions"]["triton"] in Path(report["written"]).read_text()
        assert chosen() == OTHER
        assert not launch._plans

    def test_a_tie_keeps_the_shipped_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tune, "_fails_at_most", lambda *arguments: "")
        entries = tune.classes_of([tune.Problem("", 8, 64, 64, 16, 4, "float16")], SPEC)
        [entry] = [one for one in entries if one.kernel == "one_launch"]
        measured = tune._space(entry, space)
        for one in measured:
            one.times = [{"median": 1.0}]
        winner = tune._winner(entry, measured, "float16", torch.device("cpu"))
        assert winner.config == entry.config

    def test_the_mean_is_geometric(self) -> None:
        assert tune.Measured(ONE, [{"median": 1.0}, {"median": 4.0}]).seconds == pytest.approx(2.0)

    def test_what_fails_or_is_wrong_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def change(config: Config, R: int, outputs: Any) -> None:
            if config == ONE:
                outputs[0][1, 2] += 1.0
            elif config == TWO:
                raise RuntimeError("out of resource: shared memory")

        break_backward(monkeypatch, change)
        report, text = run()
        assert str(dropped(report, ONE)).startswith("wrong result: dx")
        assert dropped(report, TWO) == "RuntimeError: out of resource: shared memory"
        assert dropped(report, OTHER) is None
        assert f"{tune.config_text(ONE)} dropped: wrong result" in text
        assert ONE not in written().values()
        assert TWO not in written().values()
        assert all(row["best"] for row in report["classes"])

    def test_the_winner_holds_the_largest_ranks_of_its_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def change(config: Config, R: int, outputs: Any) -> None:
            if config == ONE and R == 64:
                outputs[3].zero_()

        break_backward(monkeypatch, change)
        monkeypatch.setattr(tune, "clock_for", lambda device: Clock({ONE: 0.25, OTHER: 0.5, TWO: 0.5}))
        report, _ = run()
        assert str(dropped(report, ONE)).startswith("wrong result: dbias at R=64, P=16")
        assert written() == {"one_launch": OTHER, "two_launch": TWO}
        assert report["passed"]

    def test_a_class_without_a_winner_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def change(config: Config, R: int, outputs: Any) -> None:
            if isinstance(config, OneLaunchConfig):
                outputs[1].fill_(float("nan"))

        break_backward(monkeypatch, change)
        monkeypatch.setattr(tune, "clock_for", lambda device: Clock({TWO: 0.5}))
        report, text = run()
        assert not report["passed"]
        assert class_of(report, "one_launch")["best"] is None
        assert "none" in text
        assert set(written()) == {"two_launch"}

    def test_unaligned_rows_are_a_class_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tune, "clock_for", lambda device: Clock({ONE: 0.5, TWO: 0.5}))
        run(replace(OPTIONS, shapes=("20,33,40",)))
        assert {(entry.config, entry.aligned) for entry in tuning.read_table(SLUG)} == {(ONE, False), (TWO, False)}

    def test_a_device_error_that_stays_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        error = RuntimeError("an illegal memory access was encountered")
        monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=error))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            tune._tried(torch.device("cuda"), lambda: str(1 // 0))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtypes": ("bfloat16",)}, "does not multiply bfloat16"),
            ({"dtypes": ("float64",)}, "dtype torch.float64 is not supported"),
            ({"lora_ranks": (65,)}, "P=65 is larger than 64"),
            ({"ranks": (65,)}, "ranks=65 does not fit"),
            ({"ranks": ()}, "ranks is empty"),
            ({"budget": 0.0}, "budget=0.0 must be positive"),
            ({"shapes": ("nonsense",)}, "'nonsense' is not known"),
            ({"json": Path("/dev/null/tune.json")}, "cannot write"),
        ],
    )
    def test_options_that_cannot_be(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            run(replace(OPTIONS, **options))
        assert written() == {}

    def test_no_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGE_CACHE", "off")
        with pytest.raises(ValueError, match="LOGE_CACHE=off"):
            run()


@pytest.mark.parametrize("missing", [None, "Triton is not installed"])
def test_where_nothing_runs(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(availability, "triton_missing", lambda: missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"nothing can be tuned here: {missing or 'no CUDA GPU'}"):
        tune.run(OPTIONS, Console(file=io.StringIO()))
