"""Linear layers with one of torchao's quantised weight tensors, with a low-rank backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .quantized import QuantizedLinear

# Attributes of torchao's tensors that are set where the layer's input is quantised as well.
_QUANTISED_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")


class LoGETorchaoLinear(QuantizedLinear):
    """`torch.nn.Linear` whose weight is a tensor subclass of torchao that can `dequantize()`."""

    @staticmethod
    def label(layer: Any) -> str:
        return f"torchao {type(layer.weight).__name__} base"

    @staticmethod
    def why_not(layer: Any) -> str | None:
        if not callable(getattr(layer.weight, "dequantize", None)):
            return f"its weight is a {type(layer.weight).__name__} of torchao, which cannot be dequantised"
        if any(getattr(layer.weight, name, None) is not None for name in _QUANTISED_ACTIVATIONS):
            return "torchao quantises its activations too, and gives them no gradient: use a weight-only format"
        return None

    @staticmethod
    def factor_dtype(layer: Any) -> torch.dtype:
        return layer.weight.dtype

    @staticmethod
    def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
        return layer.weight.detach().dequantize().to(dtype)


def holds(module: nn.Module) -> bool:
    """Whether this is a plain linear layer over a tensor of torchao."""
    return type(module) is nn.Linear and type(module.weight).__module__.partition(".")[0] == "torchao"
