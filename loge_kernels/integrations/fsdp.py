"""FSDP2 whose backward gathers no frozen weight.

Torch's `fully_shard` gathers what a layer holds before its forward and once more before its backward. The low-rank
backward reads factors and adapters alone, so `fully_shard` here keeps the frozen weights of a layer in a group of their
own that backward leaves alone, prefetching included. With N·K elements of weight and R·(N + K) of factors, backward
gathers R·(N + K) / (N·K) of the bytes, and nothing of an offloaded weight is copied to the device a second time.

A backward that does read the dense weight gathers it as torch does: that of an exact forward (`exact_every`), one with
exact rows (`exact_fraction`), and one that computes its layer again (activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..factors.factors import Factors
from ..freezing.frozen_module import is_frozen
from ..layers.linear import LoGELinear
from ..layers.quantized import QuantizedLinear


def fully_shard(model: nn.Module, *, blocks: Iterable[nn.Module] | None = None, **arguments: Any) -> nn.Module:
    """Shard an applied model over the ranks with FSDP2, layer by layer, so that backward gathers factors and adapters
    but no frozen weight.

    Call it after `apply`, on every rank, and make the optimizer afterwards: in the place of
    `torch.distributed.fsdp.fully_shard` on each layer and then on the model. Names and the state dict stay as they are.
    Factors are sharded with the adapters: each rank keeps its share of them, and those of rank 0 count.

    Args:
        model: what `loge_kernels.apply` changed, with PEFT or without.
        blocks: the layers to gather one after another, in the order in which they run; None: the members of every
            `nn.ModuleList` that lies in no other.
        arguments: as of `torch.distributed.fsdp.fully_shard` (mesh, mp_policy, offload_policy, ignored_params,
            reshard_after_forward, …), for every group. Frozen weights are freed after every forward, whatever
            `reshard_after_forward` says: nothing would read them.

    Returns:
        The model, changed in place.

    Raises:
        ValueError, TypeError: a model that is not applied or sharded already, one whose blocks are not known, a
            quantised weight, an 8-bit copy (`exact_dtype`, `low_rank_dtype`): the message says what to apply instead.
            The model is as it was.

    Source: Zhao et al., arXiv 2304.11277 (fully sharded data parallelism); its second version is torch's.
    """
    from torch.distributed.fsdp import fully_shard as shard

    named = _check(model)
    chosen = _blocks(model, blocks)
    mesh = arguments.pop("mesh", None) or _default_mesh()
    arguments["mesh"] = mesh
    ignored = set(arguments.pop("ignored_params", None) or ())
    for layer in named.values():
        layer.current_factors()  # up to date while the weight is whole
    all_factors = [layer.factors for layer in named.values() if layer.factors is not None]
    for factors in all_factors:
        factors.apply_(lambda tensor: tensor.to(_device(mesh)))
        _agree(factors.tensors if factors.rows is None else [*factors.tensors, factors.rows], mesh)
        _ShardedFactors.become_(factors)
    previous: list[Any] = []
    for block in chosen:
        layers = _cheap_layers(block)
        stages: list[Any] = []
        for group in (_FrozenWeights(layers), _Factors(layers)):
            mine = group.members() - ignored
            if mine:
                # Freed after every forward: nothing reads them until backward gathers them, or ever.
                kept = arguments | {"reshard_after_forward": True}
                shard(group, **kept, ignored_params=ignored | set(group.parameters()) - mine)
                ignored |= set(group.members())
                group.around(block)
                stages.append(group)
        shard(block, **arguments, ignored_params=ignored)
        if is_frozen(block):
            _as_fsdp(block).set_unshard_in_backward(False)
        stages.append(block)
        if previous:
            for stage in stages:
                stage.set_modules_to_backward_prefetch(previous)
                if isinstance(stage, _FrozenWeights):
                    stage.together = (stage, *(s for s in previous if isinstance(s, _FrozenWeights)))
        previous = stages
    shard(model, **arguments, ignored_params=ignored)
    for layer in named.values():
        layer.note_shard()
    return model


class _Store(nn.Module):
    """The tensors of factors as parameters, which is what FSDP shards. It belongs to a group, and to no block."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.left = nn.Parameter(factors.left, requires_grad=False)
        self.right = nn.Parameter(factors.right, requires_grad=False)
        residual = factors.residual
        self.residual = None if residual is None else nn.Parameter(residual, requires_grad=False)


