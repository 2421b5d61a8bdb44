"""What a call asks of CUDA, counted by a GPU that does nothing: the extension's host code, compiled without kernels."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from surrogate import case, problem_of
from toolchain import COMPILER, HOST_SOURCES, SOURCES, cuda_include, needs_compiler

from loge_kernels.backend import cuda as cuda_backend
from loge_kernels.backend.problem import BackwardProblem
from loge_kernels.triton_kernels import cost_sm80
from loge_kernels.triton_kernels.phases import Flags

pytestmark = needs_compiler
SIZES = {"M": 300, "N": 256, "K": 192, "R": 64, "P": 16}
HOST_CODE = ("bindings", "sm80_backward", "sm90_backward", "tensor_map", "tensor_map_table")
FIELDS = ("kernels", "memsets", "memset_bytes", "prepared", "encoded", "cluster")
fresh_device = count(1).__next__  # a device that no test has asked yet: what it can hold is asked once


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pybind11 = pytest.importorskip("pybind11")
    cuda = cuda_include()
    if cuda is None:
        pytest.skip("needs the CUDA toolkit's headers (CUDA_HOME)")
    path = tmp_path_factory.mktemp("null") / "_C.so"
    folders = (SOURCES, cuda, pybind11.get_include(), sysconfig.get_path("include"))
    sources = [SOURCES / f"{name}.cpp" for name in HOST_CODE] + [HOST_SOURCES / "null_device.cpp"]
    command = [str(COMPILER), "-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-DLOGE_SM90"]
    command += ['-DLOGE_CUDA_ARCHS="80 90a"', *(f"-isystem{folder}" for folder in folders)]
    made = subprocess.run([*command, *map(str, sources), "-o", str(path)], capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def extension(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def counts(library: Path, extension: ModuleType) -> Callable[[], dict[str, int]]:
    """What has been asked of the device since the last call."""
    null = ctypes.CDLL(str(library))

    def read() -> dict[str, int]:
        values = (ctypes.c_longlong * len(FIELDS))()
        null.null_device_counts(values)
        return dict(zip(FIELDS, values, strict=True))

    read()
    return read


@pytest.fixture
def device_is(library: Path, extension: ModuleType) -> Iterator[Callable[[int, list[int]], None]]:
    """Sets what a device's block may have of shared memory, and how many clusters of 1, 2, 4 and 8 fit."""
    null = ctypes.CDLL(str(library))

    def become(shared_bytes: int, clusters: list[int]) -> None:
        null.null_device_is(shared_bytes, (ctypes.c_int * 4)(*clusters))

    yield become
    become(232448, [132, 66, 32, 16])


