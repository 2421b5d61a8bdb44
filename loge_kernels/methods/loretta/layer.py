"""What LoRETTA's layers have in common, as PEFT sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import LorettaConfig
from .modes import modes_of
from .tensor_train import TensorTrain


class LorettaLayer(nn.Module, BaseTunerLayer):
    """One of LoRETTA's adapters, of any number of names, around a linear layer."""

    # PEFT's, by adapter name: what trains, and what belongs to it besides.
    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ()
    base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features
        self.out_features: int = base_layer.out_features
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, nn.ModuleDict())

    def add(self, adapter_name: str, config: LorettaConfig) -> None:
        """Make this layer's modules of the adapter, in place of those of that name."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: LorettaConfig) -> None:
        """Add an adapter of that name."""
        self.add(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def train_of(
        self, config: LorettaConfig, in_features: int, out_features: int, rank: int | None = None, bias: bool = True
    ) -> TensorTrain:
        """A tensor train as configured, on the base weight's device; in float32 whatever the base's precision, in which
        training small cores would stall, but for a float64 base."""
        weight = self.get_base_layer().weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        modes = modes_of(in_features, out_features, config.tensor_shapes)
        return TensorTrain(*modes, rank or config.tensor_rank, bias, device=weight.device, dtype=dtype)

    def held(self) -> list[str]:
        """The active adapters that this layer has, none where adapters are disabled."""
        modules = getattr(self, self.adapter_layer_names[0])
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in modules]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also round the cores to the base's precision.
        device = device or self.get_base_layer().weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            modules = getattr(self, name)
            if adapter_name in modules and not any(t.is_meta for t in modules[adapter_name].state_dict().values()):
                modules[adapter_name].to(device)


def plain_parameter(layer: Any, parameter: str, adapter: str) -> Tensor:
    """The data of the base layer's `parameter`.

    Raises TypeError where it is quantised: it cannot be merged into.
    """
    data = getattr(layer, parameter).data
    if not data.dtype.is_floating_point or type(data) is not Tensor:
        raise TypeError(
            f"adapter {adapter!r} cannot be merged into a {type(layer).__name__} with {parameter} in {data.dtype}: "
            "dequantise the model first"
        )
    return data


def write_parameter(layer: Any, parameter: str, value: Tensor, safe: bool, adapter: str) -> None:
    """Give the base layer's `parameter` a value, in its own dtype.

    Raises ValueError where `safe` and the value is not finite.
    """
    if safe and not torch.isfinite(value).all():
        raise ValueError(f"merging adapter {adapter!r} would make {parameter} of {type(layer).__name__} not finite")
    target = getattr(layer, parameter)
    target.data = value.to(target.dtype)
