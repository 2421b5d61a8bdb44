"""What `apply(base_dtype=)` asks of a model: all that could fail, before the first weight is replaced."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..layers.eight_bit_base import EightBitLinear
from ..numerics.eight_bit import refuse_float64, why_not
from .targets import TargetLayer

_TILE = 16  # of 8-bit products on a GPU


def check_base(model: nn.Module, chosen: list[TargetLayer], name: str) -> None:
    """Raise ValueError or TypeError for a layer whose weight cannot be replaced by one in `name`."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    for target in chosen:
        weight, what = target.linear.weight, f"base_dtype={name!r}: the weight of layer {target.name!r}"
        if target.quantized is not None:
            raise ValueError(
                f"{what} is quantised already ({target.describe()}): leave base_dtype out, or load the model in 16 bits"
            )
        if id(weight) not in holders:
            raise ValueError(f"{what} is no parameter, but computed from others (pruning, weight_norm): leave it out")
        if weight.requires_grad:
            raise ValueError(f"{what} trains, and rounding would lose its updates: freeze it, or leave it out")
        if len(holders[id(weight)]) > 1:
            raise ValueError(f"{what} is tied to that of {_others(holders[id(weight)], target)}: leave it out")
        adapter = target.adapter
        if getattr(adapter, "edits_weight", False):
            raise ValueError(f"{what} changes at every switch of SwitchLoRA: leave base_dtype out")
        if any(getattr(adapter, "use_dora", {}).values()):
            raise ValueError(f"{what} is read by DoRA, in 16 bits: use LoRA, or leave base_dtype out")
        refuse_float64("base_dtype", name, weight.dtype, f"the weight of layer {target.name!r}")
        reason = why_not(name, weight.device, *(_TILE if size else 0 for size in target.shape))  # others are padded
        if reason is not None:
            raise ValueError(f"{what} cannot be multiplied so: {reason}")


def without_read_weight(model: nn.Module, target: TargetLayer, base_dtype: str) -> TargetLayer:
    """`target`, left alone where the module around it reads its weight itself: it would meet bits there."""
    path, _, name = target.name.rpartition(".")
    around: Any = type(model.get_submodule(path))
    source = _source(around)
    expected = base_dtype == "int8" and "torch.int8" in source  # as T5's feed-forward, which compares dtypes
    if target.why_not is None and name and not expected and re.search(rf"\bself\.{re.escape(name)}\.weight\b", source):
        return replace(target, why_not="base_dtype: the module around it reads its weight itself")
    return target


@functools.lru_cache(maxsize=512)
def _source(kind: Any) -> str:
    """The Python that a class is made of; nothing where it was not kept."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def why_not_restored(weight: Any, layer: EightBitLinear) -> str | None:
    """What is in the place of a weight that `layer` could have again, or None where it is one."""
    if not isinstance(weight, Tensor):
        return "nothing" if weight is None else f"a {type(weight).__name__}"
    usable = weight.is_floating_point() and weight.dtype.itemsize > 1 and not weight.is_meta
    found = f"a {weight.dtype} {tuple(weight.shape)} on {weight.device}"
    return None if usable and weight.shape == layer.weight.shape else found


def describe_base(target: TargetLayer, name: str) -> str:
    """For the report: what the weight is in and how much smaller it is."""
    N, K = target.shape
    own = target.shape_only.dtype
    share = (N * K + 4 * N) / max(1, N * K * own.itemsize)
    ragged = (N % _TILE or K % _TILE) and target.shape_only.is_cuda
    slow = f"; N and K are no multiples of {_TILE}: multiplied by PyTorch, slowly" if ragged else ""
    return f"{name} base, {share:.2f} of the bytes of {str(own).removeprefix('torch.')}{slow}"


def _others(paths: list[str], target: TargetLayer) -> str:
    mine = {target.name, f"{target.name}.base_layer"}
    return ", ".join(repr(path) for path in paths if path not in mine)
