"""The backend "cuda" over an extension that plans and launches nothing: what it hands over, and what it makes of it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from surrogate import case, problem_of
from torch.utils._python_dispatch import TorchDispatchMode

from loge_kernels.backend import cuda as cuda_backend
from loge_kernels.backend.problem import BackwardProblem, Operands

registry = import_module("loge_kernels.backend.choice")

needs_extension = pytest.mark.skipif(
    find_spec("loge_kernels._C") is None, reason="the CUDA extension is not built (pip install -e . where nvcc is)"
)
NAMES = ("dy", "x", "xa", "left", "right", "lora_A", "lora_B", "dx", "dA", "dB", "workspace", "scratch")


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return import_module("loge_kernels._C")


def problem(**changes: Any) -> BackwardProblem:
    return problem_of(case(4, 24, 16, R=16, P=None, dtype=torch.float16), ("need_dx",), **changes)


def test_rows_are_copied_only_where_they_must() -> None:
    base = torch.randn(8, 40, dtype=torch.float16)
    assert cuda_backend._rows(base) is base
    assert cuda_backend._rows(base[:, :32]).stride(0) == 40
    for awkward in (base.t(), base[:, 1:33], base[:1].expand(8, 40), torch.randn(8, 41, dtype=torch.float16)[:, :40]):
        copy = cuda_backend._rows(awkward)
        assert copy.stride(0) % 8 == 0
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, awkward)


class Recorder:
    """Stands for the extension on a GPU: plans, and keeps what it was asked to launch, which does nothing."""

    def __init__(self, real: ModuleType) -> None:
        self.kernels, self.FLOAT16, self.BFLOAT16 = real.kernels, real.FLOAT16, real.BFLOAT16
        self._plan = real.plan
        self.plans: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []

    def plan(self, kernel: str, *, device: int, **sizes: Any) -> SimpleNamespace:
        real = self._plan(kernel, **sizes)
        self.plans.append(sizes | {"kernel": kernel, "device": device})

        def launch(*arguments: Any) -> None:
            names = (*NAMES, "dy_stride", "x_stride", "scaling", "stream")
            sent = dict(zip(names, arguments, strict=True))
            self.calls.append(sent)
            if sent["dx"]:
                ctypes.memset(sent["dx"], 0, 2 * sizes["M"] * sizes["K"])
            if sent["workspace"]:
                sums = (ctypes.c_float * real.workspace).from_address(sent["workspace"])
                sums[:] = [float(i % 97) for i in range(real.workspace)]

        return SimpleNamespace(launch=launch, sets=real.sets, workspace=real.workspace, scratch=real.scratch)


@pytest.fixture
def recorder(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(extension)
    monkeypatch.setattr(cuda_backend, "_extension", lambda: made)
    monkeypatch.setattr(cuda_backend, "why_not_here", lambda: None)
    monkeypatch.setattr(cuda_backend, "_plans", {})
    monkeypatch.setattr(cuda_backend, "_stream", lambda device: 77)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return made


def adapter(M: int = 4, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    needed = dict.fromkeys(("need_dA", "need_dB", "need_dbias"), True)
    xa = torch.randn(M, 8, dtype=torch.float16)
    matrices = {"lora_A": torch.randn(8, 16, dtype=dtype), "lora_B": torch.randn(24, 8, dtype=dtype)}
    return {"xa": xa, **matrices, **needed, **changes}


@needs_extension
def test_the_adapter_hands_over_the_whole_problem(recorder: Recorder) -> None:
    """Names, sizes, strides and buffers on their way to the extension, with a device that is not there."""
    wide = torch.randn(4, 32, dtype=torch.float16)
    p = problem(dy=wide[:, :24], **adapter())
    gradients = cuda_backend.backward(p)
    (planned,), (sent,) = recorder.plans, recorder.calls
    assert {name: planned[name] for name in "MNKRP"} == {"M": 4, "N": 24, "K": 16, "R": 16, "P": 8}
    assert planned["kernel"] == recorder.kernels[-1]  # Hopper's own where the build has it
    assert planned["dtype"] == recorder.FLOAT16
    assert (sent["dy_stride"], sent["x_stride"], sent["stream"], sent["scaling"]) == (32, 16, 77, p.scaling)
    same = {"dy": wide, "x": p.x, "xa": p.xa, "left": p.left, "right": p.right}
    assert {name: sent[name] for name in same} == {name: tensor.data_ptr() for name, tensor in same.items()}
    assert all(sent[name] != 0 for name in NAMES if name not in ("dA", "dB", "scratch"))
    assert gradients.dx.data_ptr() == sent["dx"]
    assert gradients.dbias is not None
    # fp32 adapters: the sums are the result, dA and then dB.
    assert sent["dA"] == sent["dB"] == 0
    assert torch.equal(gradients.dA, torch.arange(128.0).remainder(97).view(8, 16))
    assert torch.equal(gradients.dB, torch.arange(128.0, 320.0).remainder(97).view(24, 8))
    assert gradients.dA.is_contiguous()
    assert gradients.dB.is_contiguous()


@needs_extension
def test_the_operators_outputs_share_no_storage(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile warns of an operator whose outputs do, and will refuse it."""
    cuda = replace(registry._REGISTRY["cuda"], why_not=lambda problem: None)
    monkeypatch.setattr(registry, "_REGISTRY", {"cuda": cuda})
    p = problem(**adapter())
    operands = Operands(p.x, p.weight, p.left, p.right, lora_A=p.lora_A, lora_B=p.lora_B, backend="cuda")
    need = [True, False, False, True, True]
    outputs = torch.ops.loge_kernels.linear_backward(p.dy, p.xa, need, *operands)
    assert len({t.untyped_storage()._cdata for t in outputs}) == len(outputs)
    assert torch.equal(outputs[3], torch.arange(128.0).remainder(97).view(8, 16))
    assert torch.equal(outputs[4], torch.arange(128.0, 320.0).remainder(97).view(24, 8))


