"""Norms that train in float32 inside a 16-bit model.

The weight of a norm is close to 1, where bfloat16 has steps of 2^-8 and 2^-7: an optimizer's updates round to nothing.
float16 gradients are what no `GradScaler` takes. So the copy that trains is in float32; what comes out of it is in the
dtype of what went in.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .families import is_norm


class _Float32:
    """The hooks around such a norm, whose weight was in `base` before."""

    def __init__(self, base: torch.dtype) -> None:
        self.base = base
        self._given = base  # the dtype of the input of the call under way

    def before(self, norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._given = inputs[0].dtype
        return inputs[0].to(next(norm.parameters()).dtype), *inputs[1:]

    def after(self, norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self._given)


def train_in_float32(model: nn.Module, adapter: str) -> None:
    """Make the norms of `adapter`, copies in `modules_to_save`, train in float32 where they are in 16 bits."""
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter not in module.modules_to_save:
            continue
        norm = module.modules_to_save[adapter]
        dtype = next(norm.parameters()).dtype
        if is_norm(norm) and dtype in (torch.float16, torch.bfloat16):
            norm.float()
            hooks = _Float32(dtype)
            norm.register_forward_pre_hook(hooks.before)
            norm.register_forward_hook(hooks.after)


def back_to_base(model: nn.Module) -> None:
    """Round every such norm of an unloaded model to the precision around it."""
    for norm in model.modules():
        for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
            for key, hook in list(hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, _Float32):
                    del hooks[key]
                    norm.to(owner.base)
