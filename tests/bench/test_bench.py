"""The benchmarks: what they count, the order in which they time, and that a wrong result never gets a figure."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from loge_kernels.backend import reference
from loge_kernels.backend.choice import _REGISTRY
from loge_kernels.bench.linear import run as micro
from loge_kernels.bench.linear.baselines import candidates
from loge_kernels.bench.linear.gate import Gate
from loge_kernels.bench.linear.operands import make_operands
from loge_kernels.bench.measure import output, roofline, shapes, timing
from loge_kernels.bench.measure.memory import with_peak_memory
from loge_kernels.bench.measure.roofline import Ceilings, backward_work, forward_work, speedup_ceiling

CPU = torch.device("cpu")
CEILINGS = Ceilings("float32", copy=1e10, matmul=1e11, plain_nn=1e11, plain_nt=1e11)
TINY = micro.MicroOptions(
    shapes=("48,80,64",), ranks=(16, 32), lora_ranks=(8,), dtypes=("float32",), device="cpu", budget=0.05
)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def written(console: Console) -> str:
    return console.file.getvalue()


# Shapes


def test_shapes_of_a_model_by_name() -> None:
    found = {shape.name.split()[-1]: (shape.N, shape.K) for shape in shapes.parse_shapes(["llama-3-8b"])}
    assert found == {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)}
    assert [(s.N, s.K) for s in shapes.parse_shapes(["LLaMA-2-7B"])] == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert [(s.N, s.K) for s in shapes.parse_shapes(["qwen2.5"])][1:] == [(512, 3584), (18944, 3584), (3584, 18944)]


def test_shapes_by_projection_and_by_numbers() -> None:
    assert [s.name for s in shapes.parse_shapes(["smollm2:v_proj,up,gate"])] == [
        "SmolLM2-135M k,v",
        "SmolLM2-135M gate,up",
    ]
    [shape] = shapes.parse_shapes([" 7, 33,5"])
    assert (shape.rows, shape.N, shape.K) == (7, 33, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt", "LLaMA-3-8B"),
        ("", "LLaMA-3-8B"),
        ("llama", "several models"),
        ("smollm2:c_attn", "gate, up, down"),
        ("1,2", "M,N,K"),
        ("0,4,4", "at least 1"),
    ],
)
def test_shape_errors_say_what_would_work(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.parse_shapes([text])


# Timing


class FakeClock:
    """Each call takes the seconds it returns."""

    def record(self, call):  # type: ignore[no-untyped-def]
        result = call()
        return result, result

    def settle(self, tickets):  # type: ignore[no-untyped-def]
        return list(tickets)


def test_medians_quantiles_and_ratios() -> None:
    """Ratios are taken within rounds."""
    slow, fast = timing.Timing([4.0, 90.0, 6.0, 5.0, 1.0]), timing.Timing([2.0, 45.0, 3.0, 2.5, 0.5])
    assert slow.median == 5.0
    assert (slow.quantile(0.0), slow.quantile(0.5), slow.quantile(1.0)) == (1.0, 5.0, 90.0)
    assert slow.quantile(0.125) == 2.5
    assert fast.faster_than(slow) == pytest.approx(2.0)
    a, b = timing.Timing([1.0, 10.0, 1.0]), timing.Timing([2.0, 20.0, 30.0])
    assert a.faster_than(b) == 2.0  # the ratio of medians would be 20
    assert (b.quantile(0.5), b.quantile(0.25)) == (20.0, 11.0)


def test_calls_are_interleaved_and_the_first_round_is_not_measured() -> None:
    order: list[str] = []
    inspected: list[str] = []

    def call(name: str):  # type: ignore[no-untyped-def]
        return lambda: order.append(name) or float(len(order))

    options = timing.TimingOptions(budget_seconds=1e-9, slow_seconds=100, warmup_rounds=2, min_rounds=3, max_rounds=9)
    calls = {name: call(name) for name in "abc"}
    timings = timing.interleave(calls, FakeClock(), options, inspect=lambda name, result: inspected.append(name))
    assert "".join(order) == "abc" * 5
    assert inspected == ["a", "b", "c"]
    assert timings["b"].seconds == [8.0, 11.0, 14.0]


def test_budget_stops_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def one_second() -> float:
        nonlocal now
        now += 1.0
        return 1.0

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    for budget, runs in ((5.5, 5), (0.5, 3), (100.0, 20)):
        options = timing.TimingOptions(budget_seconds=budget, slow_seconds=9, max_rounds=20)
        assert timing.interleave({"a": one_second}, FakeClock(), options)["a"].runs == runs


def test_slow_and_failing_calls() -> None:
    runs: list[str] = []

    def fail() -> None:
        raise RuntimeError("no such instruction\nand a trace")

    calls = {"slow": lambda: runs.append("slow") or 8.0, "fast": lambda: runs.append("fast") or 2.0, "bad": fail}
    options = timing.TimingOptions(budget_seconds=1e-9, slow_seconds=5)
    timings = timing.interleave(calls, FakeClock(), options)
    assert runs.count("slow") == 1
    assert timings["slow"].cold
    assert timings["slow"].seconds == [8.0]
    assert runs.count("fast") == 4
    assert timings["bad"].failure == "RuntimeError: no such instruction"
    assert timings["fast"].faster_than(timings["slow"]) == 4.0


def test_peak_memory_counts_what_is_live_together() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second, third = torch.empty(3 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
        del third
        return second

    result, peak = with_peak_memory(call, CPU)
    assert result.numel() == 3 << 20
    assert peak == 4 << 20


# Counted work


def brute_force(products: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Flops of products counted one multiply-add at a time."""
    count = 0
    for a, b in products:
        for row in a.tolist():
            for column in b.t().tolist():
                count += sum(2 for _ in zip(row, column, strict=True))
    return count


