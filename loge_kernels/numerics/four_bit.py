"""The exact dX = dY · W with both operands in 4 bits, "nvfp4" or "mxfp4". Experimental: no GPU has run it.

    dX [M, K] = (dY H) · (Hᵀ W)        H: Hadamard matrices along N, on blocks of up to 64 (`rotation`)

A number is e2m1: 0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign; two are in a byte, the first in its low half. Blocks along
N, which the product sums over, share a scale:

    nvfp4   16 numbers, a scale in float8_e4m3fn, and for the tensor one in float32, max |tensor| / (6 · 448)
    mxfp4   32 numbers, a scale in float8_e8m0fnu: a power of two

W is rounded to the nearest number, ties to even, once. dY is rounded stochastically at each call, by torch's generator
of its device: up or down, in the mean to what it was, for nearest rounding loses the small numbers of a block in every
step alike. Its scales are rounded up: beyond 6 of them a number would be cut off, and the mean be another. Those of W
are rounded so that W keeps its size, for an error of it multiplies up from layer to layer: in nvfp4 to nearest, in
mxfp4 up (on the weights of SmolLM2-135M 0.4 % and 0.9 % too small; the other way 0.8 % too large and 3.6 % too small).
The end of N is padded with zeros. NaN or inf in dY makes all of dX NaN in nvfp4, and its row in mxfp4.

On a CPU the product is taken in float32 of what the numbers stand for. On a GPU cuBLAS takes it, and what quantises dY
is PyTorch's operations one by one: the whole is not fast before a kernel does that.

Source: "Pretraining Large Language Models with NVFP4", arXiv 2509.25149; OCP Microscaling Formats, version 1.0;
"Training LLMs with MXFP4", arXiv 2502.20586.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .eight_bit import EightBitWeight
from .matmul import float32_matmul
from .rotation import rotate


class Format(NamedTuple):
    block: int  # numbers that share a scale
    scale: torch.dtype
    smallest: float  # scale, of a block of zeros too: none is 0 / 0
    majors: tuple[int, ...]  # of the compute capabilities for which PyTorch has the product


FORMATS = {
    "nvfp4": Format(16, torch.float8_e4m3fn, 2.0**-9, (10, 12)),
    "mxfp4": Format(32, torch.float8_e8m0fnu, 2.0**-126, (10,)),
}
_LARGEST = 6.0
_LARGEST_SCALE = 448.0  # of nvfp4's blocks
_SMALLEST_WHOLE = 2.0**-116  # nvfp4's scale of a tensor: times that of a block, and 0.5, it is a normal float32
_ROTATED = 64
_MULTIPLE = 32  # to which N is padded: a block of either format, and 16 bytes, which cuBLAS wants of a row
_TILE = 16  # of K, for cuBLAS
_SLAB = 1 << 22  # elements in float32 at a time: 16 MiB
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LAYOUT = (128, 4)  # of scales, which cuBLAS reads in tiles of so many rows and blocks


class FourBitWeight(EightBitWeight):
    """The same in 4 bits: `tensor` is uint8 [N / 2, K], stored column by column, and `scale` the scales' bits, [K,
    N / block], on a GPU in cuBLAS's order; `whole` is the float32 scale of an nvfp4 tensor. N is a multiple of 32."""

    known = tuple(FORMATS)

    def invalidate(self) -> None:
        super().invalidate()
        self.whole: Tensor | None = None

    def made_in_backward(self, weight: Tensor) -> bool:
        # In a compiled graph, which could not keep it, it would be made in forward and held until backward.
        return torch.compiler.is_compiling() and (self.tensor is None or self._is_stale(weight))

    def operands(self, weight: Tensor) -> dict[str, Any]:
        tensor, scale = self.current(weight)
        return {"dense": tensor, "dense_scale": scale, "dense_whole": self.whole}

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        tensor, scale, self.whole = quantize(weight.t(), self.dtype)
        return tensor.t(), scale

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "whole": None}


def why_not(name: str, device: torch.device, N: int, K: int) -> str | None:
    """Why products with a weight [N, K] in `name`, a key of `FORMATS`, cannot run on `device`, or None."""
    if N == 0 or K == 0:
        return "the weight is empty"
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"there are no products in 4 bits on {device.type}"
    if torch.version.hip is not None:
        return "only CUDA GPUs are supported, not ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in FORMATS[name].majors:
        wanted = " or ".join(f"{number}.x" for number in FORMATS[name].majors)
        return f"{name} needs compute capability {wanted}, this GPU has {major}.{minor}"
    if K % _TILE:
        return f"K must be a multiple of {_TILE} on a GPU, and the weight is [{N}, {K}]"
    return None


class Quantized(NamedTuple):
    """A matrix [I, N] in 4 bits, blocked along N, which is padded."""

    packed: Tensor  # uint8 [I, N / 2]
    scale: Tensor  # uint8 [I, N / block], the bits of the blocks' scales; on a GPU flat, in cuBLAS's order
    whole: Tensor | None  # float32 [], of nvfp4

    @property
    def name(self) -> str:
        return "mxfp4" if self.whole is None else "nvfp4"


