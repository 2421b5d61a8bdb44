"""`apply` and `remove`: the low-rank backward for every frozen linear layer of a model, in place.

Layers keep their identity: `apply` changes the class of each `nn.Linear` (and of PEFT's LoRA layer around it) and adds
factors, `remove` changes it back. Names, parameters, hooks and the state dict stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from . import schedule
from .batches import Batch
from .collectives import Group, group_of
from .correction import BiasCorrection
from .freezing.freeze import freeze, unfreeze
from .freezing.plan import FreezePlan
from .linear import LoGELinear
from .planning import Plan, make_plan
from .policy import Policy, average_cost
from .refresher import Refresher
from .report import LayerPath, LayerReport, Report
from .request import Request
from .sites import Site, Targets, find_sites, nothing_to_convert, unwrapped
from .statistics import Statistics


def apply(
    model: nn.Module,
    rank: int | float | None = None,
    subspace: str | None = None,
    calibration: Statistics | Iterable[Batch] | None = None,
    targets: Targets = None,
    budget: float | None = None,
    allocation: str | None = None,
    exact_every: float | None = None,
    exact_dtype: str | None = None,
    low_rank_dtype: str | None = None,
    exact_fraction: float = 0.0,
    residual: float = 0.0,
    correction: float | None = 0.5,
    salience: str = "taylor",
    refresh_every: int | None = None,
    freeze_below: int | FreezePlan | None = None,
    backend: str | None = None,
) -> Report:
    """Give the frozen linear layers of `model` a low-rank activation gradient, in place.

    On a PEFT model (`peft.get_peft_model`) a layer with one active LoRA adapter runs frozen weight and adapter in one
    op; elsewhere the adapter stays PEFT's and only the frozen weight's backward changes. The forward is unchanged.
    Layers that bitsandbytes (NF4, FP4, int8) or torchao quantised keep their library's forward, and dequantise in
    backward for exact products alone (`loge_kernels.quantized`).

    Args:
        model: any module; its layers are changed in place, its parameters are not. A `DistributedDataParallel` wrapper
            is looked through; corrections, refreshes and calibration are averaged over its process group (without a
            wrapper the default one).
        rank: an int (at most min(N, K) of each layer is taken), or a float in (0, 1], a share of min(N, K) rounded to
            a multiple of 16; None: 1/8. Where rank · (N + K) > N · K the layer stays exact: dense is cheaper.
        subspace: which directions the factors keep (`loge_kernels.subspaces`). "svd": closest to the weight; None means
            it, but see `budget` and `calibration`. "gradient": those that carry most of dX on batches of the task.
            "salience": the paper's index, read as `salience` says. "random": a control. "dropped": no factors at all,
            cheap steps send the gradient through adapters and skip connections alone.
        calibration: for "gradient" (which it implies where `subspace` is None) and "salience": what
            `calibrate(model, batches)` returned, or the batches themselves.
        targets: as PEFT's `target_modules`: a list of names (a layer's own or the end of its path), or a string, a
            regular expression that the whole path must match; "all-linear" or None: every frozen linear layer but the
            output head.
        budget: at most this share of the dense dX flops of the converted layers, on average over the steps, products
            in 8 bits counted half (`loge_kernels.policy`). Exact steps, in 8 bits where the device has them, are made
            as frequent as it allows; from 0.5 on that is every step. With neither rank nor subspace the frozen path is
            "dropped" between them, and all of the budget goes to exact steps.
        allocation: instead of on exact steps, spend the budget among the layers. "depth": `rank` (a share) everywhere
            and exact layers from the output downwards. "energy": ranks where calibration saw most of dX per flop,
            weighted by depth. With `exact_every` its exact steps are paid first.
        exact_every: one optimizer step in so many is exact, the first among them: any number from 1 up, 1.5 for two
            steps in three. `loge_kernels.schedule_of(model)` holds the count, for checkpoints.
        exact_dtype: "float8" or "int8" for the dense products of exact layers, rows and steps; None for the weight's.
        low_rank_dtype: "float8" or "int8" for the products with the factors (`loge_kernels.eight_bit`), counted half;
            None for the weight's. They are PyTorch's then, and the adapter's own stay as they are.
        exact_fraction: share of the rows in [0, 1], heaviest ‖dY‖ first, whose dX is dense.
        residual: share of each weight's rows in [0, 1], those that the factors miss most, kept exact (CE-LoRA).
        correction: with exact steps, the decay in [0, 1) of the running mean of exact minus cheap adapter gradient that
            is added in the cheap steps; None: none (needed for sharded parameters). A model to be compiled is compiled
            after `apply`: its graph has no hooks otherwise.
        salience: the reading of the index for "salience": "taylor", "signed", "fisher" or "gradient".
        refresh_every: for "gradient", an optimizer step in so many brings the subspaces up to date with the gradients
            of the training under way (`loge_kernels.refresh`); None: they stay as calibrated.
        freeze_below: the embedding and so many of the first layers run without autograd and stop training, and their
            linear layers need no factors: `loge_kernels.freeze`, which is for doing that alone; a number, or what
            `loge_kernels.plan_freezing` returned.
        backend: a name of `backends()`, or None for the one in force at each call.

    Returns:
        A `Report`: name, shape, rank, captured energy, path, reason and flops saved of every linear layer, and the
        policy of exact steps with its cost.

    Raises:
        ValueError, TypeError: a bad argument, a model with nothing to convert or already converted, a weight that is
            not finite, a budget below the cost of the factors, a boundary that `freeze` refuses. The model is then as
            it was.

    Source: Zhang et al., Applied Sciences 2025, 15(1), 82 (LoGE); Gu et al., arXiv 2406.11753 (freezing).
    """
    request = Request.with_defaults(
        rank,
        subspace,
        calibration=calibration,
        budget=budget,
        allocation=allocation,
        exact_every=exact_every,
        exact_dtype=exact_dtype,
        low_rank_dtype=low_rank_dtype,
        exact_fraction=exact_fraction,
        residual=residual,
        correction=correction,
        salience=salience,
        refresh_every=refresh_every,
        freeze_below=freeze_below,
        backend=backend,
    )
    request.check(model)
    if freeze_below is None:
        return _convert(model, targets, request)
    freeze(model, freeze_below)
    try:
        return _convert(model, targets, request)
    except BaseException:
        unfreeze(model)
        raise


def _convert(wrapped: nn.Module, targets: Targets, request: Request) -> Report:
    model = unwrapped(wrapped)
    sites = list(find_sites(model, targets))
    chosen = [site for site in sites if site.obstacle is None]
    if not chosen:
        raise ValueError(nothing_to_convert(model, sites, targets))
    plan = make_plan(wrapped, chosen, targets, request)
    for site in chosen:
        site.convert_(plan.factors[site.name], request.exact_fraction, request.backend, plan.policy.exact_dtype)
    _tell_ddp(model, [name for name, _ in model.named_parameters() if ".factors." in f".{name}"])
    with_factors = [site for site in chosen if plan.factors[site.name] is not None]
    _follow_steps(model, with_factors, plan.policy, request, group_of(wrapped))
    return Report(tuple(_row(site, plan) for site in sites), plan.policy)


# Where DistributedDataParallel, when it is made, looks for what it is to leave alone.
_LEFT_ALONE = "_ddp_params_and_buffers_to_ignore"


def _tell_ddp(model: nn.Module, factors: list[str]) -> None:
    """Have `DistributedDataParallel` leave the parameters of these names out of its first broadcast, which makes the
    ranks' weights alike: factors follow from those."""
    others = [name for name in getattr(model, _LEFT_ALONE, ()) if ".factors." not in f".{name}"]
    if others or factors:
        setattr(model, _LEFT_ALONE, others + factors)
    elif hasattr(model, _LEFT_ALONE):
        delattr(model, _LEFT_ALONE)