@pytest.fixture
def backend(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend "cuda" over that extension, which takes tensors of the CPU."""
    monkeypatch.setattr(cuda_backend, "_extension", lambda: extension)
    monkeypatch.setattr(cuda_backend, "why_not_here", lambda: None)
    monkeypatch.setattr(cuda_backend, "_plans", {})
    monkeypatch.setattr(cuda_backend, "_stream", lambda device: 0)
    monkeypatch.setattr(cuda_backend, "_target", lambda extension, device: {"kernel": "sm90", "device": 0})
    return cuda_backend


@pytest.fixture
def ampere(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same with Ampere's kernels."""
    monkeypatch.setattr(backend, "_target", lambda extension, device: {"kernel": "sm80", "device": 0})
    return backend


def problem(lora_dtype: torch.dtype = torch.float32, **changes: Any) -> BackwardProblem:
    c = case(*SIZES.values(), dtype=torch.bfloat16)
    adapter = {"lora_A": c.lora_A.to(lora_dtype), "lora_B": c.lora_B.to(lora_dtype)}
    return problem_of(c, ("need_dx", "need_dA", "need_dB"), **adapter, **changes)


ADDRESSES = [4096 * i for i in range(1, 12)]


def launch(plan: Any, addresses: list[int] = ADDRESSES) -> None:
    """On memory that nothing reads; without a workspace, which the null device would clear."""
    plan.launch(*addresses[:8], 0, 0, 0, 0, SIZES["N"], SIZES["K"], 1.0, 0)


def without_sums(extension: ModuleType, device: int, kernel: str = "sm90", **changes: Any) -> Any:
    needs = {"need_dA": False, "need_dB": False}
    return extension.plan(kernel, **SIZES | needs | changes, device=device)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_call_is_one_memset_and_one_kernel(
    backend: ModuleType, counts: Callable[[], dict[str, int]], lora_dtype: torch.dtype
) -> None:
    gradients = backend.backward(problem(lora_dtype))
    seen = counts()
    assert (seen["kernels"], seen["memsets"]) == (1, 1)
    sums = SIZES["P"] * (SIZES["N"] + SIZES["K"])
    assert seen["memset_bytes"] == 4 * (sums + 8)
    if lora_dtype == torch.float32:  # the null kernel adds nothing
        assert torch.equal(gradients.dA, torch.zeros(SIZES["P"], SIZES["K"]))
        assert torch.equal(gradients.dB, torch.zeros(SIZES["N"], SIZES["P"]))


def test_a_deterministic_call_clears_nothing(backend: ModuleType, counts: Callable[[], dict[str, int]]) -> None:
    backend.backward(problem(deterministic=True))
    seen = counts()
    assert (seen["kernels"], seen["memsets"]) == (1, 0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_call_on_ampere_is_one_memset_of_counters_and_two_kernels(
    ampere: ModuleType,
    extension: ModuleType,
    counts: Callable[[], dict[str, int]],
    lora_dtype: torch.dtype,
    deterministic: bool,
) -> None:
    """Deterministic or not: the blocks count themselves, and write each sum once."""
    gradients = ampere.backward(problem(lora_dtype, deterministic=deterministic))
    seen = counts()
    assert (seen["kernels"], seen["memsets"], seen["prepared"]) == (2, 1, 2)
    assert seen["memset_bytes"] <= 4 * 2 * 132  # a counter for each block
    assert gradients.dA.dtype == gradients.dB.dtype == lora_dtype
    if lora_dtype == torch.float32:  # what is kept of the workspace is the sums and the counters
        assert gradients.dA.untyped_storage().nbytes() <= 4 * SIZES["P"] * (SIZES["N"] + SIZES["K"]) + 4 * 2 * 132


@pytest.mark.parametrize("R", [8, 72, 200, 256, 320, 512])
@pytest.mark.parametrize("P", [8, 64])
def test_the_cost_model_has_amperes_own_plan(extension: ModuleType, R: int, P: int) -> None:
    for M, N, K, needs in (
        (1, 72, 136, {}),
        (500, 4096, 4096, {}),
        (8192, 1024, 4096, {"need_dA": False}),
        (16384, 14336, 4096, {"need_dx": False, "need_dA": False}),
    ):
        sizes = {"M": M, "N": N, "K": K, "R": R, "P": P}
        plan, cut = extension.plan("sm80", **sizes, **needs), cost_sm80.plan(*sizes.values(), Flags(**needs), 108)
        assert (plan.block_n, plan.block_r, plan.block_k) == (cut.step, cut.columns, cut.width)
        assert (plan.grid, plan.second_grid) == (cut.project_blocks, cut.expand_blocks)


@pytest.mark.parametrize("R", [64, 128, 256])
def test_ampere_kernels_fit_smaller_gpus(
    extension: ModuleType, device_is: Callable[[int, list[int]], None], R: int
) -> None:
    """Compute capability 8.6, 8.9 or 12.0: 99 KiB for a block, where an A100 has 163."""
    device_is(101376, [84, 0, 0, 0])
    plan = without_sums(extension, fresh_device(), "sm80", R=R, M=10000)
    assert plan.shared_bytes <= 101376
    assert plan.grid == 84


def test_maps_are_encoded_once(extension: ModuleType, counts: Callable[[], dict[str, int]]) -> None:
    device = fresh_device()
    plan = without_sums(extension, device)
    counts()
    launch(plan)
    assert counts()["encoded"] == 6  # dy, left, right, lora_A, lora_B, dx
    launch(plan)
    assert counts()["encoded"] == 0
    launch(plan, [8192 * 16, *ADDRESSES[1:]])  # another dY
    assert counts()["encoded"] == 1
    launch(without_sums(extension, device, M=301))  # dY and dX are longer, the factors are not
    assert counts()["encoded"] == 2
    launch(without_sums(extension, fresh_device()))
    assert counts()["encoded"] == 6


def test_the_table_of_maps_is_bounded(extension: ModuleType, counts: Callable[[], dict[str, int]]) -> None:
    plan = without_sums(extension, fresh_device())
    launch(plan)
    counts()
    for i in range(8200):
        launch(plan, [4096 * (100 + i), *ADDRESSES[1:]])
    counts()
    launch(plan)
    assert counts()["encoded"] >= 1  # dY's was given up on the way


def test_a_kernel_is_loaded_and_asked_once(extension: ModuleType, counts: Callable[[], dict[str, int]]) -> None:
    device = fresh_device()
    for M in (1, 100, 1000):
        without_sums(extension, device, M=M)
    assert counts()["prepared"] == 1
    without_sums(extension, device, R=128)  # another kernel
    assert counts()["prepared"] == 1


@pytest.mark.parametrize(
    ("clusters", "chosen"),
    [
        ([132, 66, 32, 16], (2, 8)),
        ([132, 66, 30, 14], (2, 4)),  # GPCs of 14 multiprocessors: 16 clusters of 8 would take two waves
        ([132, 66, 0, 0], (1, 2)),
        ([132, 0, 0, 0], (1, 1)),
    ],
)
def test_clusters_are_what_the_device_can_hold(
    extension: ModuleType,
    counts: Callable[[], dict[str, int]],
    device_is: Callable[[int, list[int]], None],
    clusters: list[int],
    chosen: tuple[int, int],
) -> None:
    device_is(232448, clusters)
    plan = without_sums(extension, fresh_device(), M=4096, N=4096, K=4096, R=256)
    assert (plan.rows, plan.cluster) == chosen
    assert plan.grid == 32 * plan.cluster // plan.rows


@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
def test_too_little_shared_memory_is_a_reason(
    extension: ModuleType, device_is: Callable[[int, list[int]], None], kernel: str
) -> None:
    device_is(101376, [132, 66, 32, 16])
    with pytest.raises(ValueError, match=rf"{kernel}: a block needs \d+ bytes of shared memory, this GPU has 101376"):
        without_sums(extension, fresh_device(), kernel, R=256, P=64)