class _ShardedFactors(Factors):
    """Factors whose tensors are those of a `_Store`, as FSDP has them at the moment."""

    store: _Store
    left = property(lambda self: self.store.left)
    right = property(lambda self: self.store.right)
    residual = property(lambda self: self.store.residual)

    @classmethod
    def become_(cls, factors: Factors) -> None:
        """Make plain factors such ones, in place."""
        store = _Store(factors)
        for name in ("left", "right", "residual"):
            del factors.__dict__[name]
        factors.__class__ = cls
        factors.store = store  # type: ignore[attr-defined]

    def apply_(self, fn: Any) -> None:
        """FSDP moves what it shards."""


class _Group(nn.Module):
    """Some parameters of one block as one group of FSDP's, which stands around the block's forward.

    It has submodules while FSDP takes stock, and none afterwards: neither names nor state dicts change.
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

    def around(self, block: Any) -> None:
        """Stand around the forward of `block` from now on."""
        self._modules.clear()
        # Looked up at each call: FSDP and transformers' checkpointing change the block's class.
        self._run = vars(block).get("forward") or (lambda *args, **kwargs: type(block).forward(block, *args, **kwargs))
        block.forward = self._enter
        block.add_module(self.name, self)

    @torch.compiler.disable
    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class _FrozenWeights(_Group):
    """Gathered for the forward, and for a backward that reads the dense weight.

    Several forwards may come before their backwards, and each has its own kind: a hook on the block's output, which
    runs before FSDP's own, tells FSDP which it is.
    """

    name = "loge_frozen_weights"

    def members(self) -> set[nn.Parameter]:
        held = [entry for layer in self._layers for entry in layer.named_parameters(recurse=False)]
        return {p for name, p in held if name in ("weight", "bias") and not p.requires_grad}

    def around(self, block: Any) -> None:
        super().around(block)
        self._recomputed = False
        self.together: tuple[_FrozenWeights, ...] = (self,)  # and those that FSDP gathers ahead in its backward
        for layer in self._layers:
            layer.gather = self._gather

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if torch.is_grad_enabled() and not _in_backward():
            reads = self._recomputed or any(map(_reads_weight, self._layers))
            self._recomputed = False
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._before_backward(reads))
        return output

    def _before_backward(self, reads: bool) -> None:
        for stage in self.together:
            _as_fsdp(stage).set_unshard_in_backward(reads)
        if reads:
            _as_fsdp(self).unshard()  # FSDP itself would not, after another forward's backward in the same pass

    def _gather(self) -> None:
        """Called by a layer that finds its weight sharded: in backward a checkpoint computes it again. The next step's
        backward will prefetch."""
        if not _in_backward():
            return
        self._recomputed = True
        _as_fsdp(self).set_unshard_in_backward(True)
        _as_fsdp(self).unshard()


class _Factors(_Group):
    """Gathered for the backward alone.

    A forward hands factors on to its backward without reading them, so in FSDP's gather before a forward nothing is
    sent: the factors have their shape, and no values yet.
    """

    name = "loge_factors"

    def held(self) -> Iterable[nn.Module]:
        return [layer.factors.store for layer in self._layers if isinstance(layer.factors, _ShardedFactors)]

    def members(self) -> set[nn.Parameter]:
        found = {p for store in self.held() for p in store.parameters()}
        return {p for p in found if p.numel() > 0}  # of rank 0 there is nothing to shard

    def around(self, block: Any) -> None:
        super().around(block)
        self._gathered = _GatherInBackward()
        _as_fsdp(self).set_custom_all_gather(self._gathered)
        for layer in self._layers:
            if layer.factors is not None:
                layer.factors.gather = self._gather

    def _gather(self) -> None:
        """Called in a forward that reads factors (it casts them, under autocast), and for all that follow."""
        if not (_in_backward() or self._gathered.in_forward):
            self._gathered.in_forward = True
            _as_fsdp(self).reshard()
            _as_fsdp(self).unshard()


class _GatherInBackward:
    """Torch's own all-gather in backward, none in forward (`in_forward`: there too). The interface is that of
    `torch.distributed.fsdp`'s `set_custom_all_gather`."""

    in_forward = False

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if not (self.in_forward or _in_backward()):
            return None
        return torch.distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _as_fsdp(module: Any) -> Any:
    """A module whose class torch has changed to an FSDPModule's."""
    return module