def test_backward_flops_against_counting_every_multiplication() -> None:
    M, N, K, R, P = 5, 4, 6, 3, 2
    dy, x, xa = torch.ones(M, N), torch.ones(M, K), torch.ones(M, P)
    left, right, A, B = torch.ones(N, R), torch.ones(R, K), torch.ones(P, K), torch.ones(N, P)
    adapter = [(dy, B), (dy @ B, A), ((dy @ B).t(), x), (dy.t(), xa)]
    low_rank = brute_force([(dy, left), (dy @ left, right), *adapter])
    for sequence in ("separate", "concatenated", "fused"):
        assert backward_work("low-rank", M, N, K, R, P, 4, sequence).flops == low_rank
    assert backward_work("exact", M, N, K, 0, P, 4).flops == brute_force([(dy, torch.ones(N, K)), *adapter])
    assert low_rank == 2 * M * R * (N + K) + 4 * M * P * (N + K)


class Products(TorchDispatchMode):
    """Counts the flops and bytes of the matrix products that torch executes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            accumulated = args[0].numel() if func.overloadpacket is not torch.ops.aten.mm else 0
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.bytes += (a.numel() + b.numel() + result.numel() + accumulated) * a.element_size()
        return result


@pytest.mark.parametrize("direction", ["backward", "forward+backward"])
def test_counted_work_is_what_torch_executes(direction: str) -> None:
    operands = make_operands(24, 40, 56, [16], 8, torch.float32, CPU)
    for candidate in candidates(operands, direction):
        call = candidate.prepare()
        with Products() as executed:
            call()
        assert executed.flops == candidate.work.flops, candidate.name
        if candidate.kind in ("dense", "unfused"):
            assert executed.bytes == candidate.work.moved_bytes, candidate.name


def test_counted_bytes() -> None:
    M, N, K, R, P = 5, 4, 6, 3, 2
    # dY, left, right, x, xa, A, B read; dX, dA, dB written.
    floor = M * N + N * R + R * K + M * K + M * P + P * K + N * P + M * K + P * K + N * P
    separate = backward_work("low-rank", M, N, K, R, P, 2, "separate")
    assert separate.floor_bytes == 2 * floor
    assert backward_work("low-rank", M, N, K, R, P, 2, "fused").moved_bytes == 2 * floor
    products = [(M, N, R), (M, R, K), (M, N, P), (M, P, K), (P, M, K), (N, M, P)]
    moved = sum(i * j + j * k + i * k for i, j, k in products) + M * K  # the adapter's product is added to dX
    assert separate.moved_bytes == 2 * moved
    # Concatenated reads dY once less, and dX is written once.
    fewer = backward_work("low-rank", M, N, K, R, P, 2, "concatenated").moved_bytes
    assert separate.moved_bytes - fewer == 2 * (M * N + 2 * M * K)
    assert forward_work("product", M, N, K, P, 2).floor_bytes == 2 * (M * K + N * K + M * N)


def test_roofline_is_the_larger_of_its_two_times() -> None:
    work = roofline.Work(flops=10**12, moved_bytes=10**12, floor_bytes=10**9)
    assert CEILINGS.seconds(work) == 10.0
    assert replace(CEILINGS, copy=1e7).seconds(work) == 100.0


def test_speedup_ceiling() -> None:
    assert speedup_ceiling("forward+backward", 4096, 4096, 256) == pytest.approx(2 / 1.125)
    assert speedup_ceiling("backward", 4096, 4096, 256) == pytest.approx(8.0)


def test_ceilings_are_measured() -> None:
    measured = roofline.measure_ceilings(CPU, torch.bfloat16)
    assert measured.copy > 1e8
    assert measured.matmul >= measured.plain_nn > 0


# The gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_every_candidate_passes_the_gate(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    if dtype == torch.float64 and adapter_dtype is not None:
        pytest.skip("a float64 layer has a float64 adapter")
    operands = make_operands(33, 48, 40, [16, 24], 5, dtype, CPU, adapter_dtype)
    gate = Gate(operands)
    for candidate in candidates(operands, "forward+backward"):
        verdicts = gate.check(candidate.prepare()(), candidate.rank, candidate.adapter)
        assert list(verdicts) == ["y", "dx", "dA", "dB"][: 4 if candidate.adapter else 2]
        assert all(v.passed for v in verdicts.values()), (candidate.name, verdicts)


def test_gate_sees_one_wrong_element_one_nan_and_a_wrong_shape() -> None:
    operands = make_operands(64, 96, 80, [16], 8, torch.bfloat16, CPU)
    gate = Gate(operands)
    [good] = [c for c in candidates(operands, "backward") if c.kind == "loge"]
    for name, value in good.prepare()().items():
        assert gate.check({name: value}, 16)[name].passed
        off, poisoned = value.clone(), value.clone()
        off[-1, -1] += 0.05 * value.abs().max()
        poisoned[1, 1] = float("nan")
        for wrong in (off, poisoned, value[:-1]):
            assert not gate.check({name: wrong}, 16)[name].passed, name


def test_gate_samples_rows_of_a_large_dx(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(64, 96, 80, [16], 8, torch.float32, CPU)
    monkeypatch.setattr("loge_kernels.bench.linear.gate._FLOPS", {"cpu": 2 * 7 * 96 * 80})
    gate = Gate(operands)
    [exact] = [c for c in candidates(operands, "backward") if c.kind == "exact"]
    results = exact.prepare()()
    assert all(v.passed for v in gate.check(results, None).values())
    _, _, rows = gate._expected["dx", None, None]
    assert (rows[0], rows[-1], len(rows)) == (0, 63, 7)


# The microbenchmark


def test_a_broken_backend_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem):  # type: ignore[no-untyped-def]
        gradients = reference.backward(problem)
        if problem.left is not None:
            gradients.dx = gradients.dx * 1.01
        return gradients

    monkeypatch.setitem(_REGISTRY, "reference", replace(_REGISTRY["reference"], backward=broken))
    console = quiet()
    report = micro.run(TINY, console)
    assert report["passed"] is False
    text = written(console)
    for row in report["rows"]:
        if row["kind"] == "loge":
            assert row["status"] == "wrong result"
            assert row["speedup"] == {}
            assert row["tflops"] is None
            assert "dx: " in row["note"]
            assert "times the allowed error" in row["note"]
            [line] = [line for line in text.splitlines() if line.lstrip().startswith(row["candidate"] + " ")][:1]
            assert "wrong result" in " ".join(line.split())
        else:
            assert row["status"] == "ok"


def test_run_prints_and_writes_everything(tmp_path) -> None:  # type: ignore[no-untyped-def]
    files = {kind: tmp_path / "new" / f"result.{kind}" for kind in ("json", "csv", "png")}
    console = quiet()
    report = micro.run(replace(TINY, **files), console)
    assert report["passed"] is True
    stored = json.loads(files["json"].read_text())
    assert stored["rows"] == report["rows"]
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "load_average"} <= set(stored["environment"])
    assert stored["options"]["seed"] == 0
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["candidate"] for line in lines] == [row["candidate"] for row in report["rows"]]
    assert float(lines[-1]["speedup_peft"]) == report["rows"][-1]["speedup"]["peft"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["result.csv", "result.json", "result.png"]
    without_rank = dict(report["rows"][-1], candidate="exact triton", rank=None)  # as on a GPU
    output.plot(report | {"rows": [*report["rows"], without_rank]}, tmp_path / "both.png")
    assert (tmp_path / "both.png").exists()
    text = written(console)
    for heading in ("x dense", "x peft", "x exact", "x unfused", "% roof", "TFLOP/s", "GB/s"):
        assert heading in text
    last = report["rows"][-1]
    assert last["rank"] == 32
    assert last["speedup"].keys() == {"dense", "peft", "exact", "unfused"}
    assert last["factor_bytes"] == 32 * (80 + 64) * 4
    assert last["peak_bytes"] > 0
    assert last["ceiling"] == pytest.approx(2 / (1 + 32 * 144 / (80 * 64)))


def test_a_slow_baseline_is_announced_and_not_dropped() -> None:
    [case] = micro.plan(TINY, CPU)
    slow = replace(CEILINGS, plain_nn=1.0)
    options = replace(TINY, slow_limit=100.0)
    rows = micro.measure(case, options, micro.operands_of(case, options, CPU), slow)
    notes = {row.candidate: row.note for row in rows if row.status == "not run"}
    assert notes.keys() == {"dense", "peft", "unfused R=16", "unfused R=32"}
    assert "over the limit of 100 s" in notes["peft"]
    console = quiet()
    output.print_case(console, case.title, "backward", rows)
    assert "peft not run: about" in written(console)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (0,), "shapes": ("smollm2",)}, "rows: 0"),
        ({"ranks": (65,)}, "ranks=65"),
        ({"ranks": ()}, "ranks is empty"),
        ({"dtypes": ("int8",)}, "dtype='int8'"),
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"baselines": ("triton",)}, "baseline 'triton'"),
        ({"backends": ("cublas",)}, "backends='cublas'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"adapter_dtype": "int8"}, "adapter_dtype"),
        ({"budget": 0.0}, "budget=0.0"),
    ],
)
def test_micro_errors_name_the_argument(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        micro.run(replace(TINY, **change), quiet())


def test_an_unwritable_file_is_refused_before_measuring(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="cannot write"):
        micro.run(replace(TINY, json=tmp_path), quiet())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        micro.run(replace(TINY, json=tmp_path / "file" / "a.json"), quiet())
