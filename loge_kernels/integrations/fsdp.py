"""FSDP2 whose backward gathers no frozen weight.

Torch's `fully_shard` gathers what a layer holds before its forward and once more before its backward. An exact backward
in 8 bits reads the 8-bit copy of a weight, half or a quarter of its bytes, and a low-rank one factors. `fully_shard`
here keeps the frozen weights of a layer in a group of their own that such backwards leave alone, prefetching included,
and shards copies and factors in groups that are gathered in backward alone. With N·K elements of weight and R·(N + K)
of factors, a low-rank backward gathers R·(N + K) / (N·K) of the bytes, and nothing of an offloaded weight is copied to
the device a second time.

A backward that does read a dense weight gathers its block's as torch does: that of an exact forward without 8 bits,
and one that computes a part of the block again (activation checkpointing). There the weights are at hand, so the
backward of all layers in the block is exact, with an 8-bit copy of the weight or with itself, and nothing else is
gathered: never more than by PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..freezing.frozen_module import is_frozen
from ..layers.linear import LoGELinear
from ..layers.quantized import QuantizedLinear
from ..numerics.eight_bit import as_bits, why_not
from ..numerics.four_bit import FORMATS
from .agreement import agreed
from .fsdp_groups import (
    CopyGroup,
    FactorGroup,
    FrozenWeights,
    Group,
    ShardedCopy,
    ShardedFactors,
    as_fsdp,
)


def fully_shard(model: nn.Module, *, blocks: Iterable[nn.Module] | None = None, **arguments: Any) -> nn.Module:
    """Shard an applied model over the ranks with FSDP2, layer by layer, so that backward gathers 8-bit copies, factors
    and adapters, but no frozen weight that it does not read.

    Call it after `apply`, on every rank, and make the optimizer afterwards: in the place of
    `torch.distributed.fsdp.fully_shard` on each layer and then on the model. Names and the state dict stay as they are.
    8-bit copies and factors are sharded with the adapters: each rank keeps its share of them, and rank 0's count.

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
            quantised weight that FSDP2 cannot split (torchao's) or would cast, factors in 8 bits (`low_rank_dtype`),
            exact products in 4 bits: the message says what to do instead. Where one rank raises, or ranks applied the
            model differently (`agreement`), all raise. The model is as it was.

    Source: Zhao et al., arXiv 2304.11277 (fully sharded data parallelism); its second version is torch's.
    """
    from torch.distributed.fsdp import fully_shard as shard

    policy = arguments.get("mp_policy")

    def check() -> tuple[dict[str, LoGELinear], list[nn.Module]]:
        return _check(model, None if policy is None else policy.param_dtype), _blocks(model, blocks)

    if not torch.distributed.is_initialized():
        check()  # what is wrong with the model is said first
    mesh = arguments.pop("mesh", None) or _default_mesh()
    named, chosen = agreed(model, mesh, _device(mesh), check)
    arguments["mesh"] = mesh
    ignored = set(arguments.pop("ignored_params", None) or ())
    for layer in named.values():
        layer.current_factors()  # up to date while the weight is whole
    all_factors = [layer.factors for layer in named.values() if layer.factors is not None]
    for factors in all_factors:
        factors.apply_(lambda tensor: tensor.to(_device(mesh)))
        _agree(factors.tensors if factors.rows is None else [*factors.tensors, factors.rows], mesh)
        ShardedFactors.become_(factors)
    for layer in named.values():
        copy = layer.eight_bit
        frozen = not layer.weight.requires_grad and not isinstance(layer, QuantizedLinear)  # or it could not follow
        if copy is not None and frozen and why_not(copy.dtype, _device(mesh), *layer.weight.shape) is None:
            tensor, scale = copy.current(layer.weight.to(_device(mesh)))
            _agree([as_bits(tensor.t()), scale], mesh)
            ShardedCopy.become_(copy)
        if isinstance(layer, QuantizedLinear):
            layer.before_sharding()
    previous: list[nn.Module] = []
    for block in chosen:
        layers = _cheap_layers(block)
        groups: list[Group] = []
        candidates: tuple[Group, ...] = (FrozenWeights(layers), FactorGroup(layers), CopyGroup(layers))
        for group in candidates:
            mine = group.members() - ignored
            if mine:
                # Freed after every forward: nothing reads them until backward gathers them, or ever.
                kept = arguments | {"reshard_after_forward": True}
                shard(group, **kept, ignored_params=ignored | set(group.parameters()) - mine)
                ignored |= set(group.members())
                group.around(block)
                groups.append(group)
        for group in groups:
            group.asked = tuple(groups) if group is groups[0] else ()
        shard(block, **arguments, ignored_params=ignored)
        if is_frozen(block):
            as_fsdp(block).set_unshard_in_backward(False)
        if previous:
            for stage in (*groups, block):
                as_fsdp(stage).set_modules_to_backward_prefetch(previous)
            for group in groups:
                group.ahead = tuple(stage for stage in previous if isinstance(stage, Group))
        previous = [*groups, block]
    shard(model, **arguments, ignored_params=ignored)
    for layer in named.values():
        layer.note_shard()
    return model


def _cheap_layers(block: nn.Module) -> list[LoGELinear]:
    """Those whose backward need not read the weight: with factors, or with an 8-bit copy."""
    found = [m for m in block.modules() if isinstance(m, LoGELinear)]
    return [layer for layer in found if layer.factors is not None or isinstance(layer.eight_bit, ShardedCopy)]


def _check(model: nn.Module, param_dtype: torch.dtype | None) -> dict[str, LoGELinear]:
    """The converted layers by name; ValueError or TypeError where they cannot be sharded."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model is sharded already: loge_kernels.fully_shard comes in the place of torch's")
    named = {name: module for name, module in model.named_modules() if isinstance(module, LoGELinear)}
    if not named:
        raise ValueError(
            f"no layer of this {type(model).__name__} is applied: call loge_kernels.apply(model) first, or torch's own "
            "fully_shard"
        )
    for name, layer in named.items():
        if isinstance(layer, QuantizedLinear):
            _check_quantized(name, layer, param_dtype)
        if layer.weight.is_meta:
            raise ValueError(
                f"layer {name!r} has its weight on the meta device: load the model on every rank (for Accelerate, "
                "fsdp_cpu_ram_efficient_loading: false)"
            )
        if layer.factors is not None and layer.weight.requires_grad:
            raise ValueError(
                f"layer {name!r} has factors of a weight that trains, which could not follow it: freeze the weight, or "
                "leave the layer out of apply's targets"
            )
        if layer.exact_dtype in FORMATS:
            raise ValueError(
                f"layer {name!r} has exact_dtype={layer.exact_dtype!r}, whose copies in 4 bits cannot be sharded: "
                "apply with exact_dtype='float8' or 'int8', or with None"
            )
        if layer.factors is not None and layer.factors.low_rank_dtype is not None:
            raise ValueError(
                f"layer {name!r} has low_rank_dtype={layer.factors.low_rank_dtype!r}, whose 8-bit copies every rank "
                "would keep whole: apply with low_rank_dtype=None"
            )
    return named


