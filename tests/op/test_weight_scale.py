"""`linear(..., weight_scale=)`: the op over a weight in 8 bits, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import loge_kernels as loge
from loge_kernels.numerics.eight_bit import DTYPES, dequantize, quantize_weight

M, N, K, P = 6, 48, 64, 4
NAMED = pytest.mark.parametrize("name", list(DTYPES))


def operands(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    weight, scale = quantize_weight(torch.randn(N, K).to(dtype), DTYPES[name])
    return {
        "x": torch.randn(M, K).to(dtype).requires_grad_(),
        "weight": weight,
        "weight_scale": scale,
        "bias": torch.randn(N).to(dtype),
        "lora_A": torch.randn(P, K).to(dtype).requires_grad_(),
        "lora_B": torch.randn(N, P).to(dtype).requires_grad_(),
        "scaling": 1.5,
    }


def call(given: dict[str, Any], **more: Any) -> Tensor:
    rest = {key: value for key, value in given.items() if key not in ("x", "weight")}
    return loge.linear(given["x"], given["weight"], None, **rest, **more)


@NAMED
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_near_the_dequantised_product(name: str, dropout: float) -> None:
    given = operands(name)
    weight = dequantize(given["weight"], given["weight_scale"], torch.float32)
    results = []
    for way in ({}, {"weight": weight, "weight_scale": None}):
        torch.manual_seed(1)  # of the mask
        y = call(given | way, dropout=dropout)
        wanted = [given[key] for key in ("x", "lora_A", "lora_B")]
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm()


@NAMED
def test_saves_bits_and_no_more_of_x_than_the_adapter_reads(name: str) -> None:
    given = operands(name)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(given | {"lora_A": None, "lora_B": None})
    assert all(tensor.numel() != M * K for tensor in saved)
    assert sum(tensor.numel() == N * K for tensor in saved) == 1
    assert all(tensor.element_size() == 1 for tensor in saved if tensor.numel() == N * K)


@NAMED
def test_float8_may_come_as_bits_and_rows_in_any_shape(name: str) -> None:
    given = operands(name)
    y = call(given)
    bits = given["weight"].view(torch.uint8) if name == "float8" else given["weight"]
    assert torch.equal(call(given | {"weight": bits}), y)
    folded = call(given | {"x": given["x"].view(2, 3, K)})
    torch.testing.assert_close(folded, y.view(2, 3, N))


@NAMED
def test_as_operators(name: str) -> None:
    """The schema, the fake implementation and the formula of the operator that a compiled graph calls."""
    given = operands(name)
    compiled = torch.compile(lambda: call(given), backend="aot_eager", fullgraph=True)
    expected, y = call(given), compiled()
    torch.testing.assert_close(y, expected)
    wanted = [given[key] for key in ("x", "lora_A", "lora_B")]
    for got, exact in zip(*(torch.autograd.grad(t.sum(), wanted) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, exact)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"weight": torch.zeros(N, K)}, TypeError, "weight has dtype torch.float32; with weight_scale expected"),
    "shape": (
        {"weight_scale": torch.ones(N)},
        ValueError,
        r"weight_scale is torch.float32 \(48,\); expected .*\(48, 1",
    ),
    "scale": ({"weight_scale": torch.ones(N, 1).half()}, ValueError, r"weight_scale is torch\.float16"),
    "dimensions": ({"weight": torch.zeros(K, dtype=torch.int8)}, ValueError, "weight has shape .*two dimensions"),
    "x": ({"x": torch.zeros(M, K + 1)}, ValueError, "its last dimension must be K = 64"),
    "float64": ({"x": torch.zeros(M, K).double()}, TypeError, "8 bits are for float32"),
    "trains": (
        {"weight": torch.zeros(N, K).to(torch.float8_e4m3fn).requires_grad_()},
        ValueError,
        "it must be frozen",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    changes, error, message = REFUSED[case]
    given = operands("int8") | {"bias": None, "lora_A": None, "lora_B": None}
    with pytest.raises(error, match=message):
        call(given | changes)