def _reads_weight(layer: nn.Module) -> bool:
    """Whether the backward of the forward under way reads the dense weight; after `remove` it does."""
    return not isinstance(layer, LoGELinear) or layer.reads_weight()


def _cheap_layers(block: nn.Module) -> list[LoGELinear]:
    return [m for m in block.modules() if isinstance(m, LoGELinear) and m.factors is not None]


def _check(model: nn.Module) -> dict[str, LoGELinear]:
    """The converted layers by name; ValueError or TypeError where they cannot be sharded."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model is sharded already: loge_kernels.fully_shard comes in the place of torch's")
    named = {name: module for name, module in model.named_modules() if isinstance(module, LoGELinear)}
    if not any(layer.factors is not None for layer in named.values()):
        raise ValueError(
            f"no layer of this {type(model).__name__} has factors: call loge_kernels.apply(model, rank, …) first, or "
            "torch's own fully_shard"
        )
    for name, layer in named.items():
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"layer {name!r} is quantised ({layer.label(layer)}): its weight cannot be sharded; use DDP"
            )
        if layer.factors is not None and layer.weight.requires_grad:
            raise ValueError(
                f"layer {name!r} has factors of a weight that trains, which could not follow it: freeze the weight, or "
                "leave the layer out of apply's targets"
            )
        if layer.exact_dtype is not None:
            raise ValueError(
                f"layer {name!r} has exact_dtype={layer.exact_dtype!r}, whose 8-bit copy every rank would keep whole: "
                "apply with exact_dtype=None"
            )
        if layer.factors is not None and layer.factors.low_rank_dtype is not None:
            raise ValueError(
                f"layer {name!r} has low_rank_dtype={layer.factors.low_rank_dtype!r}, whose 8-bit copies every rank "
                "would keep whole: apply with low_rank_dtype=None"
            )
    return named


def _blocks(model: nn.Module, blocks: Iterable[nn.Module] | None) -> list[nn.Module]:
    inside = {id(module) for module in model.modules()}
    found: dict[int, nn.Module] = {}
    for block in _members_of_lists(model) if blocks is None else blocks:
        if not isinstance(block, nn.Module) or id(block) not in inside:
            raise ValueError(f"blocks holds a {type(block).__name__} that is no module of model")
        if not _runs(block):
            raise ValueError(f"blocks holds a {type(block).__name__}, which has no forward: give its members")
        found[id(block)] = block
    if not any(_cheap_layers(block) for block in found.values()):
        if blocks is not None:
            raise ValueError("blocks holds no converted layer: give the modules that hold them, such as its layers")
        raise ValueError(
            f"this {type(model).__name__} has no torch.nn.ModuleList whose members hold converted layers: give blocks="
            ", the modules to gather one after another"
        )
    return list(found.values())


def _members_of_lists(model: nn.Module) -> Iterator[nn.Module]:
    """The members of every `nn.ModuleList` that lies in no member of another; of lists of lists, the innermost."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in seen:
            for block in module:
                if _runs(block) and next(block.parameters(), None) is not None:
                    seen.update(id(child) for child in block.modules())
                    yield block


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward: containers have none."""
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in vars(module)


def _default_mesh() -> Any:
    """All ranks in one dimension, as torch's own `fully_shard` takes them."""
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        raise ValueError("torch.distributed is not initialised: call torch.distributed.init_process_group() first")
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # not what torch was built for
    kind = "cpu" if accelerator is None else accelerator.type
    return init_device_mesh(kind, (torch.distributed.get_world_size(),))


def _device(mesh: Any) -> torch.device:
    """This rank's device of the mesh, to which torch's `fully_shard` moves what it manages."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


@torch.no_grad()
def _agree(tensors: list[Tensor], mesh: Any) -> None:
    """Give every rank of `mesh` the values of its first: a rank keeps a piece of its own factors, and pieces of
    different decompositions (of another processor) would not fit together."""
    device = torch.device(mesh.device_type)
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        sent = tensor.detach().to(device)
        for dimension in range(mesh.ndim):
            torch.distributed.broadcast(sent, group=mesh.get_group(dimension), group_src=0)
        tensor.copy_(sent)
