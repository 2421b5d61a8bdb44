"""The CUDA extension without a GPU: import, argument errors, plans, and "auto"."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from surrogate import case, problem_of

import loge_kernels as loge
from loge_kernels.backend import cuda as cuda_backend
from loge_kernels.backend import cuda_measured
from loge_kernels.backend.problem import BackwardProblem

registry = import_module("loge_kernels.backend.choice")

needs_extension = pytest.mark.skipif(
    find_spec("loge_kernels._C") is None, reason="the CUDA extension is not built (pip install -e . where nvcc is)"
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return import_module("loge_kernels._C")


@pytest.fixture(params=["sm80", "sm90"])
def kernel(extension: ModuleType, request: pytest.FixtureRequest) -> str:
    if request.param not in extension.kernels:
        pytest.skip(f"this build has no {request.param} kernel (LOGE_CUDA_ARCHS)")
    return request.param


# Addresses that are aligned and never read: every call here is refused before a launch.
NAMES = ("dy", "x", "xa", "left", "right", "lora_A", "lora_B", "dx", "dA", "dB", "workspace", "scratch")
POINTERS = dict.fromkeys(NAMES, 4096)
SIZES = {"M": 100, "N": 200, "K": 136, "R": 64, "P": 16}


def call(extension: ModuleType, kernel: str, **changes: Any) -> None:
    """A plan for no device, and its launch; `changes` in the arguments of either."""
    launch: dict[str, Any] = POINTERS | {"dy_stride": 200, "x_stride": 136, "scaling": 1.0, "stream": 0}
    planned = SIZES | {name: value for name, value in changes.items() if name not in launch}
    launch |= {name: value for name, value in changes.items() if name in launch}
    extension.plan(kernel, **planned).launch(*launch.values())


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
        ({"R": 520}, "R = 520 is not a multiple of 8 in 8 .. "),
        ({"P": 72}, "P = 72 is not a multiple of 8 in 0 .. 64"),
        ({"P": 0}, "dA and dB need an adapter"),
        ({"M": -1}, "M = -1 is not in 0"),
        ({"dy_stride": 204}, "dy_stride = 204 is not a multiple of 8 that is at least N = 200"),
        ({"x_stride": 128}, "x_stride = 128 is not a multiple of 8 that is at least K = 136"),
        ({"dtype": 7}, "dtype = 7 is neither 0"),
        ({"M": 2**31}, "M = 2147483648 is not in 0 .. 2^31 - 256"),
        ({"left": 0}, "left is missing"),
        ({"x": 4100}, "x starts 4 bytes past a 16-byte boundary"),
        ({"dA": 4100}, "dA starts 4 bytes past a 16-byte boundary"),
        ({"dx": 0}, "dx is missing"),
        ({"workspace": 0}, "the workspace is missing"),
        ({"workspace": 4100}, "workspace starts 4 bytes past a 16-byte boundary"),
        ({"need_dx": False, "need_dA": False, "need_dB": False}, "no gradient is asked for"),
        ({"sm_count": 0}, "sm_count = 0 is not positive"),
        ({"splits": 3}, "splits = 3 is no power of two"),
        ({"splits": 16}, "splits = 16 is no power of two"),
        ({"rows": 3}, "rows = 3 is not in 1"),
        ({}, "this plan was made for no device"),
    ],
)
def test_refused_arguments(extension: ModuleType, kernel: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(extension, kernel, **changes)


@needs_extension
def test_what_only_one_kernel_refuses(extension: ModuleType) -> None:
    with pytest.raises(ValueError, match="the scratch is missing"):
        call(extension, "sm80", scratch=0)
    with pytest.raises(ValueError, match="scratch starts 4 bytes past a 16-byte boundary"):
        call(extension, "sm80", scratch=4100)
    if "sm90" in extension.kernels:
        with pytest.raises(ValueError, match="deterministic sums are the caller's to add up and to round"):
            call(extension, "sm90", deterministic=True)


@needs_extension
def test_an_unknown_kernel_names_those_there_are(extension: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"kernel = 'sm70' is not in this build, which has sm80"):
        extension.plan("sm70", **SIZES)


@needs_extension
@needs_no_gpu
def test_cuda_errors_name_the_call(extension: ModuleType, kernel: str) -> None:
    for _ in range(2):  # what failed once is tried again
        with pytest.raises(extension.CudaError, match=r"cudaGetDevice: cudaError"):
            call(extension, kernel, device=0)
    call(extension, kernel, M=0)


@needs_extension
def test_a_workspace_holds_the_sums_that_are_wanted(extension: ModuleType, kernel: str) -> None:
    dA, dB = SIZES["P"] * SIZES["K"], SIZES["N"] * SIZES["P"]
    make = lambda **needs: extension.plan(kernel, **SIZES | needs)  # noqa: E731
    counters = make().workspace - dA - dB
    assert counters == 8 if kernel == "sm90" else 2 <= counters <= 2 * 108
    assert make(need_dA=False, need_dB=False).workspace == 0 if kernel == "sm90" else counters
    if kernel == "sm90":
        assert make(need_dA=False).workspace == dB + counters
        assert make(need_dB=False).workspace == dA + counters
        slabs = make(deterministic=True).slabs
        assert make(deterministic=True).workspace == slabs * (dA + dB)
        assert (make(deterministic=True).sets, make().sets, make().scratch) == (slabs, 0, 0)
    else:
        assert make(deterministic=True).workspace == make().workspace
        assert (make(deterministic=True).sets, make().sets) == (0, 0)
        assert 4 * make().scratch >= 2 * SIZES["M"] * (SIZES["R"] + SIZES["P"])  # T


@needs_extension
def test_a_deterministic_workspace_is_bounded(extension: ModuleType) -> None:
    if "sm90" not in extension.kernels:
        pytest.skip("this build has no sm90 kernel (LOGE_CUDA_ARCHS)")
    large = {"N": 14336, "K": 4096, "R": 64, "P": 64, "deterministic": True}
    rows = extension.plan("sm90", M=1, **large).block_m
    most = (256 << 20) // (4 * 64 * (14336 + 4096)) * rows
    assert extension.plan("sm90", M=most, **large).workspace * 4 <= 256 << 20
    with pytest.raises(ValueError, match=r"dA and dB of its own: \d{3} MiB, where 256 are allowed"):
        extension.plan("sm90", M=most + 1, **large)
    assert extension.plan("sm90", M=100 * most, **large | {"deterministic": False}).workspace * 4 < 5 << 20


@needs_extension
def test_parts_of_sums_are_bounded(extension: ModuleType) -> None:
    """Those of the blocks of sm80: more rows than N has steps for each block cost no more."""
    sizes = {"N": 14336, "K": 4096, "R": 256, "P": 16}
    some, more = (extension.plan("sm80", M=M, **sizes).scratch for M in (16384, 10 * 16384))
    assert 4 * some < 256 << 20
    assert 4 * (more - some) == 2 * 9 * 16384 * (256 + 16)  # T alone
    extension.plan("sm80", M=16384, **sizes | {"P": 64})
    with pytest.raises(ValueError, match=r"blocks keep parts of dA and dB: \d{3} MiB, where 512 are allowed"):
        extension.plan("sm80", M=16384, **sizes | {"N": 28672, "P": 64})


SHARED_BYTES = {"sm80": 166912, "sm90": 232448}


@needs_extension
@pytest.mark.parametrize("P", [0, 8, 16, 64])
@pytest.mark.parametrize("R", [8, 64, 72, 128, 256])
def test_plans_fit_the_card(extension: ModuleType, kernel: str, R: int, P: int) -> None:
    for M in (0, 1, 64, 65, 16384):
        plan = extension.plan(kernel, M=M, N=4096, K=4096, R=R, P=P, need_dA=P > 0, need_dB=P > 0, sm_count=132)
        assert plan.slabs == -(-M // plan.block_m)
        if kernel == "sm80":  # one block to a multiprocessor, however many slabs there are
            assert plan.grid == 0 if M == 0 else 1 <= plan.grid <= 132
            assert plan.grid == 132 or M < 16384
        else:
            assert plan.grid == -(-plan.slabs // plan.rows) * plan.cluster
        assert plan.cluster in ((1,) if kernel == "sm80" else (1, 2, 4, 8))
        assert plan.stages >= 2
        assert plan.shared_bytes <= SHARED_BYTES[kernel]


@needs_extension
def test_a_cluster_can_be_chosen(extension: ModuleType, kernel: str) -> None:
    if kernel == "sm80":
        with pytest.raises(ValueError, match="splits = 2 is no power of two up to 1"):
            extension.plan(kernel, **SIZES, splits=2)
        return
    plan = extension.plan(kernel, **SIZES, splits=8)
    assert (plan.rows, plan.cluster, plan.grid) == (1, 8, 8 * plan.slabs)
    plan = extension.plan(kernel, **SIZES, rows=2, splits=4)
    assert (plan.rows, plan.cluster, plan.grid) == (2, 8, 8 * -(-plan.slabs // 2))
    with pytest.raises(ValueError, match="splits = 8 is no power of two up to 4"):
        extension.plan(kernel, **SIZES, rows=2, splits=8)
    with pytest.raises(ValueError, match="splits = 8 is no power of two up to 4"):
        extension.plan(kernel, **SIZES | {"R": 256}, splits=8)  # T has no room for so many


def problem(**changes: Any) -> BackwardProblem:
    return problem_of(case(4, 24, 16, R=16, P=None, dtype=torch.float16), ("need_dx",), **changes)


def cuda_row() -> loge.Backend:
    (row,) = [b for b in loge.backends() if b.name == "cuda"]
    return row


def test_the_row_of_backends_says_why() -> None:
    row = cuda_row()
    if find_spec("loge_kernels._C") is None:
        assert not row.available
        assert "not built" in row.reason
    elif not torch.cuda.is_available():
        assert not row.available
        assert re.fullmatch(r"no CUDA GPU \(built for sm_\w+(, sm_\w+)* with CUDA \d+\.\d+\)", row.reason)


@pytest.mark.parametrize("verified", [False, True])
def test_the_row_says_what_was_built_and_verified(verified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "_extension", lambda: SimpleNamespace(archs="80 90a", toolkit="13.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(registry, "is_verified", lambda name, device: verified)
    row = cuda_row()
    assert row.available
    assert "built for sm_80, sm_90a with CUDA 13.0" in row.reason
    assert "verified on this GPU" in row.reason
    assert ("not verified on this GPU" in row.reason) is not verified


class OnCuda:
    """Stands for dY on a GPU."""

    device, is_cuda, dtype, shape = torch.device("cuda", 0), True, torch.bfloat16, (4096, 24)


def on_cuda(**changes: Any) -> BackwardProblem:
    p = problem(**changes)
    p.dy = OnCuda()  # type: ignore[assignment]
    return p


def passed_over(name: str) -> str | None:
    return registry._REGISTRY[name].why_not_auto(on_cuda())


def test_auto_wants_a_recorded_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, "auto" passes the kernels over until they are verified there."""
    seen = []
    monkeypatch.setattr(registry, "is_verified", lambda name, device: seen.append(name))
    assert "not verified on this GPU" in (passed_over("cuda") or "")
    assert seen == ["cuda"]


