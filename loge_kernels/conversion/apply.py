"""`apply` and `remove`: our backward for every frozen linear layer of a model, in place.

Layers keep their identity: `apply` changes the class of each `nn.Linear` (and of PEFT's LoRA layer around it) and adds
factors where they are asked for, `remove` changes it back. Names, parameters, hooks and the state dict stay as they
are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..batches import Batch
from ..collectives import unwrapped
from ..factors.statistics import Statistics
from ..freezing.freeze import freeze, unfreeze
from ..freezing.plan import FreezePlan
from ..layers import exact_every as forwards
from ..layers.eight_bit_base import EightBitLinear
from ..layers.linear import LoGELinear
from .base_dtype import why_not_restored, without_read_weight
from .exact_dtype import AUTO
from .options import ApplyOptions
from .plan import LayerPlan, make_plan
from .report import LayerPath, LayerReport, Report
from .targets import TargetLayer, Targets, find_targets, why_nothing_to_convert


def apply(
    model: nn.Module,
    rank: int | float | tuple[float, float] | None = None,
    *,
    subspace: str | None = None,
    calibration: Statistics | Iterable[Batch] | None = None,
    targets: Targets = None,
    exact_layers: float = 0.0,
    exact_every: int | None = None,
    exact_dtype: str | None = "auto",
    base_dtype: str | None = None,
    low_rank_dtype: str | None = None,
    exact_fraction: float = 0.0,
    residual: float = 0.0,
    salience: str = "taylor",
    freeze_below: int | FreezePlan | None = None,
    backend: str | None = None,
) -> Report:
    """Give the frozen linear layers of `model` our backward, in place: exact, or with `rank=` low-rank.

    On a PEFT model (`peft.get_peft_model`) a layer with one active LoRA adapter runs frozen weight and adapter in one
    op; elsewhere the adapter stays PEFT's and only the frozen weight's backward changes. The forward is unchanged, but
    for `base_dtype`. Layers that bitsandbytes (NF4, FP4, int8) or torchao quantised keep their library's forward, and
    dequantise in backward for exact products alone (`loge_kernels.layers.quantized`).

    Args:
        model: any module; its layers are changed in place, its parameters only by `base_dtype`. A
            `DistributedDataParallel` wrapper is looked through; calibration is averaged over its process group (without
            a wrapper the default one).
        rank: None: every dX is exact. An int (at most min(N, K) of each layer is taken), or a float in (0, 1], a share
            of min(N, K) rounded to a multiple of 16: dX goes through factors of the weight and never reads it. A pair
            of shares: from the first in the low-rank layer nearest the input to the second in the last one. Where
            rank · (N + K) > N · K the layer stays exact: dense is cheaper. What follows up to `residual`, without
            `exact_dtype`, is for a low-rank backward.
        subspace: which directions the factors keep (`factors.subspaces`). "svd": closest to the weight, the
            default without calibration. "gradient": those that carry most of dX on batches of the task, the default
            with it. "salience": the paper's index, read as `salience` says.
        calibration: for "gradient" and "salience": what `calibrate(model, batches)` returned, or the batches
            themselves.
        targets: as PEFT's `target_modules`: a list of names (a layer's own or the end of its path), or a string, a
            regular expression that the whole path must match; "all-linear" or None: every frozen linear layer but the
            output head.
        exact_layers: share of the converted weights in [0, 1] that keeps an exact dX, from the output downwards: an
            error near the output reaches every layer below it.
        exact_every: one training forward of the model in so many has an exact backward, the first among them
            (`layers.exact_every`).
        exact_dtype: what exact products run in. "auto": 8 bits where they are faster on this device for the layer's
            shape and many tokens (`conversion.exact_dtype`), the weight's dtype elsewhere and for few. "float8",
            "int8", or None for the weight's. "nvfp4" and "mxfp4", 4 bits (`numerics.four_bit`), are experimental
            and not recommended.
        base_dtype: "int8" or "float8": the frozen weights themselves are replaced by an 8-bit copy, from which forward
            and dX both take their products (`layers.eight_bit_base`), at half the memory of 16 bits and without
            dequantisation. The forward is then no longer exact. None: they stay as they are.
        low_rank_dtype: "float8" or "int8" for the products with the factors (`numerics.eight_bit`); None for the
            weight's. They are PyTorch's then, and the adapter's own stay as they are.
        exact_fraction: share of the rows in [0, 1], heaviest ‖dY‖ first, whose dX is dense.
        residual: share of each weight's rows in [0, 1], those that the factors miss most, kept exact (CE-LoRA).
        salience: the reading of the index for "salience": "taylor", "signed", "fisher" or "gradient".
        freeze_below: the embedding and so many of the first layers run without autograd and stop training, and their
            linear layers need no factors: `loge_kernels.freeze`, which is for doing that alone; a number, or what
            `loge_kernels.plan_freezing` returned.
        backend: a name of `backends()`, or None for the one in force at each call.

    Returns:
        A `Report`: name, shape, path, what dX is computed in and why, rank and captured energy of every linear layer.

    Raises:
        ValueError, TypeError: a bad argument, a model with nothing to convert or already converted, a weight that is
            not finite, a boundary that `freeze` refuses. The model is then as it was.

    Source: Zhang et al., Applied Sciences 2025, 15(1), 82 (LoGE); Gu et al., arXiv 2406.11753 (freezing).
    """
    options = ApplyOptions(
        rank=rank,
        subspace=subspace,
        calibration=calibration,
        exact_layers=exact_layers,
        exact_every=exact_every,
        exact_dtype=exact_dtype,
        base_dtype=base_dtype,
        low_rank_dtype=low_rank_dtype,
        exact_fraction=exact_fraction,
        residual=residual,
        salience=salience,
        freeze_below=freeze_below,
        backend=backend,
    )
    options.check_model(model)
    if freeze_below is None:
        return _convert(model, targets, options)
    freeze(model, freeze_below)
    try:
        return _convert(model, targets, options)
    except BaseException:
        unfreeze(model)
        raise


def _convert(wrapped: nn.Module, targets: Targets, options: ApplyOptions) -> Report:
    model = unwrapped(wrapped)
    layers_found = list(find_targets(model, targets, options.base_dtype is not None and options.rank is None))
    if options.base_dtype is not None:
        layers_found = [without_read_weight(model, target, options.base_dtype) for target in layers_found]
    chosen = [target for target in layers_found if target.why_not is None]
    if not chosen:
        raise ValueError(why_nothing_to_convert(model, layers_found, targets))
    plans = make_plan(wrapped, chosen, targets, options)
    for target in chosen:
        plan = plans[target.name]
        exact = None if options.base_dtype else plan.exact_dtype  # or products have the weight itself
        target.convert_(plan.factors, options.exact_fraction, options.backend, exact, base_dtype=options.base_dtype)
        target.linear.path = target.name  # type: ignore[assignment]
        target.linear.chosen_by_auto = options.exact_dtype == AUTO  # type: ignore[assignment]
        if plan.factors is None:
            target.linear.prepare()  # type: ignore[operator]
    with_factors = [target for target in chosen if plans[target.name].factors is not None]
    every = options.exact_every if with_factors else None
    if every is not None:
        counter = forwards.attach(model, every, (target.name for target in chosen))
        for target in with_factors:
            target.linear.exact_every = counter  # type: ignore[assignment]
    return Report(tuple(_row(target, plans.get(target.name), options, every) for target in layers_found), every)


def remove(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Undo `apply` and `freeze`: every layer is what it was, adapters and weights untouched; what stopped training
    trains again. A model without converted or frozen layers is left alone.

    weights: the state dict of the model as it was before `apply(base_dtype=)`, or before PEFT wrapped it, for layers
    whose weight that has replaced. Raises ValueError, and changes nothing, where they need it and it is not given, or
    where an adapter is merged into what it has been replaced by.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"weights is a {type(weights).__name__}; give a state dict, or None")
    whole = _whole_weights(model, weights)
    forwards.detach(model)
    unfreeze(model)
    modules = list(model.modules())
    if "peft" in sys.modules:
        from ..layers.peft import FusedAdapter

        for module in modules:
            if isinstance(module, FusedAdapter):
                module.revert_()
    for module in modules:
        if isinstance(module, EightBitLinear):
            module.restore_(whole[module.path])
        elif isinstance(module, LoGELinear) and module.converted:
            module.revert_()


def _whole_weights(model: nn.Module, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights of the layers that keep 8 bits alone, by their paths."""
    found = {}
    for layer in model.modules():
        if not isinstance(layer, EightBitLinear):
            continue
        path = layer.path.removeprefix("base_model.model.")
        ends = ("base_layer.weight", "weight")
        names = [f"{name}.{end}" if name else end for name in (layer.path, path) for end in ends]
        weight = next((weights[name] for name in names if name in weights), None) if weights is not None else None
        if weight is None and weights is None:
            raise ValueError(
                f"the weight of layer {layer.path!r} was replaced by one in {layer.base_dtype}: load the model anew, "
                "or give remove(model, weights=) its state dict"
            )
        if layer.holds_adapter:
            raise ValueError(
                f"an adapter is merged into layer {layer.path!r}, and weights is without it: unmerge first, or load "
                "the adapter over the 16-bit model and merge there"
            )
        reason = why_not_restored(weight, layer)
        if weight is None or reason is not None:
            raise ValueError(
                f"weights has {reason} for {names[-1]!r}; expected {tuple(layer.weight.shape)} in 16 bits or more"
            )
        found[layer.path] = weight
    return found