def _follow_steps(model: nn.Module, sites: list[Site], policy: Policy, request: Request, group: Group) -> None:
    """Attach what has to happen at optimizer steps; `sites` have factors, converted by now."""
    if policy.exact_every == 1.0 or not sites:
        return
    correction = refresher = None
    if policy.correction is not None:
        correction = BiasCorrection(model, policy.correction, group)
    layers: list[Any] = [site.linear for site in sites]
    if request.subspace == "gradient":
        names = [site.name for site in sites]
        refresher = Refresher(zip(names, layers, strict=True), request.refresh_every, group)
    if policy.exact_every is not None or refresher is not None:
        schedule.attach(model, schedule.Schedule(model, layers, policy.exact_every, correction, refresher))


def remove(model: nn.Module) -> None:
    """Undo `apply` and `freeze`: every layer is what it was, adapters and weights untouched; what stopped training
    trains again. A model without converted or frozen layers is left alone."""
    schedule.detach(model)
    unfreeze(model)
    modules = list(model.modules())
    if "peft" in sys.modules:
        from .peft_layers import FusedAdapter

        for module in modules:
            if isinstance(module, FusedAdapter):
                module.revert_()
    for module in modules:
        if isinstance(module, LoGELinear) and module.converted:
            module.revert_()
    _tell_ddp(unwrapped(model), [])


def _row(site: Site, plan: Plan) -> LayerReport:
    N, K = site.shape
    if site.frozen:
        return LayerReport(site.name, (N, K), None, None, "frozen", site.about("frozen prefix"), 1.0)
    if site.obstacle is not None:
        return LayerReport(site.name, (N, K), None, None, "skipped", site.obstacle, 0.0)
    factors, policy = plan.factors[site.name], plan.policy
    cheap, exact = plan.costs[site.name]
    if policy.exact_every == 1.0:
        return LayerReport(site.name, (N, K), None, None, "exact", site.about("every step is exact"), 1.0 - exact)
    saved = 1.0 - average_cost(cheap, exact, policy.exact_every, policy.correction is not None)
    if factors is None:
        reason = f"dense is cheaper at this rank (break-even at {N * K // (N + K)})"
        if plan.allocated:
            reason = "exact by allocation"
        return LayerReport(site.name, (N, K), None, None, "exact", site.about(reason), saved)
    path, reason = _path(site)
    return LayerReport(site.name, (N, K), factors.rank, factors.energy, path, site.about(reason), saved)


def _path(site: Site) -> tuple[LayerPath, str]:
    if site.adapter is None:
        return ("base", site.beside) if site.beside else ("plain", "")
    obstacle = site.adapter.obstacle()  # a FusedAdapter by now
    return ("fused", "") if obstacle is None else ("base", obstacle)
