"""`SwitchLoraModel`: the tuner that PEFT makes of a `SwitchLoraConfig`, known to PEFT from this import on."""

from __future__ import annotations

from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...layers.linear import LoGELinear
from ..registry import register
from .config import NAME, SwitchLoraConfig
from .layer import SwitchLoraLinear


class SwitchLoraModel(LoraModel):
    """PEFT's LoRA model with `SwitchLoraLinear` layers.

    The frozen weights change with every switch, so `save_pretrained` writes them too: with `train_rest` the file is the
    whole model, and `from_pretrained` gives the same function over any base of the same shape.

    Without its adapter (`disable_adapter`, `unload`) the model is neither the trained one nor the start, but the edited
    weights alone; `merge_and_unload` gives the trained one.
    """

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError(
                f"a SwitchLoRA model has one adapter, whose switches the weights hold; got {sorted(self.peft_config)}"
            )

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **options: Any,
    ) -> None:
        weight = getattr(target, "weight", None)
        sharing = [name for name, p in self.model.named_parameters(remove_duplicate=False) if p is weight]
        if len(sharing) > 1:
            raise ValueError(
                f"target {current_key!r} has a tied weight ({' and '.join(sharing)}), and a switch would edit both; "
                "leave it out of target_modules"
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **options)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if type(base) not in (nn.Linear, LoGELinear) or target is not base:
            raise TypeError(
                f"{kwargs.get('target_name')} is a {type(target).__module__}.{type(target).__name__}; SwitchLoRA edits "
                "weights, and needs a plain torch.nn.Linear (target_modules leaves others out)"
            )
        if not base.weight.dtype.is_floating_point:
            raise TypeError(f"{kwargs.get('target_name')} has a weight in {base.weight.dtype}; SwitchLoRA edits it")
        return SwitchLoraLinear(target, adapter_name, config=lora_config, **kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        config = next(iter(self.peft_config.values()))
        if not config.train_rest or config.inference_mode:
            return
        layers = [module for module in model.modules() if isinstance(module, SwitchLoraLinear)]
        frozen = {id(parameter) for layer in layers for parameter in (layer.base_layer.weight, layer.remainder)}
        for parameter in model.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(True)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if config.train_rest:
            return dict(state_dict)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, module in model.named_modules():
            if isinstance(module, SwitchLoraLinear):
                key = f"{name}.base_layer.weight"
                found[key] = state_dict[key]
        return found


register(NAME, SwitchLoraConfig, SwitchLoraModel)
