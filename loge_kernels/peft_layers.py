"""PEFT's LoRA linear layer with the frozen weight and the adapter in one op.

The class is PEFT's own with another `forward`: parameters, names, merging, saving and switching adapters stay PEFT's.
Where one op cannot stand for the layer (several active adapters, DoRA, a mixed batch, merged or disabled adapters)
PEFT's forward runs, and only the base layer's backward is low-rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from .linear import LoGELinear
from .ops import linear


def _hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class LoGELoraLinear(LoraLinear):
    """`peft.tuners.lora.Linear` over a `LoGELinear` base layer."""

    @classmethod
    def convert_(cls, layer: LoraLinear) -> None:
        """Make PEFT's layer one of these, in place; its base layer must be a `LoGELinear`."""
        layer.__class__ = cls

    def revert_(self) -> None:
        """Undo `convert_`."""
        self.__class__ = LoraLinear

    def obstacle(self) -> str | None:
        """Why the adapter cannot share the base layer's op as things stand, or None when it can."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapter is merged"
        if len(adapters) != 1:
            return f"{len(adapters)} active adapters"
        name = adapters[0]
        A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if name in self.lora_variant:
            return f"LoRA variant {type(self.lora_variant[name]).__name__}"
        if type(A) is not nn.Linear or type(B) is not nn.Linear or B.bias is not None:
            return "adapter has a bias or is not a plain linear layer"
        if type(dropout) not in (nn.Dropout, nn.Identity) or getattr(dropout, "p", 0.0) >= 1.0:
            return f"adapter dropout is {dropout}"
        if A.weight.dtype not in (self.base_layer.weight.dtype, torch.float32) or A.weight.dtype != B.weight.dtype:
            return f"adapter is {A.weight.dtype} over a {self.base_layer.weight.dtype} base"
        if type(self.base_layer) is not LoGELinear or any(map(_hooked, (self.base_layer, A, B, dropout))):
            return "hooks or a wrapper on the base layer or the adapter"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.obstacle() is not None:
            return super().forward(x, *args, **kwargs)
        name = next(name for name in self.active_adapters if name in self.lora_A)
        base: Any = self.base_layer
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        dropout: Any = self.lora_dropout[name]
        return linear(
            x,
            base.weight,
            base.current_factors(),
            base.bias,
            A.weight,
            B.weight,
            self.scaling[name],
            dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
            base.exact_fraction,
            base.backend,
            base.eight_bit,
        )

    # PEFT writes the weight through `.data`, which torch does not count as a change: in merges, also in one that fails
    # at its second adapter, and where an adapter starts from a decomposition of the weight (PiSSA, OLoRA, ...).

    def merge(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().merge(*args, **kwargs)
        finally:
            self._invalidate()

    def unmerge(self) -> None:
        try:
            super().unmerge()
        finally:
            self._invalidate()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)
        config = kwargs.get("config", args[3] if len(args) > 3 else None)
        start = kwargs.get("init_lora_weights", getattr(config, "init_lora_weights", True))
        if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva"):
            self._invalidate()

    def _invalidate(self) -> None:
        base: Any = self.base_layer
        base.invalidate()
