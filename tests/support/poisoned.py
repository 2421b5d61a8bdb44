"""Operands and buffers of kernels between NaNs and guard bands, and the rule that their results are held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loge_kernels.backend.problem import BackwardProblem

BAND, POISON = 96.0, -99  # values that 8 bits have too; what is not int8 is poisoned with NaN
GUARD = 64  # elements around every buffer; keeps 16-byte alignment


def guarded(t: Any) -> Any:
    """A copy of `t` in the middle of NaNs: a read past its ends shows in the result. What is no such tensor stays."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t
    buffer = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype)
    inner = buffer[GUARD : GUARD + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner


def strided(t: Tensor) -> Tensor:
    """The same values as every second row and a slice of the columns of a larger buffer of NaNs."""
    buffer = torch.full((2 * t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
    view = buffer[::2, 3 : 3 + t.shape[1]]
    view.copy_(t)
    return view


class Buffers:
    """`torch` as the launcher sees it: what it allocates lies between guard bands, and `empty` is full of NaNs."""

    def __init__(self) -> None:
        self.allocated: list[tuple[Tensor, Tensor]] = []
        self.filled: list[str] = []  # by which function

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _allocate(self, shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * GUARD,), BAND, dtype=dtype)
        inner = buffer[GUARD : GUARD + count]
        inner.fill_(POISON if dtype == torch.int8 and fill != 0.0 else fill)
        self.allocated.append((buffer, inner))
        return inner.view(shape)

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.filled.append("empty")
        return self._allocate(shape, float("nan"), dtype)

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.filled.append("zeros")
        return self._allocate(shape, 0.0, dtype)

    def check(self) -> None:
        assert self.allocated
        for buffer, inner in self.allocated:
            assert (buffer[:GUARD] == BAND).all()
            assert (buffer[GUARD + inner.numel() :] == BAND).all()


@contextmanager
def guard_bands(launcher: str = "launch") -> Iterator[None]:
    """Around everything that a launcher of `triton_kernels` allocates in the block; looked at when it ends."""
    buffers = Buffers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"loge_kernels.triton_kernels.{launcher}.torch", buffers)
        yield
    buffers.check()


def in_double(value: Any) -> Any:
    """Of a tensor, or of every tensor of a problem."""
    if isinstance(value, BackwardProblem):
        return replace(value, **{f.name: in_double(getattr(value, f.name)) for f in fields(value)})
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_close(name: str, computed: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The house rule: at most twice the error of plain PyTorch at the same precision, plus a tiny absolute term."""
    assert computed.dtype == plain.dtype, name
    assert computed.shape == exact.shape, name
    error, allowed = (torch.linalg.vector_norm(t.double() - exact) for t in (computed, plain))
    assert error <= 2 * allowed + 1e-6 * torch.linalg.vector_norm(exact), f"{name}: {error} against {allowed}"
