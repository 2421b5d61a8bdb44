"""LoRETTA_adp's layers: a linear layer with a bottleneck adapter before or after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .bottleneck import bottleneck
from .config import LorettaAdpConfig, LorettaConfig
from .layer import LorettaLayer


class AdpLinear(LorettaLayer):
    """A linear layer, `before` or after which h becomes h + up(act(down(h))); several active adapters follow one
    another. The base layer's weight is never written to."""

    adapter_layer_names = ("loretta_adp_down", "loretta_adp_up")
    keeps_weight = True
    loretta_adp_down: Any
    loretta_adp_up: Any

    def __init__(self, base_layer: nn.Module, before: bool) -> None:
        super().__init__(base_layer)
        self.before = before
        self.activation: dict[str, str] = {}

    def add(self, adapter_name: str, config: LorettaConfig) -> None:
        assert isinstance(config, LorettaAdpConfig)
        width = self.in_features if self.before else self.out_features
        self.loretta_adp_down[adapter_name] = self.train_of(config, width, config.bottleneck)
        self.loretta_adp_up[adapter_name] = self.train_of(config, config.bottleneck, width)
        if config.identity_start:
            nn.init.zeros_(self.loretta_adp_up[adapter_name].cores[-1])
        self.activation[adapter_name] = config.non_linearity

    def adapt(self, h: Tensor) -> Tensor:
        """h after the active adapters."""
        for name in self.held():
            h = bottleneck(h, self.loretta_adp_down[name], self.loretta_adp_up[name], self.activation[name])
        return h

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.before:
            return self.base_layer(self.adapt(x), *args, **kwargs)
        return self.adapt(self.base_layer(x, *args, **kwargs))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: there is a non-linearity inside."""
        raise ValueError(
            "LoRETTA_adp adapters are not linear and cannot be merged into weights: keep the PEFT model; its unload() "
            "gives the model without them"
        )

    def unmerge(self) -> None:
        """Nothing to do: nothing is ever merged."""

    def extra_repr(self) -> str:
        return f"adapter {'before' if self.before else 'after'} the layer"
