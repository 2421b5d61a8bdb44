"""The groups in which `loge.fully_shard` has FSDP2 gather what belongs to one block: its frozen weights, its factors,
its 8-bit copies, each where it is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..factors.factors import Factors
from ..layers.linear import LoGELinear
from ..layers.sharded import computed_again, in_backward
from ..numerics.eight_bit import EightBitWeight, as_bits, from_bits


class FactorStore(nn.Module):
    """The tensors of factors as parameters, which is what FSDP shards. It belongs to a group, and to no block."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.left = nn.Parameter(factors.left, requires_grad=False)
        self.right = nn.Parameter(factors.right, requires_grad=False)
        residual = factors.residual
        self.residual = None if residual is None else nn.Parameter(residual, requires_grad=False)


class ShardedFactors(Factors):
    """Factors whose tensors are those of a `FactorStore`, as FSDP has them at the moment."""

    gathered_apart = True
    store: FactorStore
    left = property(lambda self: self.store.left)
    right = property(lambda self: self.store.right)
    residual = property(lambda self: self.store.residual)

    @classmethod
    def become_(cls, factors: Factors) -> None:
        """Make plain factors such ones, in place."""
        store = FactorStore(factors)
        for name in ("left", "right", "residual"):
            del factors.__dict__[name]
        factors.__class__ = cls
        factors.store = store  # type: ignore[attr-defined]

    def apply_(self, fn: Any) -> None:
        """FSDP moves what it shards."""


class ShardedCopy(EightBitWeight):
    """An 8-bit copy whose tensors are those of a `CopyStore`, as FSDP has them at the moment. Where a checkpoint
    computes the layer again, the weight is there, and the copy is made of it."""

    gathered_apart = True
    store: CopyStore
    tensor = property(lambda self: from_bits(self.store.tensor).t())
    scale = property(lambda self: self.store.scale.view(torch.float32))

    @classmethod
    def become_(cls, copy: EightBitWeight) -> None:
        """Make a plain copy, which has been made, such a one, in place."""
        store = CopyStore(copy)
        for name in ("tensor", "scale"):
            del copy.__dict__[name]
        copy.__class__ = cls
        copy.store = store  # type: ignore[attr-defined]
        copy.changed = False  # type: ignore[attr-defined]

    def current(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.changed:
            raise ValueError(
                "the weight of a layer has changed since it was sharded, and its 8-bit copy cannot follow: load or "
                "merge weights before the model is sharded"
            )
        return self.tensor, self.scale

    def made_in_backward(self, weight: Tensor) -> bool:
        # Layer by layer: a block's copies, made by its recomputation, would lie beside its weights.
        return computed_again()

    def invalidate(self) -> None:
        self.changed = True

    def moved(self) -> None:
        """FSDP moves what it shards."""


class CopyStore(nn.Module):
    """An 8-bit copy as parameters, column by column of the weight, in integers: FSDP's mixed precision casts none."""

    def __init__(self, copy: EightBitWeight) -> None:
        super().__init__()
        assert copy.tensor is not None
        assert copy.scale is not None
        self.tensor = nn.Parameter(as_bits(copy.tensor.t()), requires_grad=False)  # [K, N]
        self.scale = nn.Parameter(copy.scale.view(torch.int32), requires_grad=False)  # [K]


class Group(nn.Module):
    """Some parameters of one block as one group of FSDP's, which stands around the block's forward and is gathered for
    the backward of a forward that says so.

    Several forwards may come before their backwards, and each has its own kind: a hook on the block's output, which
    runs before FSDP's own, tells FSDP which it is. The group has submodules while FSDP takes stock, and none
    afterwards: neither names nor state dicts change.
    """

    name: str  # in the block

    def __init__(self, layers: list[LoGELinear]) -> None:
        super().__init__()
        self._layers = tuple(layers)  # a tuple of modules is no submodule
        self._modules.update({str(index): module for index, module in enumerate(self.held())})
        self._run: Any = None

    def held(self) -> Iterable[nn.Module]:
        """The modules whose parameters it has while FSDP takes stock."""
        return self._layers

    def members(self) -> set[nn.Parameter]:
        """The parameters that belong to the group, as they are now: whole or sharded."""
        raise NotImplementedError

    def wanted(self) -> bool:
        """Whether the backward of the forward under way reads what the group holds."""
        raise NotImplementedError

    def has_weights(self) -> bool:
        """Whether that backward has the block's frozen weights, as it does where one layer reads its own: then nothing
        else is gathered for it."""
        return any(map(reads_weight, self._layers))

    def around(self, block: Any) -> None:
        """Stand around the forward of `block` from now on."""
        # Of the same block. One hook for all of them: FSDP's own of the first would gather ahead for the others.
        self.asked: tuple[Group, ...] = (self,)
        self.ahead: tuple[Group, ...] = ()  # of the block before, which FSDP gathers in this one's backward
        self.answer = False  # `wanted` of the last forward
        as_fsdp(self).set_unshard_in_backward(False)  # until a forward asks for it
        self._modules.clear()
        # Looked up at each call: FSDP and transformers' checkpointing change the block's class.
        self._run = vars(block).get("forward") or (lambda *args, **kwargs: type(block).forward(block, *args, **kwargs))
        block.forward = self._enter
        block.add_module(self.name, self)

    @torch.compiler.disable
    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._run(*args, **kwargs)
        if self.asked and torch.is_grad_enabled():
            for group in self.asked:
                group.answer = group.wanted()
                # A later block, in whose backward FSDP gathers ahead, may have no groups to say so.
                as_fsdp(group).set_unshard_in_backward(group.answer)
            answers = [(group, group.answer) for group in (*self.asked, *self.ahead)]
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._before_backward(answers))
        return output

    def _before_backward(self, answers: list[tuple[Group, bool]]) -> None:
        for group, wanted in answers:
            as_fsdp(group).set_unshard_in_backward(wanted)
        for group, wanted in answers:
            if wanted and group in self.asked:
                as_fsdp(group).unshard()  # FSDP itself would not, after another forward's backward in the same pass


