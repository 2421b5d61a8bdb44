"""`freeze`: the embedding and the first layers of a model run without autograd, and backward stops above them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..collectives import unwrapped
from .frozen_module import freeze_, is_frozen, unfreeze_
from .plan import FreezePlan
from .prefix import find_stack


@dataclass(frozen=True, slots=True)
class FrozenPrefix:
    """What `freeze` did: `layers` of `total` frozen, and the names of the parameters that stopped training."""

    layers: int
    total: int
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        stopped = f"{len(self.parameters)} parameter tensors stopped training"
        return f"the embedding and {self.layers} of {self.total} layers run without autograd; {stopped}"


def freeze(model: nn.Module, below: int | FreezePlan) -> FrozenPrefix:
    """Freeze the embedding and the first `below` layers of `model`, in place; `loge_kernels.remove(model)` undoes it.

    They run without autograd: no activations are kept, and the backward pass stops at the first layer that trains.
    Whatever trained in them (adapters too) has `requires_grad` False. The function that the model computes stays the
    same, dropout included. Gradient checkpointing and PEFT's `enable_input_require_grads` may be on or off. Parameters
    that are used above, too (an embedding tied to a trained head), go on training there. It composes with `apply`,
    before or after it, and `apply(freeze_below=)` does both.

    Freeze before the optimizer is made, and before `DistributedDataParallel` is, which waits for the gradient of every
    parameter that trained when it was made. PEFT's `set_adapter`, and leaving its `disable_adapter()`, make all of an
    adapter trainable: freeze after the first, and make the optimizer before the second. What is frozen gets no gradient
    even so.

    Args:
        model: any module with one stack of layers in an `nn.ModuleList`: the models of transformers, with PEFT or
            without, but for those of an encoder and a decoder.
        below: the number of layers, from 1 to all of them, or what `plan_freezing` returned.

    Raises:
        ValueError, TypeError: a number beyond the last layer or below 1, a plan for another number of layers, a model
            without one stack of layers or with others that train, frozen already, left with nothing to train, or in a
            `DistributedDataParallel` that would miss gradients. The model is as it was.

    Source: Gu et al., arXiv 2406.11753.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    inner = unwrapped(model)
    if any(map(is_frozen, inner.modules())):
        raise ValueError("layers of model are frozen already: call loge_kernels.remove(model) first")
    stack = find_stack(inner)
    count = _count(below, len(stack.layers))
    for name, modules in stack.others:
        if any(p.requires_grad for p in modules.parameters()):
            raise ValueError(
                f"layers in {name!r} train, and where they run before {stack.name!r} (a vision tower?) no gradient "
                f"would reach them: model.get_submodule({name!r}).requires_grad_(False) first"
            )
    prefix = [*stack.before, *stack.layers[:count]]
    outside = _parameters_outside(inner, prefix)
    stopping = [tuple(_trained(module, outside)) for module in prefix]
    names = {id(p): name for name, p in inner.named_parameters()}
    stopped = tuple(names[id(m.get_parameter(name))] for m, some in zip(prefix, stopping, strict=True) for name in some)
    if stopped and not any(p.requires_grad for p in outside.values()):
        raise ValueError(f"freeze_below={count} of {len(stack.layers)} layers leaves no parameter that trains")
    if stopped and inner is not model:
        raise ValueError(
            f"model is a DistributedDataParallel, and would wait for the gradient of {stopped[0]}: freeze before it "
            "is made"
        )
    for position, (module, trainable) in enumerate(zip(prefix, stopping, strict=True), 1):
        freeze_(module, trainable, last=position == len(prefix))
    return FrozenPrefix(count, len(stack.layers), stopped)


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze`, on a copy of the model too."""
    for module in list(model.modules()):
        if is_frozen(module):
            unfreeze_(module)


def _count(below: int | FreezePlan, total: int) -> int:
    if isinstance(below, FreezePlan):
        if below.layers != total:
            raise ValueError(f"freeze_below is a plan for {below.layers} layers, and this model has {total}")
        return below.boundary
    if isinstance(below, bool) or not isinstance(below, int):
        raise TypeError(f"freeze_below={below!r} is a {type(below).__name__}; give a number of layers or a FreezePlan")
    if not 1 <= below <= total:
        raise ValueError(f"freeze_below={below}: this model has {total} layers; give a number from 1 to {total}")
    return below


def _parameters_outside(model: nn.Module, prefix: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    inside = {id(module) for frozen in prefix for module in frozen.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    return {id(p): p for module in outside for p in module.parameters(recurse=False)}


def _trained(module: nn.Module, outside: dict[int, nn.Parameter]) -> Iterable[str]:
    return (name for name, p in module.named_parameters() if p.requires_grad and id(p) not in outside)
