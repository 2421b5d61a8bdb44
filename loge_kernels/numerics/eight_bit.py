"""Products of dY with both operands in 8 bits, at half their cost: the dense one, dX = dY · W, where the frozen path is
exact, and the two of the factors, T = dY · left and dX = T · right, where it is low-rank.

    q(W)  [N, K] in 8 bits, scale_W [K]:   column k of W divided by max|W[:, k]| / limit, rounded once, kept
    q(dY) [M, N] in 8 bits, scale_Y [M]:   row m of dY likewise, at each call
    dX[m, k] = scale_Y[m] · scale_W[k] · Σ_n q(dY)[m, n] q(W)[n, k]

A weight that is kept in 8 bits alone has a scale for each row instead, for its forward, which sums over K; in dX those
scales go to dY: q(W) [N, K], scale_W [N], dX[m, k] = scale_Y[m] · Σ_n q(dY · scale_W)[m, n] q(W)[n, k].

The sum is taken in float32 (float8) or int32 (int8), scaled in float32 and rounded once to dY's dtype. "float8" is
float8_e4m3fn with limit 448: 4 significant bits at any magnitude; "int8" has limit 127: finer for a row or column
without outliers. Zero rows stay zero, NaN and inf come through. On a GPU cuBLAS multiplies, and for 16-bit dY Hopper's
tensor cores keep 14 bits of a sum of float8 (`FAST_ACCUMULATION`); elsewhere PyTorch does, with the same rounding. For
factors, left and right stand in the place of W, and T, in dY's dtype, in that of dY.

Source: symmetric row-wise quantisation as in LLM.int8(), Dettmers et al., arXiv 2208.07339, section 2; float8 formats,
Micikevicius et al., arXiv 2209.05433.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .matmul import float32_matmul
from .rotation import block_of, rotate
from .version import WeightVersion

logger = logging.getLogger("loge_kernels")

DTYPES = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
_LIMIT = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_TINY = torch.finfo(torch.float32).tiny
_SLAB = 1 << 22  # elements of dY or dX in float32 at a time on a CPU: 16 MiB
# Sums of float8 in the tensor cores' own accumulator, which keeps fewer bits than float32 and is up to 1.2 times as
# fast. Learning does not notice it (docs/results.md).
FAST_ACCUMULATION = True
_TILE = 16  # cuBLAS takes 8-bit operands whose N and K are multiples of this
_INT_ROWS = 32  # fewer rows than this are padded: torch._int_mm on CUDA wants more than 16
_announced: set[str] = set()


class EightBitWeight:
    """An 8-bit copy of a frozen weight or factor, made at its first use and anew whenever that has changed.

    `dtype` is "float8" or "int8"; `tensor` [N, K] in it, stored column by column, and `scale` float32 [K] are None
    until `current` was called. The copy is in no state dict and no pickle; a move to another device drops it, and the
    next use makes it there. Raises ValueError for another dtype, which it calls `argument`.
    """

    known = tuple(DTYPES)
    gathered_apart = False  # by FSDP, for the backwards alone that do not have the weight

    def __init__(self, dtype: str, argument: str = "exact_dtype") -> None:
        if not isinstance(dtype, str) or dtype not in self.known:
            known = ", ".join(map(repr, self.known))
            raise ValueError(f"{argument}={dtype!r} is unknown; choose one of {known}, or None")
        self.dtype = dtype
        self.invalidate()

    def invalidate(self) -> None:
        """Drop the copy: for who changes the weight in a way that torch does not count (through `.data`)."""
        self.tensor: Tensor | None = None
        self.scale: Tensor | None = None
        self._made_of = WeightVersion()

    def made_in_backward(self, weight: Tensor) -> bool:
        """Whether the backward of the forward under way makes it of the weight, which it has."""
        return False

    def moved(self) -> None:
        """The weight goes to another device or dtype, where the next use makes the copy anew."""
        self.invalidate()

    def current(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`tensor` [N, K] and `scale` [K] of `weight` [N, K] as it is now."""
        if self.tensor is None or self.scale is None or self._is_stale(weight):
            if torch.compiler.is_compiling():
                # Part of the graph: what it computes cannot be kept.
                return self._quantize(weight.detach())
            with torch.no_grad(), _disable_current_modes():  # a selective checkpoint would miss it in the recomputation
                self.tensor, self.scale = self._quantize(weight.detach())
            self._made_of.bind(weight)
        return self.tensor, self.scale

    def operands(self, weight: Tensor) -> dict[str, Any]:
        """The same by the names of the op's operands (`backend.problem`)."""
        tensor, scale = self.current(weight)
        return {"dense": as_bits(tensor), "dense_scale": scale}

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_columns(weight, DTYPES[self.dtype])

    def _is_stale(self, weight: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return weight.requires_grad  # versions cannot be read; a frozen weight is taken as unchanged
        return weight.requires_grad or self._made_of.changed(weight)  # fused optimizers count no version

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tensor": None, "scale": None}


def why_not(dtype: str, device: torch.device, N: int, K: int) -> str | None:
    """Why products with a weight [N, K] in `dtype`, a key of `DTYPES`, cannot run on `device`, or None."""
    if N == 0 or K == 0:
        return "the weight is empty"
    if device.type == "mps":
        return "MPS has no products in 8 bits"
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "only CUDA GPUs are supported, not ROCm"
    if dtype == "float8" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        return f"float8 needs compute capability 8.9, this GPU has {major}.{minor}: use 'int8'"
    if N % _TILE or K % _TILE:
        return f"N and K must be multiples of {_TILE} on a GPU, and the weight is [{N}, {K}]"
    return None


def refuse_float64(argument: str, name: str, dtype: torch.dtype, whose: str = "x") -> None:
    """Raise TypeError for 8 bits or 4, asked for as `argument`, over float64."""
    if dtype == torch.float64:
        bits = 4 if name.endswith("fp4") else 8
        raise TypeError(
            f"{argument}={name!r} with {whose} in torch.float64: {bits} bits are for float32, float16 and bfloat16, so "
            "give None"
        )


def announce(argument: str, dtype: str, reason: str, instead: torch.dtype) -> None:
    """Say, once for each reason, that what `argument`, exact_dtype or low_rank_dtype, is for runs in `instead`."""
    products = argument.removesuffix("_dtype").replace("_", "-")
    message = f"{argument}={dtype!r} cannot run here: {reason}; the {products} products run in {instead}"
    if message not in _announced:
        _announced.add(message)
        logger.warning(message)


def as_bits(tensor: Tensor) -> Tensor:
    """float8 as uint8, in which it crosses an operator's boundary: torch's own operator checks cannot compare it."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def from_bits(tensor: Tensor) -> Tensor:
    """The reverse of `as_bits`; other tensors as they are."""
    return tensor.view(torch.float8_e4m3fn) if tensor.dtype == torch.uint8 else tensor


def quantize_rows(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`matrix` [I, J] as q [I, J] in `dtype`, contiguous, and its row scales, float32 [I, 1]: matrix ≈ q · scale."""
    if matrix.is_cuda:
        amax = torch.linalg.vector_norm(matrix, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    else:
        amax = matrix.abs().amax(dim=1, keepdim=True)  # on a CPU twenty times faster than the norm
    scale = scale_of(amax, dtype)
    return scaled(matrix, scale, dtype), scale


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in float32 of rows with these largest magnitudes, for q in `dtype`. The floor keeps a zero row
    from 0 / 0; below it a row is flushed to zero."""
    return (amax.float() * (1 / _LIMIT[dtype])).clamp_min_(_TINY)  # a quotient would have other bits on a GPU


def scaled(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix / scale`, which broadcasts, in `dtype`, rounded once from float32, ties to even; contiguous."""
    if dtype == torch.int8:
        return torch.div(matrix, scale).round_().to(dtype, memory_format=torch.contiguous_format)
    q = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    return torch.div(matrix, scale, out=q)


def quantize_columns(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] as q [N, K] in `dtype`, stored column by column, and its column scales, float32 [K]."""
    q, scale = quantize_rows(weight.t(), dtype)
    return q.t(), scale.flatten()


@torch.no_grad()
def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [N, K], in int8 rotated (`rotation`), as q [N, K] in `dtype`, contiguous, and its row scales, float32
    [N, 1]; a slab of rows at a time, for in float32 it would be four times as large."""
    N, K = weight.shape
    q = torch.empty(N, K, dtype=dtype, device=weight.device)
    scale = torch.empty(N, 1, dtype=torch.float32, device=weight.device)
    step = max(1, _SLAB // max(1, K))
    for start in range(0, N, step):
        rows = slice(start, start + step)
        q[rows], scale[rows] = quantize_rows(rotate(weight[rows], block_of(dtype, K)), dtype)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_weight` rounded, [N, K] in `dtype`."""
    return rotate(q.float() * scale, block_of(q.dtype, q.shape[1])).to(dtype)


def multiply(dy: Tensor, tensor: Tensor, scale: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """dX [M, K] in dY's dtype from dY [M, N], float32 or 16 bits, with any strides, and an 8-bit weight [N, K]: with
    column scales [K], as `quantize_columns` gives them, or with row scales `rows` [N, 1], as `quantize_weight` does.

    The sum over N cannot leave the scales of rows to its end: dY is multiplied by them before it is quantised.
    """
    if dy.is_cuda:
        return multiply_quantized(*quantize_rows(_folded(dy, rows), tensor.dtype), tensor, scale, dy.dtype)
    return _slab_by_slab(lambda part: quantize_rows(_folded(dy[part], rows), tensor.dtype), dy, tensor, scale)


def multiply_quantized(
    q: Tensor, row_scale: Tensor, tensor: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dX [M, K] in `dtype` from dY as `quantize_rows` gives it and a weight as in `multiply`; on a GPU by cuBLAS."""
    if q.is_cuda:
        return _by_cublas(q, row_scale, tensor, scale, dtype)
    return _slab_by_slab(lambda part: (q[part], row_scale[part]), row_scale.to(dtype), tensor, scale)


def _by_cublas(q: Tensor, row_scale: Tensor, tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    M, K = q.shape[0], tensor.shape[1]
    if M == 0:
        return q.new_empty(0, K, dtype=dtype)
    if tensor.stride(0) != 1:  # cuBLAS wants it stored column by column
        tensor = tensor.t().contiguous().t()
    if tensor.dtype == torch.int8:
        padded = torch.nn.functional.pad(q, (0, 0, 0, _INT_ROWS - M)) if M < _INT_ROWS else q
        sums = torch._int_mm(padded, tensor)[:M]
    elif dtype == torch.bfloat16:
        columns = torch.ones(1, K, device=q.device) if scale is None else scale[None]
        scales = {"scale_a": row_scale, "scale_b": columns}
        return torch._scaled_mm(q, tensor, **scales, out_dtype=dtype, use_fast_accum=FAST_ACCUMULATION)
    else:  # row-wise scaling gives bfloat16 alone on some GPUs
        one = torch.ones((), device=q.device)
        scales = {"scale_a": one, "scale_b": one}
        fast = FAST_ACCUMULATION and dtype != torch.float32
        sums = torch._scaled_mm(q, tensor, **scales, out_dtype=torch.float32, use_fast_accum=fast)
    out = torch.empty(M, K, dtype=dtype, device=q.device)
    return torch.mul(sums, row_scale, out=out) if scale is None else torch.mul(sums * row_scale, scale, out=out)


def _folded(dy: Tensor, rows: Tensor | None) -> Tensor:
    return dy if rows is None else dy.float() * rows.t()


def _slab_by_slab(
    quantized: Callable[[slice], tuple[Tensor, Tensor]], like: Tensor, tensor: Tensor, scale: Tensor | None
) -> Tensor:
    """The product on a CPU, as many rows as `like` and in its dtype, from a slab of rows in 8 bits at a time."""
    # N = 1: torch._int_mm (2.13) misreads the strides (1, 1) of a single stored row.
    integers = tensor.dtype == torch.int8 and tensor.shape[0] > 1 and cpu_multiplies_int8()
    operand, unit = (tensor, 1.0) if integers else _halves(tensor)
    out = torch.empty(like.shape[0], tensor.shape[1], dtype=like.dtype, device=tensor.device)
    step = max(1, _SLAB // max(tensor.shape))
    for start in range(0, like.shape[0], step):
        part = slice(start, start + step)
        q, row_scale = quantized(part)
        if integers:
            sums = torch._int_mm(q, operand) * row_scale
        else:
            rows, rows_unit = _halves(q)
            sums = float32_matmul(rows, operand).mul_(unit * rows_unit).mul_(row_scale)
        out[part] = sums if scale is None else sums.mul_(scale)
    return out


def _halves(q: Tensor) -> tuple[Tensor, float]:
    """8 bits as 16 and what these are to be multiplied by: exact. torch (2.13) converts float8 number by number, ten
    times as slowly as float16, whose exponent lies 8 lower over the same bits, for all but NaN."""
    if q.dtype == torch.int8 or type(q) is not Tensor:  # which is traced, and has no values to look at
        return q.to(torch.bfloat16), 1.0  # 8 significant bits
    bits = q.view(torch.int8)
    if q.numel() and (bits & 127).amax() == 127:  # NaN, as which all bits but the sign are 1
        return q.to(torch.bfloat16), 1.0
    wide = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # of two signs one
    return wide.view(torch.float16), 256.0


@functools.cache
def cpu_multiplies_int8() -> bool:
    """Whether torch._int_mm is exact and fast on this CPU. Its 16-bit partial sums saturate without VNNI, and where
    ONEDNN_MAX_CPU_ISA keeps oneDNN from using it."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return False
    with _disable_current_modes():
        largest = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
        return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())