@needs_extension
def test_a_sum_that_is_alone_comes_first(recorder: Recorder) -> None:
    gradients = cuda_backend.backward(problem(**adapter(need_dA=False)))
    assert torch.equal(gradients.dB, torch.arange(192.0).remainder(97).view(24, 8))
    assert gradients.dA is None
    gradients = cuda_backend.backward(problem(**adapter(need_dB=False)))
    assert torch.equal(gradients.dA, torch.arange(128.0).remainder(97).view(8, 16))
    assert gradients.dB is None


@needs_extension
def test_the_kernel_rounds_for_adapters_of_16_bits(recorder: Recorder) -> None:
    gradients = cuda_backend.backward(problem(**adapter(dtype=torch.float16)))
    (sent,) = recorder.calls
    assert (sent["dA"], sent["dB"]) == (gradients.dA.data_ptr(), gradients.dB.data_ptr())
    assert (gradients.dA.shape, gradients.dB.shape) == ((8, 16), (24, 8))
    assert gradients.dA.dtype == gradients.dB.dtype == torch.float16
    mixed = adapter(dtype=torch.float16, lora_A=torch.randn(8, 16))
    gradients = cuda_backend.backward(problem(**mixed))
    assert (recorder.calls[-1]["dA"], recorder.calls[-1]["dB"]) == (0, gradients.dB.data_ptr())
    assert gradients.dA.dtype == torch.float32


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_deterministic_sums_are_added_up_slab_by_slab(recorder: Recorder, dtype: torch.dtype) -> None:
    half = torch.float16
    tensors = {"dy": torch.randn(300, 24, dtype=half), "x": torch.randn(300, 16, dtype=half)}
    gradients = cuda_backend.backward(problem(**adapter(300, dtype) | tensors | {"deterministic": True}))
    (sent,), (planned,) = recorder.calls, recorder.plans
    assert planned["deterministic"]
    if planned["kernel"] == "sm80":  # which adds up in a fixed order by itself
        pytest.skip("needs the kernel of sm_90a")
    assert sent["dA"] == sent["dB"] == 0
    sums = torch.arange(320.0 * 3).remainder(97).view(3, 320).sum(0)
    assert torch.equal(gradients.dA, sums[:128].view(8, 16).to(dtype))
    assert torch.equal(gradients.dB, sums[128:].view(24, 8).to(dtype))


@needs_extension
def test_a_shape_is_planned_once(recorder: Recorder) -> None:
    for _ in range(3):
        cuda_backend.backward(problem(**adapter()))
    assert len(recorder.plans) == 1
    others = [adapter(dtype=torch.float16), adapter(need_dA=False), adapter(deterministic=True)]
    for other in others:
        cuda_backend.backward(problem(**other))
    assert len(recorder.plans) == 1 + len(others)


