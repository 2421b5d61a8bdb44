"""A rotation of columns, 64 at a time, by a Hadamard matrix: it spreads an outlier over its block, so that int8, whose
steps are all of one size, loses little of the other columns. float8's steps grow with the value; it needs none.

    x Wᵀ = (x H) (W H)ᵀ        H [S, S] of ±1 / √S on each block of S columns: symmetric, and its own inverse

S is the largest power of two up to 64 that divides the number of columns.

Source: QuaRot, Ashkboos et al., arXiv 2404.00456.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_LARGEST = 64  # which a tile of columns of our kernels holds whole


def block_of(dtype: torch.dtype, columns: int) -> int:
    """S for a weight in `dtype` with so many columns; 1: nothing is rotated."""
    return math.gcd(columns, _LARGEST) if dtype == torch.int8 else 1


def rotate(matrix: Tensor, block: int) -> Tensor:
    """matrix · H [M, K], summed in float32 at least; the same once more undoes it. With block 1 it is `matrix`."""
    if block == 1:
        return matrix
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    blocks = wide.reshape(*wide.shape[:-1], wide.shape[-1] // block, block)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(wide) is not Tensor
    signs = _sylvester if traced else _kept  # a graph, and fake tensors, have no values to keep
    return (blocks @ signs(block, wide.dtype, wide.device)).mul_(block**-0.5).flatten(-2)


@functools.lru_cache(maxsize=32)
def _kept(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with _disable_current_modes(), torch.inference_mode(False):  # what it is under these is of no use after them
        return _sylvester(block, dtype, device)


def _sylvester(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix, without 1 / √S."""
    index = torch.arange(block, device=device)
    shared = index[:, None] & index[None, :]
    for shift in (4, 2, 1):
        shared = shared ^ (shared >> shift)
    return (1 - 2 * (shared & 1)).to(dtype)
