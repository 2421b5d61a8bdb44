"""The exact kernels on a GPU: bfloat16, which the interpreter does not multiply, and float8's real rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from poisoned import assert_close, in_double
from surrogate import case, problem_of

from loge_kernels import triton_kernels as tk
from loge_kernels.backend import reference
from loge_kernels.backend import triton as triton_backend
from loge_kernels.backend.problem import BackwardProblem, Operands
from loge_kernels.check.accuracy import judge
from loge_kernels.numerics import eight_bit
from loge_kernels.numerics.eight_bit import as_bits
from loge_kernels.numerics.rotation import rotate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(1, 32, 48, 8), (65, 256, 160, 16), (300, 1040, 784, 64), (1030, 4096, 512, 16)]  # M, N, K, P
EIGHT_BITS = pytest.mark.parametrize("name", list(eight_bit.DTYPES))


def problem(M: int, N: int, K: int, P: int, name: str | None = None, **options: Any) -> BackwardProblem:
    """In bfloat16 on the GPU; `name`: the 8 bits of the product."""
    if triton_backend.why_not_here() is not None:
        pytest.skip(str(triton_backend.why_not_here()))
    c = case(M, N, K, None, P, dtype=torch.bfloat16)
    for field, value in vars(c).items():
        if isinstance(value, torch.Tensor):
            setattr(c, field, value.cuda())
    p = problem_of(c, ("need_dx", "need_dbias", "need_dA", "need_dB"), **options)
    if name is None:
        return p
    reason = eight_bit.why_not(name, p.dy.device, N, K)
    if reason is not None:
        pytest.skip(reason)
    dense, scale = eight_bit.quantize_columns(p.weight, eight_bit.DTYPES[name])
    return replace(p, dense=dense, dense_scale=scale)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", ["prepared", "fused"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_in_bfloat16(deterministic: bool, form: Any, sizes: tuple[int, ...]) -> None:
    p = problem(*sizes, deterministic=deterministic)
    computed, plain, exact = (
        triton_backend.exact_backward(p, form),
        reference.backward(p),
        reference.backward(in_double(p)),
    )
    for name in ("dx", "dA", "dB", "dbias"):
        assert_close(name, *(getattr(g, name) for g in (computed, plain, exact)))


@EIGHT_BITS
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", ["prepared", "fused"])
def test_in_eight_bits(form: Any, sizes: tuple[int, ...], name: str) -> None:
    p = problem(*sizes, name)
    q, scale = eight_bit.quantize_rows(p.dy, eight_bit.DTYPES[name])
    assert p.dense is not None
    frozen = (q.double() * scale) @ (p.dense.double() * p.dense_scale)
    exact = frozen + p.scaling * (p.dy.double() @ p.lora_B.double()) @ p.lora_A.double()
    computed = triton_backend.exact_backward(p, form)
    assert judge(computed.dx, exact.bfloat16(), exact).passed
    plain = reference.backward(p)
    double = reference.backward(in_double(replace(p, dense=None, dense_scale=None)))
    for gradient in ("dA", "dB"):
        assert_close(gradient, *(getattr(g, gradient) for g in (computed, plain, double)))


@EIGHT_BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bits_of_dy(dtype: torch.dtype, name: str) -> None:
    p = problem(1, 32, 48, 8, name)
    dy = (torch.randn(300, 1000, device="cuda") * torch.logspace(-6, 4, 300, device="cuda")[:, None]).to(dtype)
    options = {"need_t": False, "need_dB": False, "eight_bits": p.dense.dtype}
    q, scale = eight_bit.quantize_rows(dy, p.dense.dtype)
    prepared = tk.prepare(dy, None, None, 1.0, **options)
    assert torch.equal(prepared.scale, scale.flatten())
    assert torch.equal(prepared.q.view(torch.uint8), q.view(torch.uint8))
    columns = torch.rand(1000, device="cuda")
    q, scale = eight_bit.quantize_rows(dy.float() * columns, p.dense.dtype)
    prepared = tk.prepare(dy, None, None, 1.0, column_scale=columns, **options)
    assert torch.equal(prepared.scale, scale.flatten())
    assert torch.equal(prepared.q.view(torch.uint8), q.view(torch.uint8))


@EIGHT_BITS
@pytest.mark.parametrize("sizes", SIZES)
def test_a_weight_in_eight_bits(sizes: tuple[int, ...], name: str) -> None:
    """Forward and backward by the kernels, and by PyTorch, against float64 over the same rounded operands."""
    p = problem(*sizes, name)
    dtype = eight_bit.DTYPES[name]
    q, scale = eight_bit.quantize_weight(p.weight, dtype)
    bits, x_scale = triton_backend.quantize(p.x, dtype)
    weight, x = (eight_bit.dequantize(*pair, torch.float64) for pair in ((q, scale), (bits, x_scale)))
    o = Operands(
        x=p.x, weight=None, dense=as_bits(q), weight_scale=scale, x_bits=as_bits(bits), x_scale=x_scale,
        lora_A=p.lora_A, lora_B=p.lora_B, scaling=p.scaling,
    )  # fmt: skip
    y = x @ weight.t() + p.scaling * (p.x.double() @ p.lora_A.double().t()) @ p.lora_B.double().t()
    for forward in (triton_backend.forward_in_eight_bits, reference.forward):
        assert judge(forward(o)[0], y.bfloat16(), y).passed
    p = replace(p, dense=q, dense_scale=None, weight_scale=scale, weight=None)
    folded, fold = eight_bit.quantize_rows(p.dy.float() * scale.t(), dtype)
    dx = rotate(folded.double() * fold.double() @ q.double(), p.rotation)
    dx += p.scaling * (p.dy.double() @ p.lora_B.double()) @ p.lora_A.double()
    plain = reference.backward(p)
    double = reference.backward(in_double(replace(p, dense=None, weight_scale=None, weight=weight.bfloat16())))
    for computed in (triton_backend.exact_backward(p, "fused"), plain):
        # In int8 dX is rounded to 16 bits once more, before it is rotated back.
        assert judge(computed.dx, dx.bfloat16() if p.rotation == 1 else dx.bfloat16() * (1 + 2**-9), dx).passed
        for gradient in ("dA", "dB"):
            assert_close(gradient, *(getattr(g, gradient) for g in (computed, plain, double)))
