"""What `apply` will do to every layer, decided before the first one is touched: all that can fail happens here."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..factors.cache import cached_factors
from ..factors.factors import PROJECTIONS, Factors, resolve_rank
from ..factors.statistics import Statistics
from ..factors.subspaces import Subspace, subspace
from ..numerics.eight_bit import refuse_float64
from ..terminal import with_progress
from . import exact_dtype
from .base_dtype import check_base, describe_base
from .calibrate import calibrate
from .options import ApplyOptions
from .targets import TargetLayer, Targets

logger = logging.getLogger("loge_kernels")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: its factors (None: the exact product), what exact products run in (one of `EXACT_DTYPES`, or None for
    the weight's dtype), and why, for the report."""

    factors: Factors | None
    exact_dtype: str | None
    reason: str


def make_plan(
    model: nn.Module, layers_found: list[TargetLayer], targets: Targets, options: ApplyOptions
) -> dict[str, LayerPlan]:
    """The plan for `layers_found`, the layers to convert, by name. Raises as `apply` does."""
    for target in layers_found:
        _check_weight(target, options)
    if options.base_dtype is not None:
        check_base(model, layers_found, options.base_dtype)
    low_rank = _low_rank_layers(layers_found, options)
    directions = _directions(model, [target for target in layers_found if target.name in low_rank], targets, options)
    plans = {}
    for target in with_progress(layers_found, "factorising"):
        exact, why = _exact_dtype(target, options)
        factors, reason = None, why
        if target.name in low_rank:
            factors, reason = _factors(target, directions.get(target.name), options)
            if factors is None:
                reason = "; ".join(part for part in (reason, why) if part)
            elif options.base_dtype is not None:
                reason = why
            elif options.exact_every is None and options.exact_fraction == 0.0:
                exact = None  # no product of this layer is ever exact
        plans[target.name] = LayerPlan(factors, exact, reason)
    return plans


def _check_weight(target: TargetLayer, options: ApplyOptions) -> None:
    weight = target.weight()
    if weight.is_meta and options.directions in PROJECTIONS:
        raise ValueError(
            f"calibration with the weight of layer {target.name!r} on the meta device, where Accelerate's "
            "cpu_ram_efficient_loading leaves it on all ranks but one: set fsdp_cpu_ram_efficient_loading to false, or "
            "apply without calibration"
        )
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {target.name!r} contains NaN or inf; the model is unchanged")
    for argument in ("exact_dtype", "low_rank_dtype"):
        dtype = getattr(options, argument)
        if dtype not in (None, exact_dtype.AUTO):
            refuse_float64(argument, dtype, weight.dtype, f"the weight of layer {target.name!r}")


def _exact_dtype(target: TargetLayer, options: ApplyOptions) -> tuple[str | None, str]:
    if options.base_dtype is not None:
        return options.base_dtype, describe_base(target, options.base_dtype)
    if options.exact_dtype == exact_dtype.AUTO and target.quantized is not None:
        return None, "dequantised in backward, and rounding it to 8 bits would be another pass"
    return exact_dtype.choose(target.shape_only, options.exact_dtype)


def _low_rank_layers(layers_found: list[TargetLayer], options: ApplyOptions) -> set[str]:
    """The layers whose dX goes through factors: below those that `exact_layers` keeps, counted from the output."""
    if options.rank is None or options.exact_every == 1:
        return set()
    total = sum(target.shape_only.numel() for target in layers_found)
    above = 0
    chosen = set()
    for target in reversed(layers_found):
        if getattr(target.adapter, "edits_weight", False):
            raise ValueError(
                f"rank={options.rank!r}: the weight of layer {target.name!r} changes at every switch of SwitchLoRA, "
                "and factors would be computed anew each time: apply without rank="
            )
        above += target.shape_only.numel()
        if above > options.exact_layers * total * (1 + 1e-9):
            chosen.add(target.name)
    return chosen


def _directions(
    model: nn.Module, layers_found: list[TargetLayer], targets: Targets, options: ApplyOptions
) -> dict[str, Subspace]:
    """What calibration chose for each layer; empty where the subspace needs none."""
    if options.directions not in PROJECTIONS or not layers_found:
        return {}
    statistics = options.calibration
    if not isinstance(statistics, Statistics):
        assert statistics is not None
        statistics = calibrate(model, statistics, targets, scores=options.directions == "salience")
    _tell_unseen(layers_found, statistics)
    chosen = {}
    for target in with_progress(layers_found, "factorising"):
        if target.name not in statistics.layers:
            raise ValueError(f"calibration has nothing of layer {target.name!r}; calibrate with the same targets")
        layer = statistics.layers[target.name]
        try:
            chosen[target.name] = subspace(
                target.weight(), layer, options.directions, _rank(target, options), options.salience
            )
        except ValueError as error:
            raise ValueError(f"layer {target.name!r}: {error}") from None
    return chosen


def _tell_unseen(layers_found: list[TargetLayer], statistics: Statistics) -> None:
    """Name the layers that calibration says nothing of. Raises ValueError where it says nothing of any."""
    unseen = [
        target.name
        for target in layers_found
        if target.name in statistics.layers and statistics.layers[target.name].unseen
    ]
    if len(unseen) == len(layers_found):
        raise ValueError(
            f"calibration saw no gradient at any of the {len(layers_found)} layers: no token of its batches reached "
            "them"
        )
    if unseen:
        logger.warning(
            "calibration saw no token at %d of %d layers (experts that none was routed to?): these keep the directions "
            "of subspace='svd': %s",
            len(unseen),
            len(layers_found),
            ", ".join(unseen),
        )


def _rank(target: TargetLayer, options: ApplyOptions) -> int:
    N, K = target.shape
    rank = options.rank
    assert rank is not None
    return resolve_rank(min(rank, N, K) if isinstance(rank, int) else rank, N, K)


def _factors(target: TargetLayer, found: Subspace | None, options: ApplyOptions) -> tuple[Factors | None, str]:
    """The target's factors; None and the reason where the dense product costs less."""
    (N, K), rank = target.shape, _rank(target, options)
    rows = math.ceil(options.residual * N)
    if rank * (N + K) + rows * K > N * K:
        return None, f"dense is cheaper at this rank (break-even at {N * K // (N + K)})"
    weight = target.weight()
    made = cached_factors(weight, rank) if found is None else found.factors(weight, rank)
    if rows and weight.is_meta:
        made = Factors.to_come(weight, rank, rows)
    elif rows:
        made = made.with_residual(weight, rows, None if found is None else found.importance)
    made.low_rank_dtype = options.low_rank_dtype
    return made, ""
