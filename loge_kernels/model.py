"""`apply` and `remove`: the low-rank backward for every frozen linear layer of a model, in place.

Layers keep their identity: `apply` changes the class of each `nn.Linear` (and of PEFT's LoRA layer around it) and adds
factors, `remove` changes it back. Names, parameters, hooks and the state dict stay as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from . import schedule
from .backends import check_name
from .cache import cached_factors
from .correction import BiasCorrection
from .eight_bit import EightBitWeight
from .factors import METHODS, Factors, resolve_rank
from .linear import LoGELinear
from .policy import Policy, average_cost, dense_cost, exact_every_within, preferred_exact_dtype
from .report import LayerPath, LayerReport, Report
from .sites import Site, Targets, find_sites, nothing_to_convert


def apply(
    model: nn.Module,
    rank: int | float | None = None,
    subspace: str | None = None,
    targets: Targets = None,
    budget: float | None = None,
    exact_every: float | None = None,
    exact_dtype: str | None = None,
    exact_fraction: float = 0.0,
    residual: float = 0.0,
    correction: float | None = 0.5,
    backend: str | None = None,
) -> Report:
    """Give the frozen linear layers of `model` a low-rank activation gradient, in place.

    On a PEFT model (`peft.get_peft_model`) a layer with one active LoRA adapter runs frozen weight and adapter in one
    op; elsewhere the adapter stays PEFT's and only the frozen weight's backward changes. The forward is unchanged.

    Args:
        model: any module; its layers are changed in place, its parameters are not.
        rank: an int (at most min(N, K) of each layer is taken), or a float in (0, 1], a share of min(N, K) rounded to
            a multiple of 16; None: 1/8. Where rank · (N + K) > N · K the layer stays exact: dense is cheaper.
        subspace: "svd" (closest to the weight; None means it, but see `budget`), "random" (a control), or "dropped":
            no factors at all, cheap steps send the gradient through adapters and skip connections alone.
        targets: as PEFT's `target_modules`: a list of names (a layer's own or the end of its path), or a string, a
            regular expression that the whole path must match; "all-linear" or None: every frozen linear layer but the
            output head.
        budget: at most this share of the dense dX flops of the converted layers, on average over the steps, products
            in 8 bits counted half (`loge_kernels.policy`). Exact steps, in 8 bits where the device has them, are made
            as frequent as it allows; from 0.5 on that is every step. With neither rank nor subspace the frozen path is
            "dropped" between them, and all of the budget goes to exact steps.
        exact_every: one optimizer step in so many is exact, the first among them: any number from 1 up, 1.5 for two
            steps in three. `loge_kernels.schedule_of(model)` holds the count, for checkpoints.
        exact_dtype: "float8" or "int8" for the dense products of exact layers, rows and steps; None for the weight's.
        exact_fraction: share of the rows in [0, 1], heaviest ‖dY‖ first, whose dX is dense.
        residual: share of each weight's rows in [0, 1], those that the factors miss most, kept exact (CE-LoRA).
        correction: with exact steps, the decay in [0, 1) of the running mean of exact minus cheap adapter gradient that
            is added in the cheap steps; None: none (needed for sharded parameters). A model to be compiled is compiled
            after `apply`: its graph has no hooks otherwise.
        backend: a name of `backends()`, or None for the one in force at each call.

    Returns:
        A `Report`: name, shape, rank, captured energy, path, reason and flops saved of every linear layer, and the
        policy of exact steps with its cost.

    Raises:
        ValueError, TypeError: a bad argument, a model with nothing to convert or already converted, a weight that is
            not finite, a budget below the cost of the factors. The model is then as it was.

    Source: Zhang et al., Applied Sciences 2025, 15(1), 82 (LoGE).
    """
    if subspace is None:
        subspace = "svd" if budget is None or rank is not None else "dropped"
    rank = 1 / 8 if rank is None else rank
    _check(model, rank, subspace, exact_fraction, backend)
    _check_exactness(model, budget, exact_every, exact_dtype, residual, correction)
    sites = list(find_sites(model, targets))
    chosen = [site for site in sites if site.obstacle is None]
    if not chosen:
        raise ValueError(nothing_to_convert(model, sites, targets))
    # Everything that can fail happens before the first layer is touched.
    factors: dict[str, Factors | None] = {}
    if budget is not None and exact_dtype is None:
        largest = max(chosen, key=lambda site: site.outline.numel())
        exact_dtype = preferred_exact_dtype(largest.outline)
    exact = _mean(chosen, [dense_cost(site.outline, exact_dtype) for site in chosen])
    always_exact = exact_every == 1.0 or (budget is not None and exact <= budget)
    for site in _with_progress(chosen):
        weight = site.weight()
        _check_weight(site, weight, exact_dtype)
        factors[site.name] = None if always_exact else _factors(weight, rank, subspace, residual)
        del weight  # a quantised one is dequantised one layer at a time
    costs = {site.name: _costs(site, factors[site.name], exact_dtype, exact_fraction) for site in chosen}
    policy = _policy(chosen, costs, budget, exact_every, exact_dtype, correction)
    for site in chosen:
        site.convert_(factors[site.name], exact_fraction, backend, exact_dtype)
    if policy.exact_every is not None and policy.exact_every > 1.0:
        learned = None if policy.correction is None else BiasCorrection(model, policy.correction)
        scheduled: list[Any] = [site.linear for site in chosen if factors[site.name] is not None]
        schedule.attach(model, schedule.Schedule(model, scheduled, policy.exact_every, learned))
    return Report(tuple(_row(site, factors.get(site.name), costs, policy) for site in sites), policy)


def remove(model: nn.Module) -> None:
    """Undo `apply`: every converted layer is what it was, adapters and weights untouched. A model without converted
    layers is left alone."""
    schedule.detach(model)
    modules = list(model.modules())
    if "peft" in sys.modules:
        from .peft_layers import FusedLora

        for module in modules:
            if isinstance(module, FusedLora):
                module.revert_()
    for module in modules:
        if isinstance(module, LoGELinear) and module.converted:
            module.revert_()


def _check(model: nn.Module, rank: Any, subspace: str, exact_fraction: float, backend: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank={rank!r}; give an int from 1 up, or a float in (0, 1]")
    resolve_rank(min(rank, 1) if isinstance(rank, int) else rank, 1, 1)
    if subspace == "gradient":
        raise ValueError("subspace='gradient' needs gradient statistics: use factorize(method='gradient', covariance=)")
    if subspace not in METHODS:
        raise ValueError(f"subspace={subspace!r} is unknown; choose 'svd', 'random' or 'dropped'")
    if not 0.0 <= exact_fraction <= 1.0:
        raise ValueError(f"exact_fraction={exact_fraction!r} is not a share of the rows in [0, 1]")
    if backend is not None:
        check_name(backend, "backend")
    for name, module in model.named_modules():
        if isinstance(module, LoGELinear) and module.converted:
            raise ValueError(f"model is converted already (layer {name!r}); call loge_kernels.remove(model) first")


def _check_exactness(
    model: nn.Module,
    budget: float | None,
    exact_every: float | None,
    exact_dtype: str | None,
    residual: float,
    correction: float | None,
) -> None:
    if exact_dtype is not None:
        EightBitWeight(exact_dtype)  # its message
    given = {"budget": budget, "exact_every": exact_every, "residual": residual, "correction": correction}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
    if budget is not None and not 0.0 < budget <= 1.0:
        raise ValueError(f"budget={budget!r} is not a share of the dense flops in (0, 1]")
    if exact_every is not None and not 1.0 <= exact_every < math.inf:
        raise ValueError(f"exact_every={exact_every!r}: one step in so many is exact; give a number from 1 up")
    if budget is not None and exact_every is not None:
        raise ValueError(f"budget={budget!r} decides how often a step is exact; give it or exact_every={exact_every!r}")
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual={residual!r} is not a share of a weight's rows in [0, 1]")
    if correction is None:
        return
    if not 0.0 <= correction < 1.0:
        raise ValueError(f"correction={correction!r} is the decay of a running mean; give a number in [0, 1), or None")
    if budget is not None or exact_every is not None:
        for name, p in model.named_parameters():
            if p.requires_grad and hasattr(p, "placements"):
                raise ValueError(f"correction={correction!r}: {name} is sharded (FSDP); give correction=None")


def _check_weight(site: Site, weight: Tensor, exact_dtype: str | None) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {site.name!r} contains NaN or inf; the model is unchanged")
    if exact_dtype is not None and weight.dtype == torch.float64:
        raise TypeError(f"exact_dtype={exact_dtype!r}: the weight of layer {site.name!r} is float64; give None")


def _factors(weight: Tensor, rank: int | float, subspace: str, residual: float) -> Factors | None:
    """The weight's factors, or None where the dense product costs less."""
    N, K = weight.shape
    R = resolve_rank(min(rank, N, K) if isinstance(rank, int) else rank, N, K)
    if subspace == "dropped":
        R = 0
    rows = math.ceil(residual * N)
    if R * (N + K) + rows * K > N * K:
        return None
    factors = cached_factors(weight, R, subspace)
    return factors.with_residual(weight, rows) if rows else factors


