"""Matrix products at full speed on every device.

A CPU without 16-bit matrix instructions multiplies float16 and bfloat16 matrices in scalar loops (bfloat16 `a @ b` on
an AVX2-only AMD Milan: 1.3 GFLOP/s, against 140 in float32). There the product is taken in float32, block by block, so
that the temporaries stay at a few MiB, and rounded once. Everywhere else it is torch's own.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Elements of an operand converted to float32 at a time: 8 MiB of the one that streams, 16 MiB of the one that stays.
_STREAMED = 1 << 21
_RESIDENT = 1 << 22


@cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has no matrix instructions for `dtype`."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`a @ b`, [I, J] @ [J, L] -> [I, L] in `dtype` (default: a's), accumulated in float32 at least.

    `a` and `b` share one dtype and have any strides.
    """
    dtype = dtype or a.dtype
    if a.device.type == "cpu" and slow_on_cpu(a.dtype):
        return _blocked(a, b, dtype)
    if dtype == a.dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _blocked(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    rows, inner = a.shape
    columns = b.shape[1]
    out = torch.empty(rows, columns, dtype=dtype)
    if inner == 0:
        return out.zero_()
    if rows * inner + columns * inner <= _STREAMED:
        return out.copy_(a.float() @ b.float())
    row_step = max(1, _STREAMED // inner)
    column_step = max(1, _RESIDENT // inner)
    for column in range(0, columns, column_step):
        resident = b[:, column : column + column_step].float()
        for row in range(0, rows, row_step):
            out[row : row + row_step, column : column + column_step] = a[row : row + row_step].float() @ resident
    return out
