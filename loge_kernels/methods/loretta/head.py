"""A tensor train in the place of a classifier's linear layer."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .config import LorettaConfig
from .layer import LorettaLayer, plain_parameter, write_parameter


class TensorTrainHead(LorettaLayer):
    """A linear layer whose matrix and bias an adapter replaces, rather than adding to them.

    Merging writes the train's matrix to the base layer, exactly; `unmerge` puts back what was there.
    Raises ValueError with several active adapters: only one can stand for the layer.
    """

    @property
    def trains(self) -> nn.ModuleDict:
        """The trains, by adapter."""
        return getattr(self, self.adapter_layer_names[0])

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._before: dict[str, Tensor] = {}

    def add(self, adapter_name: str, config: LorettaConfig) -> None:
        rank = min(config.tensor_rank, self.in_features, self.out_features)
        bias = self.get_base_layer().bias is not None
        self.trains[adapter_name] = self.train_of(config, self.in_features, self.out_features, rank, bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._single(self.held())
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        train: Any = self.trains[names[0]]
        return train(train.suited(x)).to(x.dtype)

    @staticmethod
    def _single(names: list[str]) -> list[str]:
        if len(names) > 1:
            raise ValueError(f"{len(names)} active adapters {names} have a classifier each; set one with set_adapter")
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the base layer's matrix and bias those of the adapter."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.trains]
        self._single([*self.merged_adapters, *names])
        base = self.get_base_layer()
        for name in names:
            train: Any = self.trains[name]
            values = {"weight": train.matrix(), "bias": train.bias}
            values = {parameter: value.detach() for parameter, value in values.items() if value is not None}
            self._before = {parameter: plain_parameter(base, parameter, name) for parameter in values}
            try:
                for parameter, value in values.items():
                    write_parameter(base, parameter, value, safe_merge, name)
            except ValueError:
                self.unmerge()
                raise
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base layer's own matrix and bias back."""
        base = self.get_base_layer()
        for parameter, value in self._before.items():
            getattr(base, parameter).data = value
        self._before, self.merged_adapters = {}, []


class RepHead(TensorTrainHead):
    """LoRETTA_rep's."""

    adapter_layer_names = ("loretta_rep_head",)


class AdpHead(TensorTrainHead):
    """LoRETTA_adp's."""

    adapter_layer_names = ("loretta_adp_head",)
