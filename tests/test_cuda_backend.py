"""The CUDA extension without a GPU: import, argument errors, plans, the machine code of its kernels, and "auto"."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import loge_kernels as loge
from loge_kernels import cuda_backend
from loge_kernels.problem import BackwardProblem

registry = import_module("loge_kernels.backends")

needs_extension = pytest.mark.skipif(
    find_spec("loge_kernels._C") is None, reason="the CUDA extension is not built (pip install -e . where nvcc is)"
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


@pytest.fixture
def extension() -> ModuleType:
    return import_module("loge_kernels._C")


# Addresses that are aligned and never read: every call here is refused before a launch.
POINTERS = dict.fromkeys(("dy", "x", "xa", "left", "right", "lora_A", "lora_B", "dx", "dA", "dB"), 4096)
SIZES = {"M": 100, "N": 200, "K": 136, "R": 64, "P": 16}


def call(extension: ModuleType, **changes: Any) -> None:
    arguments: dict[str, Any] = POINTERS | SIZES
    arguments |= {"dy_stride": 200, "x_stride": 136, "scaling": 1.0, "dtype": extension.BFLOAT16}
    arguments |= {"deterministic": False, "sm_count": 108, "device": 0, "stream": 0}
    extension.backward("sm80", **(arguments | changes))


@needs_extension
def test_imports_without_torch_or_driver(extension: ModuleType) -> None:
    code = (
        "import importlib.util as u, sys;"
        f"spec = u.spec_from_file_location('_C', {extension.__file__!r}); m = u.module_from_spec(spec);"
        "spec.loader.exec_module(m); assert 'torch' not in sys.modules; print(m.toolkit, m.archs, m.kernels)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+\.\d+ .*\('sm80'", done.stdout)


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N": 204, "dy_stride": 204}, "N = 204 is not a multiple of 8"),
        ({"K": 129}, "K = 129 is not a multiple of 8"),
        ({"R": 264}, "R = 264 is not a multiple of 8 in 8 .. 256"),
        ({"P": 72}, "P = 72 is not a multiple of 8 in 0 .. 64"),
        ({"P": 0}, "dA and dB need an adapter"),
        ({"M": -1}, "M = -1 is not in 0"),
        ({"dy_stride": 204}, "dy_stride = 204 is not a multiple of 8 that is at least N = 200"),
        ({"x_stride": 128}, "x_stride = 128 is not a multiple of 8 that is at least K = 136"),
        ({"dtype": 7}, "dtype = 7 is neither 0"),
        ({"left": 0}, "left is missing"),
        ({"x": 4100}, "x starts 4 bytes past a 16-byte boundary"),
        ({"dx": 0, "dA": 0, "dB": 0}, "no gradient is asked for"),
        ({"sm_count": 0}, "sm_count = 0 is not positive"),
    ],
)
def test_arguments_are_refused_with_their_values(extension: ModuleType, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(extension, **changes)


@needs_extension
def test_an_unknown_kernel_names_those_there_are(extension: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"kernel = 'sm70' is not in this build, which has sm80"):
        extension.plan("sm70", **SIZES)


@needs_extension
@needs_no_gpu
def test_cuda_errors_name_the_call(extension: ModuleType) -> None:
    with pytest.raises(extension.CudaError, match=r"cudaGetDevice: cudaError"):
        call(extension)
    call(extension, M=0)


@needs_extension
@pytest.mark.parametrize("P", [0, 8, 16, 64])
@pytest.mark.parametrize("R", [8, 64, 72, 128, 256])
def test_plans_fit_the_card(extension: ModuleType, R: int, P: int) -> None:
    for M in (0, 1, 64, 65, 16384):
        plan = extension.plan("sm80", M=M, N=4096, K=4096, R=R, P=P, need_dA=P > 0, need_dB=P > 0)
        assert plan["slabs"] == plan["grid"] == -(-M // plan["block_m"])
        assert plan["stages"] >= 2
        assert plan["shared_bytes"] <= 166912


def tool(name: str) -> Path:
    triton = pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with Triton's wheel")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton carries no {name}")
    return path


@needs_extension
def test_the_machine_code_keeps_everything_in_registers(extension: ModuleType) -> None:
    usage = subprocess.run(
        [str(tool("cuobjdump")), "-res-usage", str(extension.__file__)], capture_output=True, text=True, timeout=300
    ).stdout
    kernels = re.findall(r"Function (\S*sm80\S*):\s+REG:(\d+) STACK:(\d+)", usage)
    assert len(kernels) == 22 * len(extension.archs.split())  # tiles of R and P, two dtypes, every architecture
    assert [name for name, _, stack in kernels if stack != "0"] == []


@needs_extension
def test_the_machine_code_uses_the_tensor_cores(extension: ModuleType) -> None:
    sass = subprocess.run(
        [str(tool("cuobjdump")), "-sass", "-arch", "sm_80", str(extension.__file__)],
        capture_output=True,
        text=True,
        timeout=500,
        env={"PATH": str(tool("nvdisasm").parent)},
    ).stdout
    functions = [part for part in sass.split("Function : ")[1:] if "sm80" in part.split("\n", 1)[0]]
    if "80" in extension.archs.split():
        assert len(functions) == 22
    for function in functions:
        name = function.split("\n", 1)[0]
        for instruction in ("HMMA.16816.F32", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS"):
            assert instruction in function, (name, instruction)
        assert re.search(r"\b(LDL|STL)\b", function) is None, name


def problem(**changes: Any) -> BackwardProblem:
    half = torch.float16
    arguments: dict[str, Any] = {
        "dy": torch.randn(4, 24, dtype=half),
        "x": torch.randn(4, 16, dtype=half),
        "left": torch.randn(24, 16, dtype=half),
        "right": torch.randn(16, 16, dtype=half),
        "scaling": 1.0,
        "dropout": 0.0,
        "exact_fraction": 0.0,
        "need_dx": True,
    }
    arguments |= dict.fromkeys(("xa", "weight", "lora_A", "lora_B", "seed"))
    arguments |= dict.fromkeys(("need_dweight", "need_dbias", "need_dA", "need_dB", "deterministic"), False)
    return BackwardProblem(**(arguments | changes))


def test_the_row_of_backends_says_why() -> None:
    (row,) = [b for b in loge.backends() if b.name == "cuda"]
    if find_spec("loge_kernels._C") is None:
        assert not row.available
        assert "not built" in row.reason
    elif not torch.cuda.is_available():
        assert row == loge.Backend("cuda", False, "no CUDA GPU")


def test_auto_wants_a_recorded_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, "auto" passes the kernels over until they are verified there."""
    seen = []
    monkeypatch.setattr(registry, "is_verified", lambda name, device: seen.append(name))

    class OnCuda:
        device = torch.device("cuda", 0)

    p = problem()
    p.dy = OnCuda()  # type: ignore[assignment]
    assert "not verified on this GPU" in (registry._cuda_passed_over(p) or "")
    assert seen == ["cuda"]


