"""What a module of the frozen prefix becomes: itself, without autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class NoAutograd:
    """Comes before a module's own class in the bases of one class for each (`_without_autograd`).

    The call is what is overridden, not `forward`: hooks on the module run inside too, and one that makes an embedding's
    output require gradients (`enable_input_require_grads`) has no effect past it.
    """

    _trainable_before: tuple[str, ...]  # names, below this module, of the parameters that froze
    _last: bool  # whether what comes next trains

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        # Reentrant checkpointing gives the parameters of the next layer a gradient only if its input requires one.
        lead = self._last and torch.is_grad_enabled() and _checkpointed_reentrantly(self)
        return tree_map(lambda value: _cut(value, lead), output)

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """Stands before transformers' attribute: without autograd there is nothing to checkpoint."""
        return _call

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        vars(self)["_gradient_checkpointing_func"] = function

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name of its own that pickle and copy could look up.
        return _rebuilt, (type(self).__mro__[2],), self.__getstate__() if hasattr(self, "__getstate__") else vars(self)


def freeze_(module: nn.Module, trainable: tuple[str, ...], last: bool) -> None:
    """Run `module` without autograd from now on, in place; the named parameters below it stop training."""
    for name in trainable:
        module.get_parameter(name).requires_grad_(False)
    frozen: Any = module
    own: Any = type(module)
    frozen.__class__ = _without_autograd(own)
    frozen._trainable_before, frozen._last = trainable, last


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze_` changed this very module; those inside it run without autograd, too."""
    return isinstance(module, NoAutograd)


def unfreeze_(module: nn.Module) -> None:
    """Undo `freeze_`. Parameters that are gone since (an adapter that was deleted) are passed over."""
    frozen: Any = module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in frozen._trainable_before:
        if name in parameters:
            parameters[name].requires_grad_()
    del frozen._trainable_before, frozen._last
    module.__class__ = type(module).__mro__[2]


@functools.cache
def _without_autograd(own: Any) -> Any:
    # Under its own name: libraries choose modules by the name of their class (accelerate's device maps).
    body = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (NoAutograd, own), body)


def _rebuilt(own: Any) -> Any:
    frozen = _without_autograd(own)
    return frozen.__new__(frozen)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _cut(value: Any, lead: bool) -> Any:
    if not isinstance(value, Tensor) or not (value.requires_grad or lead):
        return value
    return value.detach().requires_grad_(lead and value.is_floating_point())


def _checkpointed_reentrantly(module: Any) -> bool:
    """Whether transformers checkpoints the layers of this module's kind so."""
    function = vars(module).get("_gradient_checkpointing_func")
    if function is None or not module.training or not getattr(module, "gradient_checkpointing", False):
        return False
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
