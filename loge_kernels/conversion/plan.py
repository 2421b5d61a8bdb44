"""What `apply` will do to every layer, decided before the first one is touched: all that can fail happens here."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.progress import track
from torch import nn

from ..factors.cache import cached_factors
from ..factors.factors import Factors, resolve_rank
from ..factors.statistics import Statistics
from ..factors.subspaces import FROM_CALIBRATION, Subspace, subspace
from ..numerics.eight_bit import refuse_float64
from . import exact_dtype
from .calibrate import calibrate
from .options import Request
from .targets import Site, Targets

T = TypeVar("T")

logger = logging.getLogger("loge_kernels")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: its factors (None: the exact product), what exact products run in ("float8", "int8" or None for the
    weight's dtype), and why, for the report."""

    factors: Factors | None
    exact_dtype: str | None
    reason: str


def make_plan(model: nn.Module, sites: list[Site], targets: Targets, request: Request) -> dict[str, LayerPlan]:
    """The plan for `sites`, the layers to convert, by name. Raises as `apply` does."""
    for site in sites:
        _check_weight(site, request)
    low_rank = _low_rank_layers(sites, request)
    directions = _directions(model, [site for site in sites if site.name in low_rank], targets, request)
    plans = {}
    for site in _with_progress(sites):
        exact, why = _exact_dtype(site, request)
        factors, reason = None, why
        if site.name in low_rank:
            factors, reason = _factors(site, directions.get(site.name), request)
            if factors is None:
                reason = "; ".join(part for part in (reason, why) if part)
            elif request.exact_every is None and request.exact_fraction == 0.0:
                exact = None  # no product of this layer is ever exact
        plans[site.name] = LayerPlan(factors, exact, reason)
    return plans


def _check_weight(site: Site, request: Request) -> None:
    weight = site.weight()
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {site.name!r} contains NaN or inf; the model is unchanged")
    for argument in ("exact_dtype", "low_rank_dtype"):
        dtype = getattr(request, argument)
        if dtype not in (None, exact_dtype.AUTO):
            refuse_float64(argument, dtype, weight.dtype, f"the weight of layer {site.name!r}")


def _exact_dtype(site: Site, request: Request) -> tuple[str | None, str]:
    if request.exact_dtype == exact_dtype.AUTO and site.quantized is not None:
        return None, "dequantised in backward, and rounding it to 8 bits would be another pass"
    return exact_dtype.choose(site.outline, request.exact_dtype)


def _low_rank_layers(sites: list[Site], request: Request) -> set[str]:
    """The layers whose dX goes through factors: below those that `exact_layers` keeps, counted from the output."""
    if request.rank is None or request.exact_every == 1:
        return set()
    total = sum(site.outline.numel() for site in sites)
    above = 0
    chosen = set()
    for site in reversed(sites):
        if getattr(site.adapter, "edits_weight", False):
            raise ValueError(
                f"rank={request.rank!r}: the weight of layer {site.name!r} changes at every switch of SwitchLoRA, and "
                "factors would be computed anew each time: apply without rank="
            )
        above += site.outline.numel()
        if above > request.exact_layers * total * (1 + 1e-9):
            chosen.add(site.name)
    return chosen


def _directions(model: nn.Module, sites: list[Site], targets: Targets, request: Request) -> dict[str, Subspace]:
    """What calibration chose for each layer; empty where the subspace needs none."""
    if request.directions not in FROM_CALIBRATION or not sites:
        return {}
    statistics = request.calibration
    if not isinstance(statistics, Statistics):
        assert statistics is not None
        statistics = calibrate(model, statistics, targets, scores=request.directions == "salience")
    _tell_unseen(sites, statistics)
    chosen = {}
    for site in _with_progress(sites):
        if site.name not in statistics.layers:
            raise ValueError(f"calibration has nothing of layer {site.name!r}; calibrate with the same targets")
        layer = statistics.layers[site.name]
        try:
            chosen[site.name] = subspace(
                site.weight(), layer, request.directions, _rank(site, request), request.salience
            )
        except ValueError as error:
            raise ValueError(f"layer {site.name!r}: {error}") from None
    return chosen


def _tell_unseen(sites: list[Site], statistics: Statistics) -> None:
    """Name the layers that calibration says nothing of. Raises ValueError where it says nothing of any."""
    unseen = [site.name for site in sites if site.name in statistics.layers and statistics.layers[site.name].unseen]
    if len(unseen) == len(sites):
        raise ValueError(
            f"calibration saw no gradient at any of the {len(sites)} layers: no token of its batches reached them"
        )
    if unseen:
        logger.warning(
            "calibration saw no token at %d of %d layers (experts that none was routed to?): these keep the directions "
            "of subspace='svd': %s",
            len(unseen),
            len(sites),
            ", ".join(unseen),
        )


def _rank(site: Site, request: Request) -> int:
    N, K = site.shape
    rank = request.rank
    assert rank is not None
    return resolve_rank(min(rank, N, K) if isinstance(rank, int) else rank, N, K)


def _factors(site: Site, found: Subspace | None, request: Request) -> tuple[Factors | None, str]:
    """The site's factors; None and the reason where the dense product costs less."""
    (N, K), rank = site.shape, _rank(site, request)
    rows = math.ceil(request.residual * N)
    if rank * (N + K) + rows * K > N * K:
        return None, f"dense is cheaper at this rank (break-even at {N * K // (N + K)})"
    weight = site.weight()
    made = cached_factors(weight, rank) if found is None else found.factors(weight, rank)
    if rows:
        made = made.with_residual(weight, rows, None if found is None else found.importance)
    made.low_rank_dtype = request.low_rank_dtype
    return made, ""


def _with_progress(items: list[T]) -> Iterable[T]:
    """A progress bar on a terminal's standard error; silent elsewhere."""
    if not sys.stderr.isatty() or len(items) < 8:
        return items
    from rich.console import Console

    return track(items, description="factorising", console=Console(stderr=True), transient=True)