def _check_quantized(name: str, layer: QuantizedLinear, param_dtype: torch.dtype | None) -> None:
    reason, stored = layer.why_not_sharded(), layer.weight.dtype
    if reason is not None:
        raise ValueError(
            f"layer {name!r} is quantised ({layer.label(layer)}): {reason}; use DDP, or quantise by bitsandbytes"
        )
    if stored.is_floating_point and param_dtype not in (None, stored):
        raise ValueError(
            f"layer {name!r} has its packed weight in {stored}, which mp_policy's param_dtype={param_dtype} would "
            f"cast: load the model with bnb_4bit_quant_storage={param_dtype}, or torch.uint8"
        )


def _blocks(model: nn.Module, blocks: Iterable[nn.Module] | None) -> list[nn.Module]:
    inside = {id(module) for module in model.modules()}
    found: dict[int, nn.Module] = {}
    for block in _members_of_lists(model) if blocks is None else blocks:
        if not isinstance(block, nn.Module) or id(block) not in inside:
            raise ValueError(f"blocks holds a {type(block).__name__} that is no module of model")
        if not _runs(block):
            raise ValueError(f"blocks holds a {type(block).__name__}, which has no forward: give its members")
        found[id(block)] = block
    if not any(isinstance(module, LoGELinear) for block in found.values() for module in block.modules()):
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
