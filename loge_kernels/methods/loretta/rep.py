"""LoRETTA_rep as a tuner of PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import LorettaConfig
from .families import PROJECTIONS, of_family
from .head import RepHead
from .layer import LorettaLayer
from .rep_layer import RepLinear
from .tuner import LorettaModel


class LorettaRepModel(LorettaModel):
    """The tuner behind `LorettaRepConfig`."""

    prefix = "loretta_rep_"
    head_cls = RepHead

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            names = of_family(PROJECTIONS, model_config.get("model_type"), "LoRETTA_rep")
            peft_config.target_modules = names if isinstance(names, str) else list(names)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _new_layer(self, config: LorettaConfig, target: nn.Module, key: str) -> LorettaLayer:
        return RepLinear(target)
