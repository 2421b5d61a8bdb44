"""Products in 8 bits with a scale for every block: 1 x 128 of dY, 128 x 128 of the weight.

    dX[m, k] = Σ_B scale_Y[B, m] · scale_W[B, ⌊k / 128⌋] · Σ_{n in B} q(dY)[m, n] q(W)[n, k]        B: 128 columns of dY

A block's largest magnitude sets its scale, as a row's does in `eight_bit`. Two things follow: one pass over dY
quantises it, since no scale waits for a row's end; and the same numbers of one copy of W serve the product over N and,
transposed, the one over K. The sum of a block is taken in float32 (float8) or int32 (int8), the sum of blocks in
float32, and rounded once.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .eight_bit import scale_of, scaled
from .matmul import float32_matmul

COLUMNS = 128


def quantize(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`matrix` [M, N] as q [M, N] in `dtype` and the scales of its rows' blocks, float32 [⌈N / 128⌉, M]."""
    M, N = matrix.shape
    blocks = F.pad(matrix, (0, -N % COLUMNS)).view(M, -(-N // COLUMNS), COLUMNS)
    scale = scale_of(blocks.abs().amax(dim=2), dtype)  # [M, blocks]
    return scaled(blocks, scale[:, :, None], dtype).flatten(1)[:, :N].contiguous(), scale.t().contiguous()


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] as q [N, K] in `dtype`, stored column by column, and its scales, float32
    [⌈N / 128⌉, ⌈K / 128⌉]."""
    N, K = weight.shape
    padded = F.pad(weight, (0, -K % COLUMNS, 0, -N % COLUMNS))
    blocks = padded.view(padded.shape[0] // COLUMNS, COLUMNS, -1, COLUMNS)
    scale = scale_of(blocks.abs().amax(dim=(1, 3)), dtype)
    q = scaled(blocks, scale[:, None, :, None], dtype).view_as(padded)[:N, :K]
    return q.t().contiguous().t(), scale


def multiply(dy: Tensor, tensor: Tensor, scale: Tensor) -> Tensor:
    """dX [M, K] in dY's dtype from dY [M, N], any strides, and what `quantize_weight` gave for a weight [N, K]; with
    `tensor.t()` and `scale.t()` the product with the weight's transpose, over K.

    On the CPU; a GPU has `triton_kernels`, or `torch.nn.functional.scaled_mm` with its recipes for these blocks.
    """
    q, row_scale = quantize(dy, tensor.dtype)
    (M, N), K = dy.shape, tensor.shape[1]
    columns = scale.repeat_interleave(COLUMNS, dim=1)[:, :K]  # [blocks, K]
    out = torch.zeros(M, K, dtype=torch.float32, device=dy.device)
    for block, start in enumerate(range(0, N, COLUMNS)):
        part = slice(start, start + COLUMNS)
        # Exact in bfloat16: it has 8 significant bits.
        sums = float32_matmul(q[:, part].to(torch.bfloat16), tensor[part].to(torch.bfloat16))
        out += sums.mul_(row_scale[block, :, None]).mul_(columns[block])
    return out.to(dy.dtype)