def test_rows_are_copied_only_where_they_must() -> None:
    base = torch.randn(8, 40, dtype=torch.float16)
    assert cuda_backend._rows(base) is base
    assert cuda_backend._rows(base[:, :32]).stride(0) == 40
    for awkward in (base.t(), base[:, 1:33], base[:1].expand(8, 40), torch.randn(8, 41, dtype=torch.float16)[:, :40]):
        copy = cuda_backend._rows(awkward)
        assert copy.stride(0) % 8 == 0
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, awkward)


@needs_extension
def test_the_adapter_hands_over_the_whole_problem(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, sizes, strides and buffers on their way to the extension, with a device that is not there."""
    calls: list[dict[str, Any]] = []

    class Recorder:
        plan, kernels = staticmethod(extension.plan), extension.kernels
        FLOAT16, BFLOAT16 = extension.FLOAT16, extension.BFLOAT16

        @staticmethod
        def backward(kernel: str, **arguments: Any) -> None:
            calls.append(arguments)

    class Properties:
        major, minor, multi_processor_count = 8, 0, 108

    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(cuda_backend, "_extension", Recorder)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    adapter = {
        "xa": torch.randn(4, 8, dtype=torch.float16),
        "lora_A": torch.randn(8, 16),
        "lora_B": torch.randn(24, 8),
        "need_dA": True,
        "need_dB": True,
        "need_dbias": True,
    }
    wide = torch.randn(4, 32, dtype=torch.float16)
    gradients = cuda_backend.backward(problem(dy=wide[:, :24], **adapter))
    (sent,) = calls
    assert (sent["M"], sent["N"], sent["K"], sent["R"], sent["P"]) == (4, 24, 16, 16, 8)
    assert (sent["dy_stride"], sent["x_stride"], sent["stream"]) == (32, 16, 77)
    assert sent["dy"] == wide.data_ptr()
    assert all(sent[name] != 0 for name in POINTERS)
    assert gradients.dA is not None
    assert gradients.dB is not None
    assert gradients.dA.shape == (8, 16)
    assert torch.count_nonzero(gradients.dA) == torch.count_nonzero(gradients.dB) == 0  # atomics add to zeros
    assert gradients.dbias is not None
