"""bitsandbytes' 4-bit (NF4, FP4) and 8-bit linear layers with a low-rank backward."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor

from .quantized import QuantizedLinear


class LoGELinear4bit(QuantizedLinear, bnb.nn.Linear4bit):
    """`bitsandbytes.nn.Linear4bit` with a low-rank activation gradient."""

    @staticmethod
    def label(layer: Any) -> str:
        return f"{layer.weight.quant_type.upper()} base"

    @staticmethod
    def why_not(layer: Any) -> str | None:
        state = _state(layer)
        if state is None:
            return "its weight is not quantised yet: move the model to its device first"
        shape = (layer.out_features, layer.in_features)
        if tuple(state.shape) != shape:
            return f"its weight was quantised as {tuple(state.shape)}, not as {shape}"
        return None

    @staticmethod
    def factor_dtype(layer: Any) -> torch.dtype:
        return layer.compute_dtype or _state(layer).dtype

    @staticmethod
    def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
        packed, state = layer.weight.data, _state(layer)
        if getattr(state, "packing_format_for_cpu", False):
            # After inference on a CPU with AVX-512 the weight lies in that kernel's layout; the state is changed there.
            packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
        return functional.dequantize_4bit(packed, state).to(dtype)

    def why_not_sharded(self) -> str | None:
        return None

    def product_dtype(self, input: Tensor) -> torch.dtype:
        layer: Any = self
        return layer.compute_dtype or input.dtype

    def library_forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:  # the CPU's inference kernel (bitsandbytes 0.50) ends the process: it divides by M
            return input.new_empty(*input.shape[:-1], self.out_features)
        if self.out_features % 32 or self.in_features % _state(self).blocksize:
            self.support_avx512bf16_for_cpu = False  # whose kernel (0.50) takes whole blocks alone, and else raises
        return super().library_forward(input)


class LoGELinear8bitLt(QuantizedLinear, bnb.nn.Linear8bitLt):
    """`bitsandbytes.nn.Linear8bitLt` with a low-rank activation gradient."""

    @staticmethod
    def label(layer: Any) -> str:
        return "int8 base"

    @staticmethod
    def why_not(layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return "it keeps its weight in 16 bits and quantises it at each call: make it with has_fp16_weights=False"
        if layer.weight.dtype != torch.int8 or _scales(layer) is None:
            return "its weight is not quantised yet: move the model to its device first"
        return None

    @staticmethod
    def factor_dtype(layer: Any) -> torch.dtype:
        return torch.float16  # what the weight was quantised from, whatever the model's dtype

    @staticmethod
    def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
        # As bitsandbytes' own backward does, for it has no public function that gives another dtype than float32.
        return layer.weight.data.to(dtype).mul_(_scales(layer).unsqueeze(1).mul(1.0 / 127.0))

    def why_not_sharded(self) -> str | None:
        return None

    def before_sharding(self) -> None:
        state: Any = self.state
        state.CB, state.SCB = None, _scales(self)  # the state would keep the weight whole

    def library_forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        if not isinstance(weight, bnb.nn.Int8Params):  # as FSDP gathered it; the library looks for what it lost
            weight.CB, weight.SCB = weight.data, _scales(self)
        return super().library_forward(input)


CLASSES: dict[type, type[QuantizedLinear]] = {
    bnb.nn.Linear4bit: LoGELinear4bit,
    bnb.nn.LinearNF4: LoGELinear4bit,
    bnb.nn.LinearFP4: LoGELinear4bit,
    bnb.nn.Linear8bitLt: LoGELinear8bitLt,
}


def _state(layer: Any) -> Any:
    """The weight's quantisation state; FSDP leaves it on the module alone."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _scales(layer: Any) -> Any:
    """Row scales times 127, float32 [N]: with the weight until the first forward, with the layer's state after it."""
    scales = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if scales is None else scales
