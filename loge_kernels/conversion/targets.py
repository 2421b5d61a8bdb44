"""The linear layers of a model that a low-rank backward could serve, and why some are left alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import distributed
from ..freezing.frozen_module import is_frozen
from ..freezing.prefix import embeddings
from ..layers.eight_bit_base import EightBitLinear
from ..layers.formats import layer_class
from ..layers.linear import LoGELinear
from ..layers.quantized import QuantizedLinear

Targets = str | Iterable[str] | None

# Libraries whose layers are no `nn.Linear`, and whose kernels differ in how they give the weight back, if at all.
_REFUSED = ("gptqmodel", "auto_gptq", "awq")

_CONV1D = "transformers.pytorch_utils.Conv1D"  # GPT-2's linear layers

# Names that transformers' encoders (and OPT) give to what lies between their layers and the head. A pooler sees one
# token of each sequence, so there is nothing to save in it either.
_ABOVE_LAYERS = {"pooler", "pre_classifier", "project_out"}


@dataclass(frozen=True, slots=True)
class TargetLayer:
    """A linear layer that may be converted: its name, itself, PEFT's layer around it, why it is left alone."""

    name: str
    linear: nn.Linear
    adapter: Any  # a layer of PEFT that can share its op, a FusedAdapter once converted
    why_not: str | None
    quantized: type[QuantizedLinear] | None = None  # what a quantised layer becomes
    frozen: bool = False  # left alone: no backward reaches it
    wrapper_note: str = ""  # the class of a layer around it that is left as it is
    stack: tuple[int, ...] | None = None  # the shape of several weights in one parameter: left alone

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): the shape of `linear.weight`, or of what a quantised one stands for."""
        if _full_name(self.linear) == _CONV1D:
            return self.linear.weight.shape[1], self.linear.weight.shape[0]
        return self.linear.out_features, self.linear.in_features

    @property
    def sizes(self) -> tuple[int, ...]:
        """`shape`, or that of a stack of weights, for the report."""
        return self.stack or self.shape

    @property
    def shape_only(self) -> Tensor:
        """Shape, dtype and device of `weight()` without its values: for questions about costs."""
        if self.quantized is None or self.why_not is not None:
            return self.linear.weight
        dtype = self.quantized.factor_dtype(self.linear)
        return torch.empty((), dtype=dtype, device=self.linear.weight.device).expand(self.shape)

    def weight(self) -> Tensor:
        """The weight [N, K] in a floating dtype; a quantised one is dequantised at each call."""
        if self.quantized is None:
            return self.linear.weight
        return self.quantized.dequantize(self.linear, self.quantized.factor_dtype(self.linear))

    def convert_(self, *options: Any, base_dtype: str | None = None) -> None:
        """Make the layer a `LoGELinear` (`LoGELinear.convert_`), and PEFT's layer around it one that shares its op."""
        kind = LoGELinear if base_dtype is None else EightBitLinear
        (self.quantized or kind).convert_(self.linear, *options)
        if base_dtype is not None:
            self.linear.round_(base_dtype)  # type: ignore[operator]
        if self.adapter is not None:
            from ..layers.peft import FusedAdapter

            FusedAdapter.convert_(self.adapter)

    def describe(self, reason: str = "") -> str:
        """`reason` for the report, after what the weight is where that is not plain."""
        label = "" if self.quantized is None else self.quantized.label(self.linear)
        return "; ".join(part for part in (label, reason) if part)


def find_targets(model: nn.Module, targets: Targets, on_meta: bool = False) -> Iterator[TargetLayer]:
    """Every linear layer of the model that is not part of an adapter, with the reason where it is left alone. Weights
    may be on the meta device with `on_meta`, or where ranks will bring them."""
    wanted = _matcher(targets)
    explicit = targets is not None and targets != "all-linear"
    head = _output_head(model)
    tuner_layer, fused_class, saved_module = _peft_classes()
    inside_adapters: set[int] = set()
    around: dict[int, tuple[str, nn.Module]] = {}
    frozen: set[int] = set()
    for name, module in model.named_modules():
        if is_frozen(module):
            frozen.update(id(child) for child in module.modules())
        if tuner_layer is not None and isinstance(module, tuner_layer):
            base = module.get_base_layer()
            around[id(base)] = name, module
            inside_adapters.update(id(child) for child in module.modules())
        elif saved_module is not None and isinstance(module, saved_module):
            inside_adapters.update(id(child) for child in module.original_module.modules())
    for name, module in model.named_modules():
        wrapped = around.get(id(module))
        if wrapped is None and id(module) in inside_adapters:
            continue
        for path, shape in _stacks(name, module):
            if wanted(path):
                holder: Any = module
                yield TargetLayer(path, holder, None, _STACKED, frozen=id(module) in frozen, stack=shape)
        if not _is_linear(module):
            continue
        path, wrapper = wrapped or (name, None)
        if not wanted(path):
            continue
        adapter = None if wrapper is None or fused_class(wrapper) is None else wrapper
        quantized = layer_class(module)
        if id(module) in frozen:
            yield TargetLayer(path, module, adapter, "frozen prefix", quantized, frozen=True)
            continue
        why_not = _why_not(path, module, quantized, head, explicit, on_meta or distributed())
        wrapper_note = ""
        if wrapper is not None and adapter is None:
            wrapper_note = f"its adapter is a {_full_name(wrapper)}"
            if why_not is None and not getattr(wrapper, "keeps_weight", False):
                why_not = f"{wrapper_note}: factors could not follow the weight when that merges"
        yield TargetLayer(path, module, adapter, why_not, quantized, wrapper_note=wrapper_note)