def _mean(sites: list[Site], costs: list[float]) -> float:
    """The layers' costs, weighted by their size."""
    sizes = [site.outline.numel() for site in sites]
    return sum(size * cost for size, cost in zip(sizes, costs, strict=True)) / sum(sizes)


def _costs(site: Site, factors: Factors | None, exact_dtype: str | None, exact_fraction: float) -> tuple[float, float]:
    """Of the layer's dX in a cheap and in an exact step."""
    exact = dense_cost(site.outline, exact_dtype)
    return (exact if factors is None else factors.cost + exact_fraction * exact), exact


def _policy(
    sites: list[Site],
    costs: dict[str, tuple[float, float]],
    budget: float | None,
    exact_every: float | None,
    exact_dtype: str | None,
    correction: float | None,
) -> Policy:
    cheap, exact = (_mean(sites, [costs[site.name][index] for site in sites]) for index in (0, 1))
    if budget is not None:
        exact_every = exact_every_within(budget, cheap, exact, correction is not None)
    exact_every = None if exact_every is None else float(exact_every)
    if exact_every is None or exact_every == 1.0:
        correction = None
    return Policy(exact_every, exact_dtype, correction, average_cost(cheap, exact, exact_every, correction is not None))


def _row(site: Site, factors: Factors | None, costs: dict[str, tuple[float, float]], policy: Policy) -> LayerReport:
    N, K = site.shape
    if site.obstacle is not None:
        return LayerReport(site.name, (N, K), None, None, "skipped", site.obstacle, 0.0)
    cheap, exact = costs[site.name]
    if policy.exact_every == 1.0:
        return LayerReport(site.name, (N, K), None, None, "exact", site.about("every step is exact"), 1.0 - exact)
    saved = 1.0 - average_cost(cheap, exact, policy.exact_every, policy.correction is not None)
    if factors is None:
        reason = f"dense is cheaper at this rank (break-even at {N * K // (N + K)})"
        return LayerReport(site.name, (N, K), None, None, "exact", site.about(reason), saved)
    path, reason = _path(site)
    return LayerReport(site.name, (N, K), factors.rank, factors.energy, path, site.about(reason), saved)


def _path(site: Site) -> tuple[LayerPath, str]:
    if site.adapter is None:
        return "plain", ""
    obstacle = site.adapter.obstacle()  # a FusedLora by now
    return ("fused", "") if obstacle is None else ("base", obstacle)


def _with_progress(sites: list[Site]) -> Iterable[Site]:
    """A progress bar on a terminal's standard error; silent elsewhere."""
    if not sys.stderr.isatty() or len(sites) < 8:
        return sites
    from rich.console import Console

    return track(sites, description="factorising", console=Console(stderr=True), transient=True)