def quantize(matrix: Tensor, name: str, stochastic: bool = False) -> Quantized:
    """`matrix` [I, N], rotated along N and rounded to `name`, a key of `FORMATS`."""
    form = FORMATS[name]
    wide = rotate(matrix, math.gcd(matrix.shape[1], _ROTATED)).float()
    wide = F.pad(wide, (0, -wide.shape[1] % _MULTIPLE)).unflatten(1, (-1, form.block))
    largest = wide.abs().amax(2)
    scale, whole = largest * (1 / _LARGEST), None
    if name == "nvfp4":
        whole = (largest.amax() * (1 / (_LARGEST * _LARGEST_SCALE))).clamp_min_(_SMALLEST_WHOLE)
        scale = (scale / whole).clamp_max_(_LARGEST_SCALE)
    scale.clamp_min_(form.smallest)
    up = stochastic or name == "mxfp4"
    rounded = _rounded_up(scale, form.scale) if up else scale.to(form.scale)
    scale = rounded.float() if whole is None else rounded.float() * whole
    rows_in_all, width = wide.shape[0], wide.shape[1] * form.block
    packed = torch.empty(rows_in_all, width // 2, dtype=torch.uint8, device=matrix.device)
    step = max(1, _SLAB // width)
    for start in range(0, rows_in_all, step):
        rows = slice(start, start + step)
        codes = _codes(wide[rows] / scale[rows, :, None], stochastic).flatten(1)
        packed[rows] = codes[:, ::2] | codes[:, 1::2] << 4
    bits = rounded.view(torch.uint8)
    return Quantized(packed, in_cublas_order(bits) if bits.is_cuda else bits, whole)


def dequantize(q: Quantized) -> Tensor:
    """What `q`, on a CPU, stands for, without the factor `whole`: [I, N] in bfloat16, which holds it."""
    numbers = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.bfloat16)
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1)  # of each byte
    values = pairs.index_select(0, q.packed.flatten().int()).view(*q.scale.shape, -1)
    return (values * q.scale.view(FORMATS[q.name].scale).to(torch.bfloat16)[:, :, None]).flatten(1)


def multiply(dy: Tensor, tensor: Tensor, scale: Tensor, whole: Tensor | None) -> Tensor:
    """dX [M, K] in dY's dtype from dY [M, N], float32 or 16 bits, with any strides, and a weight as `FourBitWeight` has
    it. On a GPU mxfp4's is rounded to bfloat16 on the way: it comes in no other dtype."""
    if dy.shape[0] == 0:
        return dy.new_empty(0, tensor.shape[1])
    weight = Quantized(tensor.t(), scale, whole)
    q = quantize(dy, weight.name, stochastic=True)
    if dy.is_cuda:
        return _by_cublas(q, weight, dy.dtype)
    sums = float32_matmul(dequantize(q), dequantize(weight).t())
    if q.whole is not None and whole is not None:
        sums *= q.whole * whole
    return sums.to(dy.dtype)


def _by_cublas(q: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
    recipe, order, out = [F.ScalingType.BlockWise1x32], [F.SwizzleType.SWIZZLE_32_4_4], torch.bfloat16
    if q.whole is not None:
        recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        order, out = [*order, F.SwizzleType.NO_SWIZZLE], dtype
    (a, scale_a), (b, scale_b) = map(_as_cublas_takes_it, (q, weight))
    return F.scaled_mm(a, b.t(), scale_a, recipe, scale_b, recipe, order, order, output_dtype=out).to(dtype)


def _as_cublas_takes_it(q: Quantized) -> tuple[Tensor, list[Tensor]]:
    scale = q.scale.view(FORMATS[q.name].scale)
    return q.packed.view(torch.float4_e2m1fn_x2), [scale] if q.whole is None else [scale, q.whole]


def in_cublas_order(bits: Tensor) -> Tensor:
    """Scales [I, blocks], padded to whole tiles of 128 x 4, flat: tile by tile along a row of them, and in each tile
    rows 0, 32, 64 and 96, then 1, 33, 65 and 97, … (cuBLAS, "1D block scaling factors layout")."""
    rows, blocks = _LAYOUT
    padded = F.pad(bits, (0, -bits.shape[1] % blocks, 0, -bits.shape[0] % rows))
    tiles = padded.view(padded.shape[0] // rows, rows // 32, 32, padded.shape[1] // blocks, blocks)
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of an 8-bit `dtype` that are no smaller than `values`, which are positive or NaN."""
    near = values.to(dtype)
    return (near.view(torch.uint8) + (near.float() < values)).view(dtype)


def _codes(values: Tensor, stochastic: bool) -> Tensor:
    """Numbers up to 6 in e2m1, uint8: the sign, and an index of `_MAGNITUDES`."""
    size = values.abs().clamp_max_(_LARGEST)
    two, four = size >= 2.0, size >= 4.0  # from where numbers are 1 and 2 apart, and 0.5 before
    size *= torch.where(four, 0.5, torch.where(two, 1.0, 2.0))
    if stochastic:
        down = size.floor()
        size = down + (torch.rand_like(size) < size - down)
    else:
        size = size.round()
    code = size.to(torch.uint8) + 2 * two.to(torch.uint8) + 2 * four.to(torch.uint8)
    return code + 8 * (values < 0.0).to(torch.uint8) & 15  # 15: of NaN a conversion may make anything
