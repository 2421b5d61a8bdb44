"""LoRETTA_adp as a tuner of PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adp_layer import AdpLinear
from .config import LorettaAdpConfig, LorettaConfig
from .families import PLACES, of_family
from .head import AdpHead
from .layer import LorettaLayer
from .tuner import LorettaModel


class LorettaAdpModel(LorettaModel):
    """The tuner behind `LorettaAdpConfig`."""

    prefix = "loretta_adp_"
    head_cls = AdpHead

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        model_type = model_config.get("model_type")
        if peft_config.target_modules is None and isinstance(peft_config.where, dict):
            peft_config.target_modules = list(peft_config.where)
        if peft_config.target_modules is None:
            places = of_family(PLACES, model_type, "LoRETTA_adp", " and where=")
            peft_config.target_modules = list(places)
        if peft_config.where is None:
            peft_config.where = dict(PLACES.get(str(model_type), {}))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _new_layer(self, config: LorettaConfig, target: nn.Module, key: str) -> LorettaLayer:
        assert isinstance(config, LorettaAdpConfig)
        return AdpLinear(target, before=_place(config, key) == "before")


def _place(config: LorettaAdpConfig, key: str) -> str:
    """Where the adapter of layer `key` is."""
    if isinstance(config.where, str):
        return config.where
    places = {place for name, place in (config.where or {}).items() if key == name or key.endswith(f".{name}")}
    if len(places) != 1:
        raise ValueError(
            f"where={config.where!r} says {' and '.join(sorted(places)) or 'nothing'} of target {key!r}: give 'before' "
            "or 'after' for it"
        )
    return places.pop()