class FrozenWeights(Group):
    """Gathered for the forward, and for a backward that reads the dense weight or computes its layer again."""

    name = "loge_frozen_weights"

    def members(self) -> set[nn.Parameter]:
        held = [entry for layer in self._layers for entry in layer.named_parameters(recurse=False)]
        return {p for name, p in held if name in ("weight", "bias") and not p.requires_grad}

    def around(self, block: Any) -> None:
        super().around(block)
        for layer in self._layers:
            layer.gather = self._gather

    @torch.compiler.disable
    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self._layers:
            if isinstance(layer, LoGELinear):  # not after `remove`
                layer.follow_shard()
        return self(*args, **kwargs)

    def wanted(self) -> bool:
        return self.has_weights()

    def _gather(self) -> None:
        """Called by a layer that a checkpoint computes again in backward, and that finds its weight sharded."""
        as_fsdp(self).set_unshard_in_backward(True)
        as_fsdp(self).unshard()


class CopyGroup(Group):
    """8-bit copies, gathered for the backward of an exact forward, and never for a forward, which hands them on without
    reading them. A block of which a checkpoint computes a part again has its weights there, and makes its copies of
    them: then nothing is gathered twice."""

    name = "loge_copies"

    def held(self) -> Iterable[nn.Module]:
        return [layer.eight_bit.store for layer in self._layers if isinstance(layer.eight_bit, ShardedCopy)]

    def members(self) -> set[nn.Parameter]:
        return {p for store in self.held() for p in store.parameters()}

    def around(self, block: Any) -> None:
        super().around(block)
        as_fsdp(self).set_custom_all_gather(GatherInBackward())

    def wanted(self) -> bool:
        return not self.has_weights() and any(map(reads_copy, self._layers))


class FactorGroup(Group):
    """Gathered for the backward alone, of a forward none of whose layers has its weight gathered.

    A forward hands factors on to its backward without reading them, so in FSDP's gather before a forward nothing is
    sent: the factors have their shape, and no values yet.
    """

    name = "loge_factors"

    def held(self) -> Iterable[nn.Module]:
        return [layer.factors.store for layer in self._layers if isinstance(layer.factors, ShardedFactors)]

    def members(self) -> set[nn.Parameter]:
        found = {p for store in self.held() for p in store.parameters()}
        return {p for p in found if p.numel() > 0}  # of rank 0 there is nothing to shard

    def around(self, block: Any) -> None:
        super().around(block)
        self._gathered = GatherInBackward()
        as_fsdp(self).set_custom_all_gather(self._gathered)
        for layer in self._layers:
            if layer.factors is not None:
                layer.factors.gather = self._gather

    def wanted(self) -> bool:
        read = any(isinstance(layer, LoGELinear) and layer.reads_factors() for layer in self._layers)
        return read and not self.has_weights()

    def _gather(self) -> None:
        """Called in a forward that reads factors (it casts them, under autocast), and for all that follow."""
        if not (in_backward() or self._gathered.in_forward):
            self._gathered.in_forward = True
            as_fsdp(self).reshard()
            as_fsdp(self).unshard()


class GatherInBackward:
    """Torch's own all-gather in backward, none in forward (`in_forward`: there too). The interface is that of
    `torch.distributed.fsdp`'s `set_custom_all_gather`."""

    in_forward = False

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if not (self.in_forward or in_backward()):
            return None
        return torch.distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def as_fsdp(module: Any) -> Any:
    """A module whose class torch has changed to an FSDPModule's."""
    return module


def reads_copy(layer: nn.Module) -> bool:
    """Whether the backward of the forward under way reads the layer's sharded 8-bit copy."""
    if not isinstance(layer, LoGELinear) or not isinstance(layer.eight_bit, ShardedCopy):
        return False
    return layer.reads_dense() and not layer.recomputed


def reads_weight(layer: nn.Module) -> bool:
    """Whether it reads the dense weight; after `remove` it does."""
    return not isinstance(layer, LoGELinear) or (layer.reads_dense() and not reads_copy(layer))
