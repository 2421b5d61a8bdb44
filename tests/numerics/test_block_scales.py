"""Products in 8 bits with a scale for every block, against the rule written out and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loge_kernels.check.accuracy import judge
from loge_kernels.numerics import block_scales, eight_bit

NAMED = pytest.mark.parametrize("name", ["float8", "int8"])
SHAPES = pytest.mark.parametrize("shape", [(5, 128, 256), (33, 300, 200), (1, 1, 1), (7, 130, 129)])


def rounded(matrix: Tensor, name: str, rows: int) -> Tensor:
    """`matrix`, each block of `rows` x 128 rounded to 8 bits on its own scale, in float64."""
    out = torch.empty(matrix.shape, dtype=torch.float64)
    share = 1 / (448.0 if name == "float8" else 127.0)
    for row in range(0, matrix.shape[0], rows):
        for column in range(0, matrix.shape[1], 128):
            part = (slice(row, row + rows), slice(column, column + 128))
            block = matrix[part].float()
            scale = (block.abs().max() * share).clamp_min(1e-37)
            q = block / scale
            q = q.to(torch.float8_e4m3fn) if name == "float8" else q.round()
            out[part] = q.double() * scale.double()
    return out


@NAMED
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_serves_both_products(shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    M, N, K = shape
    weight = (torch.randn(N, K) * torch.logspace(-2, 1, K)).to(dtype)
    q, scale = block_scales.quantize_weight(weight, eight_bit.DTYPES[name])
    assert scale.shape == (-(-N // 128), -(-K // 128))
    assert q.stride() == (1, N) or 1 in q.shape
    W = rounded(weight, name, 128)
    for operand, copy, copy_scale, other in (
        (torch.randn(M, N).to(dtype), q, scale, W),
        (torch.randn(M, K).to(dtype), q.t(), scale.t(), W.t()),
    ):
        rows = rounded(operand, name, 1)
        got = block_scales.multiply(operand, copy, copy_scale)
        assert got.dtype == dtype
        assert judge(got, (rows.float() @ other.float()).to(dtype), rows @ other).passed


@NAMED
def test_strides_and_no_rows(name: str) -> None:
    weight = torch.randn(160, 140)
    copy = block_scales.quantize_weight(weight, eight_bit.DTYPES[name])
    dy = torch.randn(18, 320)
    assert torch.equal(block_scales.multiply(dy[::2, ::2], *copy), block_scales.multiply(dy[::2, ::2].clone(), *copy))
    assert block_scales.multiply(dy[:0, :160], *copy).shape == (0, 140)
    assert not block_scales.multiply(torch.zeros(3, 160), *copy).any()