def _is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, or stands for one in a format that is refused by name."""
    if isinstance(module, nn.Linear) or _full_name(module) == _CONV1D:
        return True
    return _library(module) in _REFUSED and hasattr(module, "out_features")


_STACKED = "several weights in one parameter, as of experts: the model multiplies by them itself, without nn.Linear"


def _stacks(name: str, module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Paths, PEFT's wrappers left out, and shapes of a module's own parameters that hold a weight for each expert."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point():
            path = [part for part in name.split(".") if part not in ("", "base_layer")]
            yield ".".join([*path, own]), tuple(parameter.shape)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _why_not(
    path: str,
    module: Any,
    quantized: type[QuantizedLinear] | None,
    head: nn.Module | None,
    explicit: bool,
    on_meta: bool,
) -> str | None:
    if type(module) is LoGELinear:
        return "is a LoGELinear of its own"
    if _library(module) in _REFUSED:
        return f"is a {type(module).__name__} of {_library(module)}: GPTQ and AWQ layers keep their library's backward"
    if _full_name(module) == _CONV1D:
        return f"is a {_CONV1D}, whose weight is stored transposed, [K, N]: not supported"
    if quantized is None and type(module) is not nn.Linear:
        return f"is a {_full_name(module)}, not a plain torch.nn.Linear"
    if hasattr(module.weight, "ds_id"):
        return "its weight is partitioned by DeepSpeed ZeRO-3: use stage 1 or 2, or loge_kernels.fully_shard"
    if hasattr(module.weight, "placements"):
        return (
            f"its weight is a DTensor with placements {module.weight.placements}: apply before FSDP2 shards it; tensor "
            "parallelism is not supported"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the instance (an offloading hook?)"
    if getattr(module, "_is_fsdp_managed_module", False):
        return "is inside a sharded module (FSDP): apply first, and shard by loge_kernels.fully_shard"
    if module.weight.is_meta and not on_meta:  # with ranks beside it, Accelerate brings the values from rank 0
        return "its weight is on the meta device: load the model first"
    if quantized is not None:
        reason = quantized.why_not(module)
        if reason is not None:
            return reason
    elif not module.weight.dtype.is_floating_point or module.weight.dtype.itemsize == 1:
        return f"its weight is {module.weight.dtype}"
    if explicit:
        return None
    if module is head:
        return "output head: its error would reach every layer below (name it in targets to convert it)"
    if not _ABOVE_LAYERS.isdisjoint(path.split(".")):
        return "between the layers and the head: its error would reach every layer below (name it in targets)"
    if module.weight.requires_grad:
        return "its weight is trainable, and factors follow a frozen one (name it in targets to convert it)"
    return None


def _matcher(targets: Targets) -> Any:
    """PEFT's rule for `target_modules`."""
    if targets is None or targets == "all-linear":
        return lambda path: True
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets={targets!r} is not a regular expression: {error}") from None
        return lambda path: pattern.fullmatch(path) is not None
    names = list(targets) if isinstance(targets, Iterable) else [targets]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"targets={names!r}; give module names, or one string, a regular expression")
    return lambda path: any(path == name or path.endswith(f".{name}") for name in names)


def _output_head(model: nn.Module) -> nn.Module | None:
    head = embeddings(model, "output")
    # PEFT wraps a targeted head and one in modules_to_save.
    for attribute in ("base_layer", "original_module"):
        head = getattr(head, attribute, head)
    return head


def _peft_classes() -> tuple[Any, Any, Any]:
    """PEFT's layer classes and `fused_class` where PEFT is loaded: a PEFT model cannot exist without it."""
    if "peft" not in sys.modules:
        return None, None, None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    from ..layers.peft import fused_class

    return BaseTunerLayer, fused_class, ModulesToSaveWrapper


def why_nothing_to_convert(model: nn.Module, layers_found: list[TargetLayer], targets: Targets) -> str:
    """What to tell a user whose model has no layer to convert."""
    if layers_found:
        if all(target.frozen for target in layers_found):
            return f"nothing to convert in this {type(model).__name__}: every linear layer is in the frozen prefix"
        if any(isinstance(target.linear, LoGELinear) and target.linear.converted for target in layers_found):
            return "model is converted already; call loge_kernels.remove(model) first"
        shown = "; ".join(f"{target.name} {target.why_not}" for target in layers_found[:3])
        rest = f"; and {len(layers_found) - 3} more" if len(layers_found) > 3 else ""
        return f"nothing to convert in this {type(model).__name__}: {shown}{rest}"
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        return f"nothing to convert: this {type(model).__name__} has no torch.nn.Linear layer"
    return f"targets={targets!r} matches no linear layer of this {type(model).__name__}, which has {names[:5]}"
