"""PEFT's LoRA layer with SwitchLoRA's start, and over a `LoGELinear` in one op."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from ...layers.peft import FusedLora, register_fused
from .edit import add_product_, needs_remainder
from .law import deviations, fill_


class SwitchLoraLinear(LoraLinear):
    """`peft.tuners.lora.Linear` whose frozen weight is the start less the adapter, and is edited at every switch.

    `remainder` [N, K], a frozen parameter, is what a 16-bit weight's rounding leaves over (`edit.add_product_`); None
    for 32 and 64 bits.
    """

    edits_weight = True
    remainder: nn.Parameter | None
    adapter: str  # the one that is switched
    config: Any
    path: str  # in the model, which the vectors' seed depends on

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """PEFT's hook for a new adapter. Raises ValueError for r above min(N, K)."""
        N, K = self.out_features, self.in_features
        self.path = kwargs.get("target_name", "")
        if r > min(N, K):
            raise ValueError(
                f"r={r} is larger than the pool of {self.path or 'a layer'} [{N}, {K}], min(N, K) = {min(N, K)} "
                f"vectors; give r <= {min(N, K)}, or rank_pattern for this layer"
            )
        self.adapter, self.config = adapter_name, config
        self.register_parameter("remainder", None)
        self.keep_remainder()
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if not (A.is_meta or self.base_layer.weight.is_meta):
            add_product_(self.base_layer, self.remainder, B * -self.scaling[adapter_name], A)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """The start of both matrices; the weight is not touched."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        for matrix, part, deviation in zip((A, B), "AB", self.deviations, strict=True):
            if not matrix.is_meta:
                fill_(matrix, deviation, self.config.seed, f"{self.path}/{part}")

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard deviations that vectors of A and of B start with."""
        return deviations(self.out_features, self.in_features, self.r[self.adapter])

    def keep_remainder(self) -> None:
        """Give a 16-bit weight its remainder, where it has none yet."""
        weight = self.base_layer.weight
        if self.remainder is None and needs_remainder(weight):
            self.remainder = nn.Parameter(torch.zeros_like(weight), requires_grad=False)


class LoGESwitchLoraLinear(FusedLora, SwitchLoraLinear):
    """`SwitchLoraLinear` over a `LoGELinear`."""


register_fused(SwitchLoraLinear, LoGESwitchLoraLinear)
