"""LoRETTA_rep's layer: a LoRA whose matrices are tensor trains."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .config import LorettaConfig, LorettaRepConfig
from .layer import LorettaLayer, plain_parameter, write_parameter


class RepLinear(LorettaLayer):
    """y = x Wᵀ + b + s drop(x) (B A - B₀ A₀)ᵀ over a linear layer W [N, K]; A [P, K] and B [N, P] are tensor trains.

    A₀ and B₀ are the matrices at the start, kept as frozen cores and saved with the adapter. The difference is taken as
    one LoRA of rank 2 P,

        B A - B₀ A₀ = [B - B₀ | B₀] [A ; A - A₀]

    in which nothing cancels: at the start both factors that vanish are zeros bit by bit, in any precision. A kernel
    pads P = 8 to the 16 columns of a tensor core anyway.
    """

    adapter_layer_names = ("loretta_rep_A", "loretta_rep_B")
    other_param_names = ("loretta_rep_A0", "loretta_rep_B0", "loretta_rep_dropout")
    loretta_rep_A: Any
    loretta_rep_B: Any
    loretta_rep_A0: Any
    loretta_rep_B0: Any
    loretta_rep_dropout: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scaling: dict[str, float] = {}

    def add(self, adapter_name: str, config: LorettaConfig) -> None:
        assert isinstance(config, LorettaRepConfig)
        P = config.bottleneck
        A = self.train_of(config, self.in_features, P, bias=False)
        B = self.train_of(config, P, self.out_features, bias=False)
        self.loretta_rep_A[adapter_name], self.loretta_rep_B[adapter_name] = A, B
        self.loretta_rep_A0[adapter_name], self.loretta_rep_B0[adapter_name] = A.frozen(), B.frozen()
        self.loretta_rep_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling[adapter_name] = config.alpha / P

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as a LoRA: [A ; A - A₀] of [2 P, K] and [B - B₀ | B₀] of [N, 2 P], in the cores' dtype."""
        A, A0 = self.loretta_rep_A[adapter_name].matrix(), self.loretta_rep_A0[adapter_name].matrix()
        B, B0 = self.loretta_rep_B[adapter_name].matrix(), self.loretta_rep_B0[adapter_name].matrix()
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        for name in self.held():
            A, B = self.matrices(name)
            inner = nn.functional.linear(self.loretta_rep_dropout[name](self.loretta_rep_A[name].suited(x)), A)
            y = y + (nn.functional.linear(inner, B) * self.scaling[name]).to(y.dtype)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, [N, K], in the cores' dtype."""
        A, B = self.matrices(adapter)
        return B @ A * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.loretta_rep_A:
                self._add_to_weight(name, 1, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take what was merged out of the base weight again, to its rounding."""
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters.pop(), -1)

    def _add_to_weight(self, name: str, sign: int, safe: bool = False) -> None:
        base = self.get_base_layer()
        weight, delta = plain_parameter(base, "weight", name), self.get_delta_weight(name)
        write_parameter(base, "weight", weight.to(delta.dtype) + sign * delta, safe, name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: it can."""
        return True