ROW = {"device": "NVIDIA H200", "dtype": "bfloat16", "M": [4096, 8192], "N": 24, "K": 16, "R": 16, "P": 0}


@pytest.mark.parametrize(
    ("changes", "obstacle", "preferred"),
    [
        ({}, None, True),
        ({}, "unverified", False),
        ({}, "refuses", False),
        ({"device": "NVIDIA A100"}, None, False),
        ({"dtype": "float16"}, None, False),
        ({"M": [1, 4095]}, None, False),
        *(({name: 32}, None, False) for name in "NKRP"),
    ],
)
def test_measured_shapes_are_preferred_to_triton_where_cuda_can(
    changes: dict[str, Any], obstacle: str | None, preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(registry, "is_verified", lambda name, device: name == "triton" or obstacle != "unverified")
    monkeypatch.setattr(cuda_backend, "why_not", lambda problem: "no" if obstacle == "refuses" else None)
    times = {"triton": 1.0, "cuda": 1.0, "reference": 2.0}
    monkeypatch.setattr(registry.predicted, "microseconds", lambda problem: times)
    monkeypatch.setattr(cuda_measured, "_rows", lambda: (ROW | changes,))
    assert (passed_over("triton") is not None) is preferred
    assert (passed_over("cuda") is None) is (obstacle != "unverified")


@pytest.mark.parametrize(
    ("triton", "cuda", "reference", "obstacle", "chosen"),
    [
        (2.0, 1.0, 3.0, None, "cuda"),
        (1.0, 2.0, 3.0, None, "triton"),
        (3.0, 2.0, 1.0, None, "reference"),
        (3.0, 1.0, 2.0, None, "cuda"),
        (2.0, 1.0, 3.0, "unverified", "triton"),
        (2.0, 1.0, 3.0, "refuses", "triton"),
        (3.0, 1.0, 2.0, "unverified", "reference"),
        (2.0, None, 1.0, None, "reference"),
        (1.0, None, 2.0, None, "triton"),
    ],
)
def test_auto_compares_predicted_times(
    triton: float,
    cuda: float | None,
    reference: float,
    obstacle: str | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"triton": triton, "reference": reference} | ({} if cuda is None else {"cuda": cuda})
    monkeypatch.setattr(registry.predicted, "microseconds", lambda problem: times)
    monkeypatch.setattr(cuda_measured, "faster_than_triton", lambda problem: False)
    monkeypatch.setattr(registry, "is_verified", lambda name, device: name == "triton" or obstacle != "unverified")
    monkeypatch.setattr(cuda_backend, "why_not", lambda problem: "no" if obstacle == "refuses" else None)
    order = (name for name in registry._REGISTRY if name == "reference" or passed_over(name) is None)
    assert next(order) == chosen


def test_the_prediction_is_asked_of_the_cost_model() -> None:
    times = registry.predicted.microseconds(problem())
    assert set(times) >= {"triton", "reference"}
    assert all(us > 0 for us in times.values())


def test_an_empty_table_prefers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it ships: a row needs a measurement, and the file must hold what a row needs."""
    for row in cuda_measured._rows():
        assert row.keys() >= ROW.keys() | {"speedup", "source"}
        assert row["speedup"] > 1.0
    monkeypatch.setattr(cuda_measured, "_rows", tuple)
    assert not cuda_measured.faster_than_triton(on_cuda())


@needs_extension
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "no dropout mask"),
        ({"exact_fraction": 0.5}, "dense products"),
        ({"left": None, "right": None}, "without factors"),
    ],
)
def test_what_the_kernels_do_not_do(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "why_not_here", lambda: None)
    assert reason in (cuda_backend.why_not(on_cuda(**changes)) or "")
