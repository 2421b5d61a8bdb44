"""The cases that every backend is held against: shapes, features, and the operands of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import machine
from ..numerics import eight_bit
from ..numerics.dropout import draw_seed, keep_mask

Mode = Literal["low-rank", "exact", "exact rows", "residual", "float8", "int8", "low-rank float8", "low-rank int8"]

DTYPES = {name: dtype for name, dtype in machine.DTYPES.items() if name != "float64"}  # that is the truth's
GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B")
SCALING = 0.7
DROPOUT = 0.25
EXACT_ROWS = 0.3
LOW_RANK_DTYPE = {f"low-rank {name}": name for name in eight_bit.DTYPES}
WITH_FACTORS = ("low-rank", "exact rows", "residual", *LOW_RANK_DTYPE)
# (M, N, K, R, P): empty, one row, ragged everything, N < K and N > K, more than one tile of any kernel; and, for
# kernels that want rows on 16-byte boundaries, full pipelines and slabs that blocks share.
_SHAPES = (
    (0, 24, 40, 16, 8),
    (1, 40, 24, 16, 8),
    (7, 33, 21, 5, 3),
    (65, 96, 80, 32, 8),
    (130, 257, 130, 67, 17),
    (150, 1032, 776, 136, 24),
)
_SUBSET_SHAPE = (19, 48, 40, 16, 8)
_LARGE_RANK = (150, 520, 392, 328, 24)  # beyond what one launch takes: several tiles of T, in memory


@dataclass(frozen=True, slots=True)
class Case:
    """One call of the op: its shape, features, and the arguments that require a gradient."""

    M: int
    N: int
    K: int
    R: int
    P: int  # 0: no adapter
    mode: Mode
    bias: bool
    dropout: bool
    contiguous: bool
    wanted: tuple[str, ...]


def describe(case: Case) -> str:
    """A case in a few words."""
    features: list[str] = [case.mode]
    features += ["bias"] if case.bias else []
    features += ["dropout"] if case.dropout else []
    features += [] if case.contiguous else ["strided"]
    sizes = f"M={case.M} N={case.N} K={case.K} R={case.R} P={case.P}"
    return f"{sizes} {', '.join(features)}, gradients of {'+'.join(case.wanted)}"


def grid() -> Iterator[Case]:
    """Every shape with every feature, all gradients; on one shape every subset of the gradients; and a large rank."""
    modes: tuple[Mode, ...] = ("low-rank", "exact", "exact rows")
    more: tuple[Mode, ...] = ("residual", "float8", "int8", "low-rank float8", "low-rank int8")
    flags = (False, True)
    for shape, mode, adapter, bias, dropout, contiguous in itertools.product(
        _SHAPES, modes + more, flags, flags, flags, flags
    ):
        if dropout and not adapter:
            continue
        M, N, K, R, P = shape
        wanted = ("x", *(("bias",) if bias else ()), *(("lora_A", "lora_B") if adapter else ()))
        yield Case(M, N, K, R, P if adapter else 0, mode, bias, dropout, contiguous, wanted)
    M, N, K, R, P = _SUBSET_SHAPE
    for count in range(1, len(GRADIENTS) + 1):
        for wanted in itertools.combinations(GRADIENTS, count):
            for mode, dropout in itertools.product(modes, flags):
                yield Case(M, N, K, R, P, mode, True, dropout, True, wanted)
    M, N, K, R, P = _LARGE_RANK
    for adapter in flags:
        wanted = ("x", "lora_A", "lora_B") if adapter else ("x",)
        yield Case(M, N, K, R, P if adapter else 0, "low-rank", False, False, True, wanted)


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random operands of the case, the same on every device; strided ones are every second column and row."""
    generator = torch.Generator().manual_seed(seed_of(case))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    step = 1 if case.contiguous else 2
    M, N, K, R, P = case.M, case.N, case.K, case.R, case.P
    tensors = {
        "x": random(M * step, K * step)[::step, ::step],
        "dy": random(M * step, N * step)[::step, ::step],
        "weight": random(N, K, scale=K**-0.5),
        "left": random(N, R, scale=R**-0.5),
        "right": random(R, K, scale=K**-0.5),
    }
    if case.mode in LOW_RANK_DTYPE:
        # Signs, but for each row's of dY and each column's of left largest element, where the other has zeros: scales
        # are 1/64, and every sum is a small integer.
        largest = (448.0 if LOW_RANK_DTYPE[case.mode] == "float8" else 127.0) / 64.0
        for tensor, own, others in ((tensors["dy"].t(), 0, 1), (tensors["left"], 1, 0)):
            tensor.sign_()
            tensor[own], tensor[others] = largest, 0.0
    if case.mode == "residual":
        tensors["rows"] = torch.arange(0, N, 3, device=device)
        tensors["residual"] = random(len(tensors["rows"]), K, scale=K**-0.5)
    if case.bias:
        tensors["bias"] = random(N)
    if P:
        tensors["lora_A"] = random(P, K, scale=K**-0.5)
        tensors["lora_B"] = random(N, P)
    if case.dropout:
        torch.manual_seed(seed_of(case))
        tensors["keep"] = keep_mask(draw_seed(device), M, K, DROPOUT)
    return tensors


def seed_of(case: Case) -> int:
    """A seed that depends on the case's shape alone."""
    return ((case.M * 31 + case.N) * 31 + case.K) * 31 + case.P
