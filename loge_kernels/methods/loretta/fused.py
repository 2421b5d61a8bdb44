"""LoRETTA_rep's layer with the frozen weight and the adapter in one op."""

from __future__ import annotations

from torch import Tensor, nn

from ...layers.peft import FusedAdapter, register_fused
from .rep_layer import RepLinear


class LoGERepLinear(FusedAdapter, RepLinear):
    """`RepLinear` over a `LoGELinear`: the op gives dA and dB, autograd takes them on to the cores."""

    def held(self) -> list[str]:
        return RepLinear.held(self)

    def why_not(self, name: str) -> str | None:
        return None

    def lora(self, name: str) -> tuple[Tensor, Tensor, nn.Module]:
        return (*self.matrices(name), self.loretta_rep_dropout[name])


register_fused(RepLinear, LoGERepLinear)
