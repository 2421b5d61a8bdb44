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
from loge_kernels.backend.problem import BackwardProblem
from loge_kernels.check.accuracy import judge
from loge_kernels.numerics import block_scales, eight_bit

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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_dy(dtype: torch.dtype, name: str) -> None:
    p = problem(1, 32, 48, 8, name)
    dy = (torch.randn(300, 1000, device="cuda") * torch.logspace(-6, 4, 300, device="cuda")[:, None]).to(dtype)
    options = {"need_t": False, "need_dB": False, "eight_bits": p.dense.dtype}
    by_row, by_block = (tk.prepare(dy, None, None, 1.0, scales=scales, **options) for scales in ("row", "block"))
    for prepared, (q, scale) in (
        (by_row, eight_bit.quantize_rows(dy, p.dense.dtype)),
        (by_block, block_scales.quantize(dy, p.dense.dtype)),
    ):
        assert torch.equal(prepared.scale.flatten(), scale.flatten())
        assert torch.equal(prepared.q.view(torch.uint8), q.view(torch.uint8))


@EIGHT_BITS
def test_the_product_of_blocks(name: str) -> None:
    p = problem(300, 1152, 640, 16, name)
    dtype = eight_bit.DTYPES[name]
    copy, scale = block_scales.quantize_weight(p.weight, dtype)
    prepared = tk.prepare(p.dy, p.xa, p.lora_B, p.scaling, eight_bits=dtype, scales="block")
    given = {"scales": "block", "dy_scale": prepared.scale, "weight_scale": scale}
    dx, dA = tk.product(prepared.q, copy, t=prepared.t, lora_A=p.lora_A, x=p.x, dtype=p.dy.dtype, **given)
    rows = prepared.q.double() * prepared.scale.t().repeat_interleave(128, 1)
    exact = rows @ (copy.double() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1))
    exact += prepared.t.double() @ p.lora_A.double()
    assert judge(dx, exact.bfloat16(), exact).passed
    double = reference.backward(in_double(replace(p, dense=None, dense_scale=None)))
    assert_close("dA", dA, reference.backward(p).dA, double.dA)
    if name != "float8":
        return
    types = torch.nn.functional.ScalingType
    recipes = types.BlockWise1x128, types.BlockWise128x128
    try:
        by_torch = torch.nn.functional.scaled_mm(
            prepared.q, copy, prepared.scale.t(), recipes[0], scale, recipes[1], output_dtype=torch.bfloat16
        )
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"torch's product of blocks does not run here: {str(error).splitlines()[0]}")
    exact -= prepared.t.double() @ p.lora_A.double()
    assert judge(by_torch, exact.bfloat16(), exact).passed
