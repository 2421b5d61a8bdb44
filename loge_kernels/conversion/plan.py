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
    ranks = _ranks(layers_found, options)
    low_rank = [target for target in layers_found if target.name in ranks]
    directions = _directions(model, low_rank, ranks, targets, options)
    plans = {}
    for target in with_progress(layers_found, "factorising"):
        exact, why = _exact_dtype(target, options)
        factors, reason = None, why
        if target.name in ranks:
            factors, reason = _factors(target, ranks[target.name], directions.get(target.name), options)
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


def _ranks(layers_found: list[TargetLayer], options: ApplyOptions) -> dict[str, int]:
    """The ranks of the layers whose dX goes through factors, by name: of those below what `exact_layers` keeps, counted
    from the output."""
    if options.rank is None or options.exact_every == 1:
        return {}
    total = sum(target.shape_only.numel() for target in layers_found)
    above = 0
    chosen: list[TargetLayer] = []  # from the output downwards
    for target in reversed(layers_found):
        if getattr(target.adapter, "edits_weight", False):
            raise ValueError(
                f"rank={options.rank!r}: the weight of layer {target.name!r} changes at every switch of SwitchLoRA, "
                "and factors would be computed anew each time: apply without rank="
            )
        above += target.shape_only.numel()
        if above > options.exact_layers * total * (1 + 1e-9):
            chosen.append(target)
    last = max(1, len(chosen) - 1)
    return {target.name: _rank(target, options, place / last) for place, target in enumerate(reversed(chosen))}


def _directions(
    model: nn.Module, layers_found: list[TargetLayer], ranks: dict[str, int], targets: Targets, options: ApplyOptions
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
                target.weight(), layer, options.directions, ranks[target.name], options.salience
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


def _rank(target: TargetLayer, options: ApplyOptions, place: float) -> int:
    """`place`: 0 for the low-rank layer nearest the input, 1 for the one nearest the output."""
    N, K = target.shape
    rank = options.rank
    assert rank is not None
    if isinstance(rank, tuple):
        rank = rank[0] + place * (rank[1] - rank[0])
    return resolve_rank(min(rank, N, K) if isinstance(rank, int) else rank, N, K)


def _factors(
    target: TargetLayer, rank: int, found: Subspace | None, options: ApplyOptions
) -> tuple[Factors | None, str]:
    """The target's factors; None and the reason where the dense product costs less."""
    N, K = target.shape
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
