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

from .allocation import Candidate, allocate
from .cache import cached_factors
from .calibration import calibrate
from .factors import Factors, resolve_rank
from .policy import Policy, average_cost, dense_cost, exact_every_within, low_rank_cost, preferred_exact_dtype
from .request import Request
from .sites import Site, Targets
from .statistics import Statistics
from .subspaces import FROM_CALIBRATION, Subspace, subspace

T = TypeVar("T")

logger = logging.getLogger("loge_kernels")


@dataclass(frozen=True, slots=True)
class Plan:
    """By layer name: `factors` (None: the exact product) and `costs`, dX in a cheap and in an exact step over the dense
    product. `policy` says when steps are exact and what all of it costs on average. `allocated`: exact layers are so by
    allocation, not because dense is cheaper at their rank."""

    factors: dict[str, Factors | None]
    costs: dict[str, tuple[float, float]]
    policy: Policy
    allocated: bool


def make_plan(model: nn.Module, sites: list[Site], targets: Targets, request: Request) -> Plan:
    """The plan for `sites`, the layers to convert. Raises as `apply` does."""
    exact_dtype = request.exact_dtype
    if request.budget is not None and exact_dtype is None:
        largest = max(sites, key=lambda site: site.outline.numel())
        exact_dtype = preferred_exact_dtype(largest.outline)
    for site in sites:
        _check_weight(site, {"exact_dtype": exact_dtype, "low_rank_dtype": request.low_rank_dtype})
    exact_costs = [dense_cost(site.outline, exact_dtype) for site in sites]
    exact = _mean(sites, exact_costs)
    factors: dict[str, Factors | None] = dict.fromkeys(site.name for site in sites)
    if not (request.exact_every == 1.0 or (request.budget is not None and exact <= request.budget)):
        directions = _directions(model, sites, targets, request)
        ranks = _ranks(sites, exact_costs, directions, request)
        for site, rank in _with_progress(list(zip(sites, ranks, strict=True))):
            factors[site.name] = _factors(site, rank, directions, request)
    costs = {}
    for site, dense in zip(sites, exact_costs, strict=True):
        made = factors[site.name]
        costs[site.name] = (dense if made is None else low_rank_cost(made) + request.exact_fraction * dense), dense
    cheap = _mean(sites, [costs[site.name][0] for site in sites])
    all_exact = all(made is None for made in factors.values())
    policy = _policy(request, exact_dtype, cheap, exact, all_exact)
    return Plan(factors, costs, policy, request.allocation is not None)


def _check_weight(site: Site, in_eight_bits: dict[str, str | None]) -> None:
    weight = site.weight()
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {site.name!r} contains NaN or inf; the model is unchanged")
    for argument, dtype in in_eight_bits.items():
        if dtype is not None and weight.dtype == torch.float64:
            raise TypeError(f"{argument}={dtype!r}: the weight of layer {site.name!r} is float64; give None")


def _directions(model: nn.Module, sites: list[Site], targets: Targets, request: Request) -> dict[str, Subspace]:
    """What calibration chose for each layer; empty where the subspace needs none."""
    if request.subspace not in FROM_CALIBRATION:
        return {}
    statistics = request.calibration
    if not isinstance(statistics, Statistics):
        assert statistics is not None
        statistics = calibrate(model, statistics, targets, scores=request.subspace == "salience")
    _tell_unseen(sites, statistics)
    chosen = {}
    for site in _with_progress(sites):
        if site.name not in statistics.layers:
            raise ValueError(f"calibration has nothing of layer {site.name!r}; calibrate with the same targets")
        N, K = site.shape
        # Beyond break-even no rank is taken; "energy" weighs all directions up to there.
        limit = min(N, K, N * K // (N + K) + 1) if request.allocation == "energy" else _rank(site, request)
        try:
            chosen[site.name] = subspace(
                site.weight(), statistics.layers[site.name], request.subspace, limit, request.salience
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
    if request.subspace == "dropped":
        return 0
    return resolve_rank(min(request.rank, N, K) if isinstance(request.rank, int) else request.rank, N, K)


def _ranks(
    sites: list[Site], exact_costs: list[float], directions: dict[str, Subspace], request: Request
) -> list[int | None]:
    """Each layer's rank; None where the exact product is asked for or costs less."""
    if request.allocation is None or request.budget is None:
        return [_rank(site, request) for site in sites]
    budget = request.budget
    if request.exact_every is not None:
        # What is left for the cheap part of a step, as `policy.average_cost` counts it.
        share = 1.0 / request.exact_every
        exact = _mean(sites, exact_costs)
        cheap_share = 1.0 if request.correction is not None else 1.0 - share
        budget = (budget - share * exact) / cheap_share
        if budget <= 0:
            raise ValueError(
                f"exact_every={request.exact_every:g} alone costs {share * exact:.3f} of the dense flops, and "
                f"budget={request.budget:g}: give a larger one of the two"
            )
    candidates = []
    for site, exact_cost in zip(sites, exact_costs, strict=True):
        N, K = site.shape
        found = directions.get(site.name)
        worth = None if found is None else found.worth.cpu()
        candidates.append(Candidate(N, K, exact_cost, worth, dense_cost(site.outline, request.low_rank_dtype)))
    share = request.rank if isinstance(request.rank, float) else 1 / 8
    return allocate(candidates, budget, request.allocation, share)


def _factors(site: Site, rank: int | None, directions: dict[str, Subspace], request: Request) -> Factors | None:
    """The site's factors, or None where the dense product is asked for or costs less."""
    if rank is None:
        return None
    N, K = site.shape
    rows = math.ceil(request.residual * N)
    if rank * (N + K) + rows * K > N * K:
        return None
    weight = site.weight()
    found = directions.get(site.name)
    made = cached_factors(weight, rank, request.subspace) if found is None else found.factors(weight, rank)
    if rows:
        made = made.with_residual(weight, rows, None if found is None else found.importance)
    made.low_rank_dtype = request.low_rank_dtype
    return made


def _policy(request: Request, exact_dtype: str | None, cheap: float, exact: float, all_exact: bool) -> Policy:
    correction, every = request.correction, request.exact_every
    if request.budget is not None and request.allocation is None:
        every = exact_every_within(request.budget, cheap, exact, correction is not None)
    every = None if every is None else float(every)
    if every is not None and all_exact:
        every = 1.0
    if every is None or every == 1.0:
        correction = None
    low_rank_dtype = None if all_exact or every == 1.0 else request.low_rank_dtype
    cost = average_cost(cheap, exact, every, correction is not None)
    return Policy(every, exact_dtype, correction, cost, low_rank_dtype)


def _mean(sites: list[Site], costs: list[float]) -> float:
    """The layers' costs, weighted by their size."""
    sizes = [site.outline.numel() for site in sites]
    return sum(size * cost for size, cost in zip(sizes, costs, strict=True)) / sum(sizes)


def _with_progress(items: list[T]) -> Iterable[T]:
    """A progress bar on a terminal's standard error; silent elsewhere."""
    if not sys.stderr.isatty() or len(items) < 8:
        return items
    from rich.console import Console

    return track(items, description="factorising", console=Console(stderr=True), transient=True)