def _row(target: TargetLayer, plan: LayerPlan | None, options: ApplyOptions, every: int | None) -> LayerReport:
    if target.frozen:
        return LayerReport(target.name, target.sizes, "frozen", "-", None, None, target.describe("frozen prefix"), 1.0)
    if plan is None:
        return LayerReport(target.name, target.sizes, "skipped", "-", None, None, target.why_not or "", 0.0)
    path, why = _path(target)
    reason = target.describe("; ".join(part for part in (why, plan.reason) if part))
    factors = plan.factors
    if factors is None:
        dx = plan.exact_dtype or str(target.shape_only.dtype).removeprefix("torch.")
        return LayerReport(target.name, target.shape, path, dx, None, None, reason, 0.0)
    saved = 1.0 - min(1.0, factors.cost + options.exact_fraction)
    saved *= 1.0 if every is None else 1.0 - 1.0 / every
    dx = f"rank {factors.rank}" + ("" if factors.low_rank_dtype is None else f" in {factors.low_rank_dtype}")
    return LayerReport(target.name, target.shape, path, dx, factors.rank, factors.energy, reason, saved)


def _path(target: TargetLayer) -> tuple[LayerPath, str]:
    if target.adapter is None:
        return ("base", target.wrapper_note) if target.wrapper_note else ("plain", "")
    why_not = target.adapter.why_not_fused()  # a FusedAdapter by now
    return ("fused", "") if why_not is None else ("base", why_not)
