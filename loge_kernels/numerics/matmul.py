"""Matrix products at full speed on every device.

A CPU without 16-bit matrix instructions multiplies float16 and bfloat16 matrices in scalar loops (bfloat16 `a @ b` on
an AVX2-only AMD Milan: 1.3 GFLOP/s, against 140 in float32). There the product is taken in float32, block by block, so
that the temporaries stay at a few MiB, and rounded once. A narrow result, such as an adapter's of rank 8, is taken
transposed: row by row MKL needs 2 to 6 times as long for it (AMD Milan, float32, up to 8 columns; from 16 on it does
not). Everywhere else it is torch's own.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Float32 elements held at a time: 8 MiB of the operand that stays (each repeat of the other costs a conversion), 4 MiB
# of the one that streams past it and as much of the result.
_RESIDENT = 1 << 21
_STREAMED = 1 << 20
_NARROW = 8  # columns


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
        return _blocked(a, b, torch.empty(a.shape[0], b.shape[1], dtype=dtype), add=False)
    if a.device.type == "cpu" and b.shape[1] <= _NARROW and b.stride(1) == 1 and a.dtype == torch.float32:
        return (b.t() @ a.t()).t().contiguous().to(dtype)
    if dtype == a.dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`out + a @ b`, [I, L] + [I, J] @ [J, L]; all three share one dtype. `out`, a fresh result of the caller's, is
    used up: it is written in place where nobody can have kept it."""
    if a.device.type == "cpu" and slow_on_cpu(a.dtype):
        return _blocked(a, b, out.clone() if _is_seen() else out, add=True)
    return torch.addmm(out, a, b) if _is_seen() else out.addmm_(a, b)


def add(out: Tensor, other: Tensor) -> Tensor:
    """`out + other` in out's dtype; `out`, a fresh result of the caller's, is used up, as by `add_matmul`."""
    return (out + other).to(out.dtype) if _is_seen() else out.add_(other)


def _is_seen() -> bool:
    """Whether a dispatch mode sees every operation and may keep its result, as a selective activation checkpoint."""
    return torch._C._len_torch_dispatch_stack() > 0


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, [I, J] @ [J, L] -> [I, L] in float32, of operands in any narrower dtype, taken in float32."""
    return _blocked(a, b, torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device), add=False)


def _blocked(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    rows, inner = a.shape
    columns = b.shape[1]
    column_step = max(1, min(columns, _RESIDENT // max(inner, 1)))
    row_step = max(1, _STREAMED // max(inner, column_step, 1))
    for column in range(0, columns, column_step):
        resident = b[:, column : column + column_step].float()
        for row in range(0, rows, row_step):
            block = a[row : row + row_step].float() @ resident
            target = out[row : row + row_step, column : column + column_step]
            (target.add_ if add else target.copy_)(block)
            del block
        del resident  # or it would still be there while its successor is made
    return out
