"""Float8 sums as Hopper's tensor cores take them with use_fast_accum, emulated on a CPU: does learning notice?

Published measurements find that these cores add products of float8 into an accumulator that keeps 13 bits after the
leading one, cut off and not rounded, 32 terms an instruction (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Here it
keeps 10: eight times as coarse, which also covers what is not emulated, the bits that each product loses when it is
aligned with the largest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from loge_kernels.numerics import eight_bit

BITS = 10
TERMS = 32


def fast_accumulated(a: Tensor, b: Tensor, bits: int = BITS) -> Tensor:
    """`a @ b`, [I, J] @ [J, L] -> [I, L] in float32, whose sum keeps `bits` bits after the leading one."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    kept = -(1 << (23 - bits))
    for start in range(0, a.shape[1], TERMS):
        part = slice(start, start + TERMS)
        total.addmm_(a[:, part].float(), b[part].float())
        total.view(torch.int32).bitwise_and_(kept)
    return total


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, the CPU's float8 products are taken so. Not for several threads at a time."""
    exact = eight_bit.float32_matmul
    eight_bit.float32_matmul = fast_accumulated
    try:
        yield
    finally:
        eight_bit.float32_matmul = exact
