"""PEFT's LoRA linear layers with the frozen weight and the adapter in one op.

The classes are PEFT's own with another `forward`: parameters, names, merging, saving and switching adapters stay
PEFT's. Where one op cannot stand for the layer (several active adapters, DoRA, a mixed batch, merged or disabled
adapters) PEFT's forward runs, and only the base layer's backward is low-rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .eight_bit_base import EightBitLinear
from .linear import LoGELinear


def _hooked(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return "forward" in vars(module) or bool(own)


class FusedAdapter:
    """What a layer of PEFT with a LoRA-like adapter becomes, over a base layer that is a `LoGELinear`.

    A subclass has the layer's own class as its second base and says where the adapter's matrices are: `held`,
    `why_not` and `lora`. `register_fused` makes `apply` use it.
    """

    base_layer: Any
    disable_adapters: Any
    merged: Any
    scaling: Any

    @staticmethod
    def convert_(layer: Any) -> None:
        """Make PEFT's layer one of these, in place; its base layer must be a `LoGELinear`."""
        layer.__class__ = _FUSED[type(layer)]

    def revert_(self) -> None:
        """Undo `convert_`."""
        plain: Any = next(plain for plain, fused in _FUSED.items() if fused is type(self))
        self.__class__ = plain

    def _get_name(self) -> str:
        """Of a printed model: PEFT's name for the layer, by which people search, and whose it is now."""
        return next(plain.__name__ for plain, fused in _FUSED.items() if isinstance(self, fused)) + "[LoGE]"

    def held(self) -> list[str]:
        """The active adapters that the layer has."""
        raise NotImplementedError

    def why_not(self, name: str) -> str | None:
        """Why this adapter is not two plain matrices, or None."""
        raise NotImplementedError

    def lora(self, name: str) -> tuple[Tensor, Tensor, nn.Module]:
        """The adapter's A [P, K], B [N, P] and dropout."""
        raise NotImplementedError

    def why_not_fused(self, x: Tensor | None = None) -> str | None:
        """Why the adapter cannot share the base layer's op as things stand (with this input), or None when it can."""
        found = self._find(x)
        return found if isinstance(found, str) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = "arguments" if args or kwargs else self._find(x)
        if isinstance(found, str):
            # Called where it stands: torch.compile under Python 3.13 takes no `super()` that is kept in a variable.
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.base_layer.run(x, *found)

    def _find(self, x: Tensor | None) -> str | tuple[Tensor, Tensor, float, float]:
        """A, B, scaling and dropout of the one adapter that shares the op, or why there is none."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapter is merged"
        adapters = self.held()
        if len(adapters) != 1:
            return f"{len(adapters)} active adapters"
        name = adapters[0]
        reason = self.why_not(name)
        if reason is not None:
            return reason
        A, B, dropout = self.lora(name)
        if type(dropout) not in (nn.Dropout, nn.Identity) or getattr(dropout, "p", 0.0) >= 1.0:
            return f"adapter dropout is {dropout}"
        base = self.base_layer  # once: torch looks a module up in Python
        if not isinstance(base, LoGELinear) or _has_any_global_hook() or _hooked(base) or _hooked(dropout):
            return "hooks or a wrapper on the base layer or the adapter"
        if A.dtype != B.dtype:
            return f"adapter is {A.dtype} and {B.dtype}"
        reason = base.why_not_adapter(A.dtype, x)
        if reason is not None:
            return reason
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return A, B, self.scaling[name], probability

    # PEFT writes the weight through `.data`, which torch does not count as a change: in merges, also in one that fails
    # at its second adapter, and where an adapter starts from a decomposition of the weight (PiSSA, OLoRA, ...).

    def merge(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        with self._editing():
            parent.merge(*args, **kwargs)

    def unmerge(self) -> None:
        parent: Any = super()
        with self._editing():
            parent.unmerge()

    @contextmanager
    def _editing(self) -> Iterator[None]:
        try:
            with self.base_layer.edited():
                yield
        finally:
            self.base_layer.holds_adapter = bool(self.merged)


class FusedLora(FusedAdapter):
    """What a LoRA layer of PEFT becomes."""

    active_adapters: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any

    def held(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def why_not(self, name: str) -> str | None:
        A, B = self.lora_A[name], self.lora_B[name]
        if name in self.lora_variant:
            return f"LoRA variant {type(self.lora_variant[name]).__name__}"
        if type(A) is not nn.Linear or type(B) is not nn.Linear or B.bias is not None:
            return "adapter has a bias or is not a plain linear layer"
        if _hooked(A) or _hooked(B):
            return "hooks or a wrapper on the base layer or the adapter"
        return None

    def lora(self, name: str) -> tuple[Tensor, Tensor, nn.Module]:
        return self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        config = kwargs.get("config", args[3] if len(args) > 3 else None)
        start = kwargs.get("init_lora_weights", getattr(config, "init_lora_weights", True))
        reads_weight = kwargs.get("use_dora", getattr(config, "use_dora", False))
        if reads_weight and isinstance(self.base_layer, EightBitLinear):
            raise ValueError("DoRA reads a 16-bit weight, and apply(base_dtype=) has replaced it: use LoRA")
        writes = isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva")
        with self.base_layer.edited() if writes else nullcontext():
            parent.update_layer(*args, **kwargs)


class LoGELoraLinear(FusedLora, LoraLinear):
    """`peft.tuners.lora.Linear` over a `LoGELinear` base layer."""


class LoGETorchaoLoraLinear(FusedLora, TorchaoLoraLinear):
    """PEFT's layer over a weight that torchao quantised."""


_FUSED: dict[type[nn.Module], type[FusedAdapter]] = {}


def register_fused(layer_class: type[nn.Module], fused_class: type[FusedAdapter]) -> None:
    """Let `apply` turn layers whose class is `layer_class` (a layer of PEFT's around a linear one) into `fused_class`,
    whose adapter shares the base layer's op, and `remove` turn them back.

    Raises TypeError where `fused_class` does not build on `FusedAdapter` first and on `layer_class`, ValueError where
    `layer_class` has one already.
    """
    if not (issubclass(fused_class, FusedAdapter) and issubclass(fused_class, layer_class)):
        raise TypeError(
            f"fused_class={fused_class.__name__}: give a class with the bases (FusedAdapter, {layer_class.__name__})"
        )
    if layer_class in _FUSED:
        raise ValueError(f"layer_class={layer_class.__name__} has {_FUSED[layer_class].__name__} already")
    _FUSED[layer_class] = fused_class


def fused_class(layer: nn.Module) -> type[FusedAdapter] | None:
    """What `apply` makes of this layer; None for one whose adapter stays its own."""
    return _FUSED.get(type(layer))


register_fused(LoraLinear, LoGELoraLinear)
register_fused(TorchaoLoraLinear, LoGETorchaoLoraLinear)

if is_bnb_available() and is_bnb_4bit_available():
    from peft.tuners.lora import bnb

    class LoGELoraLinear4bit(FusedLora, bnb.Linear4bit):
        """PEFT's layer over `bitsandbytes.nn.Linear4bit`."""

    class LoGELoraLinear8bitLt(FusedLora, bnb.Linear8bitLt):
        """PEFT's layer over `bitsandbytes.nn.Linear8bitLt`."""

    register_fused(bnb.Linear4bit, LoGELoraLinear4bit)
    register_fused(bnb.Linear8bitLt, LoGELoraLinear8bitLt)
