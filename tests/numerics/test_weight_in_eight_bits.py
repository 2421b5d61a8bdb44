"""A weight that is kept in 8 bits alone, with scales of its rows: both products, and the rotation of int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loge_kernels.backend import reference
from loge_kernels.check.accuracy import judge
from loge_kernels.numerics import eight_bit
from loge_kernels.numerics.rotation import block_of, rotate

NAMED = pytest.mark.parametrize("name", ["float8", "int8"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SHAPES = pytest.mark.parametrize("shape", [(5, 128, 256), (33, 300, 200), (1, 1, 1), (7, 130, 129), (0, 8, 64)])


def rounded(matrix: Tensor, name: str) -> Tensor:
    """`matrix` with each row rounded to 8 bits on its own scale, written out in float64."""
    scale = (matrix.float().abs().amax(1, keepdim=True) * (1 / (448.0 if name == "float8" else 127.0))).clamp_min(1e-37)
    q = matrix.float() / scale
    q = q.to(torch.float8_e4m3fn) if name == "float8" else q.round()
    return q.double() * scale.double()


@NAMED
@FLOATS
@SHAPES
def test_one_copy_serves_both_products(shape: tuple[int, int, int], dtype: torch.dtype, name: str) -> None:
    M, N, K = shape
    weight = (torch.randn(N, K) * torch.logspace(-2, 1, K) * torch.logspace(1, -1, N)[:, None]).to(dtype)
    q, scale = eight_bit.quantize_weight(weight, eight_bit.DTYPES[name])
    block = block_of(q.dtype, K)
    assert q.is_contiguous()
    assert scale.shape == (N, 1)
    W = rounded(rotate(weight, block), name)
    stands_for = eight_bit.dequantize(q, scale, torch.float32)
    assert torch.equal(stands_for, W.float()) or block > 1
    torch.testing.assert_close(stands_for, rotate(W, block).float(), rtol=1e-4, atol=1e-4)

    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    bits, x_scale = reference.quantize(x, q.dtype)
    y = eight_bit.multiply_quantized(bits, x_scale, q.t(), scale.flatten(), dtype)
    X = bits.double() * x_scale.double()
    assert y.dtype == dtype
    assert judge(y, (X.float() @ W.float().t()).to(dtype), X @ W.t()).passed

    folded = rounded(dy.float() * scale.t(), name)
    dx = eight_bit.multiply(dy, q, None, scale)
    assert dx.dtype == dtype
    assert judge(dx, (folded.float() @ q.float()).to(dtype), folded @ q.double()).passed


@NAMED
def test_near_the_exact_products(name: str) -> None:
    """With rows, columns and single elements far larger than the rest."""
    torch.manual_seed(0)
    weight, x, dy = torch.randn(256, 192) * 0.05, torch.randn(64, 192), torch.randn(64, 256)
    weight[3] *= 30
    x[:, 7] *= 30
    dy[5] *= 100
    q, scale = eight_bit.quantize_weight(weight, eight_bit.DTYPES[name])
    y = eight_bit.multiply_quantized(*reference.quantize(x, q.dtype), q.t(), scale.flatten(), torch.float32)
    dx = rotate(eight_bit.multiply(dy, q, None, scale), block_of(q.dtype, 192))
    for got, exact in ((y, x @ weight.t()), (dx, dy @ weight)):
        assert (got - exact).norm() < 0.045 * exact.norm()


def test_rotation_spreads_an_outlier() -> None:
    """What int8 loses where one column of x is a hundred times the others: a fifth."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    x[:, 100] *= 100
    weight[:, 100] /= 100  # as trained models have it: the product is not all of that column's
    exact = x @ weight.t()

    def error(turn: bool) -> float:
        a, b = (rotate(m, 64) if turn else m for m in (x, weight))
        pairs = [eight_bit.quantize_rows(m, torch.int8) for m in (a, b)]
        a, b = (q.float() * scale for q, scale in pairs)
        return float((a @ b.t() - exact).norm() / exact.norm())

    assert error(True) < error(False) / 4


@pytest.mark.parametrize("columns", [1, 6, 40, 64, 576, 896])
def test_rotation_is_its_own_inverse_and_keeps_norms(columns: int) -> None:
    block = block_of(torch.int8, columns)
    assert columns % block == 0
    assert block in (1, 2, 8, 64)
    assert block_of(torch.float8_e4m3fn, columns) == 1
    x = torch.randn(3, columns, dtype=torch.float64)
    turned = rotate(x, block)
    torch.testing.assert_close(rotate(turned, block), x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))


@NAMED
def test_strides_and_slabs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dy = torch.randn(160, 128), torch.randn(18, 320)
    q, scale = eight_bit.quantize_weight(weight, eight_bit.DTYPES[name])
    whole = eight_bit.multiply(dy[::2, ::2].clone(), q, None, scale)
    assert torch.equal(eight_bit.multiply(dy[::2, ::2], q, None, scale), whole)
    monkeypatch.setattr(eight_bit, "_SLAB", 320)
    torch.testing.assert_close(eight_bit.multiply(dy[::2, ::2], q, None, scale), whole)
    again, again_scale = eight_bit.quantize_weight(weight.t().contiguous().t(), q.dtype)
    torch.testing.assert_close(again_scale, scale)
    assert (again.float() - q.float()).abs().max() <= (1 if name == "int8" else 0)


@pytest.mark.parametrize("name", ["float8", "int8"])
@pytest.mark.parametrize("M", [0, 1, 16, 40])
def test_the_gpus_composition(name: str, M: int) -> None:
    """torch._scaled_mm and torch._int_mm take the same operands on a CPU."""
    weight, x, dy = torch.randn(48, 64).bfloat16(), torch.randn(M, 64).bfloat16(), torch.randn(M, 48).bfloat16()
    q, scale = eight_bit.quantize_weight(weight, eight_bit.DTYPES[name])
    pairs = [
        (reference.quantize(x, q.dtype), q.t(), scale.flatten()),
        (eight_bit.quantize_rows(dy.float() * scale.t(), q.dtype), q, None),
    ]
    for (bits, rows), operand, columns in pairs:
        exact = (bits.double() * rows.double()) @ operand.double()
        exact = exact if columns is None else exact * columns
        got = eight_bit._by_cublas(bits, rows, operand, columns, torch.bfloat16)
        assert judge(got, exact.bfloat16(), exact).passed