@needs_extension
def test_the_table_of_plans_is_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "_MOST_PLANS", 2)
    for M in (1, 2, 3, 4, 3):
        cuda_backend.backward(problem(dy=torch.randn(M, 24, dtype=torch.float16), x=None, need_dx=True))
        assert len(cuda_backend._plans) <= 2
    assert [plan["M"] for plan in recorder.plans] == [1, 2, 3, 4]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_call_allocates_and_has_torch_launch_nothing(recorder: Recorder, dtype: torch.dtype) -> None:
    """But the casts of an fp32 adapter to 16 bits."""
    p = problem(**adapter(dtype=dtype, need_dbias=False))
    cuda_backend.backward(p)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function.__name__)
            return function(*args, **kwargs or {})

    called: list[str] = []
    with Count():
        cuda_backend.backward(p)
    casts = 2 if dtype == torch.float32 else 0
    results = ["as_strided.default"] * 2 if casts else ["new_empty.default"] * 2
    assert sorted(called) == sorted(["new_empty.default"] * 2 + ["_to_copy.default"] * casts + results)


@needs_extension
@pytest.mark.parametrize("name", ["x", "xa", "left", "right", "lora_A", "lora_B"])
def test_operands_of_another_size_are_refused(recorder: Recorder, name: str) -> None:
    """The kernels take pointers and sizes on trust."""
    p = problem(**adapter())
    cuda_backend.backward(p)
    tensor = getattr(p, name)
    p = replace(p, **{name: tensor[:-1]})
    with pytest.raises(ValueError, match=r"an operand of the backward pass has \d+ elements where \d+ are needed"):
        cuda_backend.backward(p)


@needs_extension
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_each_gpu_has_its_kernel(
    recorder: Recorder, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda_backend.backward(problem())
    hopper = capability == (9, 0) and "sm90" in recorder.kernels
    assert recorder.plans[0]["kernel"] == ("sm90" if hopper else "sm80")


@needs_extension
def test_reasons_are_the_shapes(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = problem(dy=torch.randn(4, 20, dtype=torch.float16), left=torch.randn(20, 16, dtype=torch.float16))
    assert "N = 20 is not a multiple of 8" in str(cuda_backend._plan(odd))
    with pytest.raises(ValueError, match="N = 20"):
        cuda_backend.backward(odd)
    cuda_backend.backward(problem(**adapter()))
    for name in ("lora_A", "lora_B"):
        other = adapter()
        other[name] = other[name].bfloat16()
        assert f"{name} is torch.bfloat16" in str(cuda_backend._plan(problem(**other)))
    assert "dtype torch.float32" in str(cuda_backend._plan(problem(dy=torch.randn(4, 24))))
    monkeypatch.setattr(cuda_backend, "_plans", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda_backend._plan(problem()) == "compute capability 8.0 or newer is needed"
    monkeypatch.setattr(cuda_backend, "_plans", {})
    monkeypatch.setattr(cuda_backend, "why_not_here", lambda: "no GPU")
    assert cuda_backend._plan(problem()) == "no GPU"
    assert cuda_backend._plans == {}  # tomorrow there may be one


@needs_extension
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_rows_give_zeros(recorder: Recorder, deterministic: bool) -> None:
    half = torch.float16
    empty = {"dy": torch.empty(0, 24, dtype=half), "x": torch.empty(0, 16, dtype=half), "deterministic": deterministic}
    gradients = cuda_backend.backward(problem(**adapter(0) | empty))
    assert gradients.dx.shape == (0, 16)
    assert torch.equal(gradients.dA, torch.zeros(8, 16))
    assert torch.equal(gradients.dB, torch.zeros(24, 8))
    assert recorder.calls == []


@needs_extension
def test_a_residual_is_added_to_what_the_kernel_wrote(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = replace(registry._REGISTRY["cuda"], why_not=lambda problem: None)
    monkeypatch.setattr(registry, "_REGISTRY", {"cuda": cuda})
    rows, residual = torch.tensor([3, 7]), torch.randn(2, 16, dtype=torch.float16)
    p = problem(rows=rows, residual=residual)
    gradients = registry.run_backward(p, "cuda")
    torch.testing.assert_close(gradients.dx, p.dy[:, rows] @ residual, rtol=1e-2, atol=1e-2)
