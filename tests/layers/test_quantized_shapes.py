"""Quantised layers of shapes that the library's CPU kernel cannot pack, and one that is handed over as a Linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_layers import draw, quantised
from torch import nn

import loge_kernels as loge
from loge_kernels import LoGELinear


@pytest.mark.parametrize(("n", "k"), [(96, 96), (100, 128)])
def test_inference_of_a_shape_that_cannot_be_repacked(n: int, k: int) -> None:
    """On such a CPU bitsandbytes' own layer raises."""
    model = nn.Sequential(quantised("nf4", n=n, k=k))
    loge.apply(model)
    layer: Any = model[0]
    layer.support_avx512bf16_for_cpu = True
    x = draw(6, k)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), x @ layer.dense_weight().T + layer.bias)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_single_layer_is_not_taken_for_a_linear_one(kind: str, rank: int | None) -> None:
    with pytest.raises(TypeError, match=r"linear is a Linear(4bit|8bitLt) .*loge_kernels\.apply"):
        LoGELinear.from_linear(quantised(kind), rank=rank)
