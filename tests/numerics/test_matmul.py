"""Products in 16 bits on a CPU without such instructions: float32 blocks, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loge_kernels.numerics import matmul as module
from loge_kernels.numerics.matmul import add_matmul, matmul

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Every dtype counts as slow if it has 16 bits; returns the dtypes that went through the blocks."""
    calls: list[torch.dtype] = []
    original = module._blocked

    def spy(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> torch.Tensor:
        calls.append(a.dtype)
        return original(a, b, out, add)

    monkeypatch.setattr(module, "slow_on_cpu", lambda dtype: dtype in HALVES)
    monkeypatch.setattr(module, "_blocked", spy)
    return calls


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double()


def assert_rounded_once(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Half a unit in the last place of the result, and float32's error over the inner dimension."""
    truth = exact(a, b)
    slack = a.shape[1] * 2.0**-23 * (a.double().abs() @ b.double().abs())
    allowed = 0.501 * torch.finfo(got.dtype).eps * truth.abs() + slack
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 13, 11), (16, 32, 8), (64, 33, 65)])
@pytest.mark.parametrize(("streamed", "resident"), [(1, 1), (40, 90), (33 * 16, 33 * 13), (1 << 21, 1 << 22)])
def test_blocks(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    streamed: int,
    resident: int,
    blocked: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_STREAMED", streamed)
    monkeypatch.setattr(module, "_RESIDENT", resident)
    I, J, L = shape
    a, b = torch.randn(I, J).to(dtype), torch.randn(J, L).to(dtype)
    got = matmul(a, b)
    assert got.dtype == dtype
    assert blocked == [dtype]
    assert_rounded_once(got, a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_any_strides(dtype: torch.dtype, blocked: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STREAMED", 50)
    monkeypatch.setattr(module, "_RESIDENT", 70)
    a, b = torch.randn(18, 40).to(dtype), torch.randn(30, 40).to(dtype)
    for left, right in [(a, b.t()), (a[::2, ::4], b[::3].t()[::4]), (a.t(), a), (a[:1].expand(5, 40), b.t())]:
        assert_rounded_once(matmul(left, right), left, right)


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_result_keeps_what_16_bits_would_lose(dtype: torch.dtype, blocked: list[torch.dtype]) -> None:
    a, b = torch.randn(20, 30).to(dtype), torch.randn(30, 25).to(dtype)
    got = matmul(a, b, torch.float32)
    assert got.dtype == torch.float32
    assert (got.double() - exact(a, b)).abs().max() < 1e-5


class Watching(TorchDispatchMode):
    """As a selective activation checkpoint sees every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_add(dtype: torch.dtype, blocked: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STREAMED", 50)
    monkeypatch.setattr(module, "_RESIDENT", 70)
    a, b, start = torch.randn(18, 40).to(dtype), torch.randn(40, 30).to(dtype), torch.randn(18, 30).to(dtype)
    out = start.clone()
    assert add_matmul(out, a, b) is out
    assert blocked == ([dtype] if dtype in HALVES else [])
    with Watching():
        added = add_matmul(start, a, b)
    assert added is not start, "which somebody may have kept"
    assert torch.equal(added, out)
    truth = start.double() + exact(a, b)
    assert ((out.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-4).all()


@pytest.mark.parametrize(("I", "J", "L"), [(2048, 64, 4096), (16, 2048, 4096)])
def test_temporaries_stay_small(I: int, J: int, L: int, blocked: list[torch.dtype]) -> None:
    """In float32 the first product would take 32 MiB besides its result, the second's right operand as much."""
    a, b = torch.ones(I, J, dtype=torch.bfloat16), torch.ones(J, L, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = matmul(a, b)
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    assert peak <= result.nbytes + ((8 + 4 + 4 + 1) << 20)


def test_empty_dimensions(blocked: list[torch.dtype]) -> None:
    half = torch.bfloat16
    nothing = matmul(torch.ones(3, 0, dtype=half), torch.ones(0, 4, dtype=half))
    assert torch.equal(nothing, torch.zeros(3, 4, dtype=half))
    assert matmul(torch.ones(0, 3, dtype=half), torch.ones(3, 4, dtype=half)).shape == (0, 4)
    assert matmul(torch.ones(2, 3, dtype=half), torch.ones(3, 0, dtype=half)).shape == (2, 0)


def test_only_slow_dtypes_go_through_blocks(blocked: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(3, 4, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        assert torch.equal(matmul(a, b), a @ b)
    assert not blocked
    monkeypatch.setattr(module, "slow_on_cpu", lambda dtype: False)
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    assert torch.equal(matmul(a, b), a @ b)
    assert matmul(a, b, torch.float32).dtype == torch.float32
    assert not blocked


def test_slow_on_cpu_asks_torch() -> None:
    assert not module.slow_on_cpu(torch.float32)
    assert not module.slow_on_cpu(torch.float64)
    assert module.slow_on_cpu(torch.bfloat16) is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert module.slow_on_cpu(torch.float16) is not torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize("columns", [1, 8, 9])
@pytest.mark.parametrize("transposed", [False, True])
def test_narrow_results_are_rounded_once_and_contiguous(columns: int, transposed: bool) -> None:
    """Up to 8 columns the product is taken transposed."""
    a, b = torch.randn(30, 70), torch.randn(70, columns)
    a = a.t().contiguous().t() if transposed else a
    got = module.matmul(a, b)
    assert got.is_contiguous()
    torch.testing.assert_close(got, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    assert module.matmul(a, b, torch.float64).dtype == torch.float64
