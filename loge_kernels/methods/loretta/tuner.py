"""PEFT's tuner for both LoRETTA methods: targets, norms and classifiers of a model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import LorettaConfig
from .families import CLASSIFIERS, is_norm
from .head import TensorTrainHead
from .layer import LorettaLayer
from .norms import back_to_base, train_in_float32


class LorettaModel(BaseTuner):
    """What the tuners of rep and adp share. PEFT makes them; users call `peft.get_peft_model`."""

    tuner_layer_cls = LorettaLayer
    head_cls: type[TensorTrainHead]

    def _new_layer(self, config: LorettaConfig, target: nn.Module, key: str) -> LorettaLayer:
        raise NotImplementedError

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and the norms of 16 bits train in float32."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].train_norms:
            train_in_float32(model, adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        back_to_base(self.model)
        return unloaded

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.classifier_modules is None:
            of_task = peft_config.task_type == "SEQ_CLS"
            known = CLASSIFIERS.get(str(model_config.get("model_type")), []) if of_task else []
            peft_config.classifier_modules = list(known)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        saved = without(peft_config.modules_to_save or [], peft_config.classifier_modules, model)
        if peft_config.train_norms:
            saved += _norms(model)
        # PEFT reads it after this, and writes it to adapter_config.json: norms come back with the adapter.
        peft_config.modules_to_save = list(dict.fromkeys(saved)) or None

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if _ends_in(key, peft_config.classifier_modules):
            return True
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        layer = target
        if not isinstance(layer, LorettaLayer):
            if not isinstance(target, nn.Linear):
                raise ValueError(
                    f"target {current_key!r} is a {type(target).__name__}; LoRETTA goes on torch.nn.Linear layers: "
                    "name those in target_modules"
                )
            is_head = _ends_in(current_key, peft_config.classifier_modules)
            layer = self.head_cls(target) if is_head else self._new_layer(peft_config, target, current_key)
        layer.update_layer(adapter_name, peft_config)
        # Not by `_replace_module`, which moves what is on the right device already, and cannot where it is on meta.
        setattr(parent, target_name, layer)


def _ends_in(key: str, names: list[str] | None) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names or ())


def _norms(model: nn.Module) -> list[str]:
    """Names for `modules_to_save` that stand for the model's norms and for nothing else: the last part of a path where
    that is enough."""
    modules: dict[str, Any] = {}
    wrapper = None
    for name, module in model.named_modules():
        if wrapper is not None and name.startswith(f"{wrapper}."):
            continue
        wrapper = name if isinstance(module, ModulesToSaveWrapper) else None
        modules[name] = module if wrapper is None else module.original_module
    norms = {name for name, module in modules.items() if is_norm(module)}
    leaves = {name.rpartition(".")[2] for name in norms}
    only = {leaf for leaf in leaves if all(name in norms for name in modules if name.endswith(leaf))}
    return sorted(only | {name for name in norms if name.rpartition(".")[2] not in only})


def without(saved: list[str], heads: list[str] | None, model: nn.Module) -> list[str]:
    """`modules_to_save` without the layers that a train takes the place of: PEFT would train a second copy of them. A
    module that contains one gives way to the other modules in it."""
    kept: list[str] = []
    paths = [name for name, _ in model.named_modules() if _ends_in(name, heads)]
    for entry in saved:
        inside = [path for path in paths if f".{entry}." in f".{path}."]
        if not inside:
            kept.append(entry)
        elif not _ends_in(inside[0], [entry]):
            owner = inside[0][: f".{inside[0]}.".index(f".{entry}.") + len(entry)]
            children = model.get_submodule(owner).named_children()
            parts = [f"{entry}.{name}" for name, child in children if any(True for _ in child.parameters())]
            kept += without(parts, heads, model)
    return kept
