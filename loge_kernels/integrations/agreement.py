"""Ranks that shard a model together must have applied it alike: each gathers what its own layers need, and one that
waits for a gather which no other rank begins waits until the process group gives up. So they compare, once."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..freezing.frozen_module import is_frozen
from ..layers.linear import LoGELinear
from ..numerics.exact_dtypes import why_not

T = TypeVar("T")
Policy = dict[str, Any]  # of one layer, or of one frozen module
SHOWN = 4  # ranks that a message names


@dataclass(frozen=True)
class Standing:
    """What one rank says of itself before anything is changed."""

    rank: int
    version: str  # of this package
    digest: str  # of the policies
    error: str | None  # of its checks of the model


def agreed(model: nn.Module, mesh: Any, device: torch.device, check: Callable[[], T]) -> T:
    """What `check()` returned, on every rank of `mesh`, where all of them hold the same applied model.

    Otherwise every rank raises: its own error where `check` raised, elsewhere ValueError, which names the ranks, the
    layer and both values. Two gathers at most, the first of a few hundred bytes a rank. `backend` may differ, for it
    changes nothing of what is gathered.
    """
    failure: Exception | None = None
    try:
        result = check()
    except Exception as error:
        failure = error
    mine = {} if failure is not None else policies(model, device)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    rank, version = torch.distributed.get_rank(), sys.modules[__name__.partition(".")[0]].__version__
    said = gathered(asdict(Standing(rank, version, digest, None if failure is None else str(failure))), mesh)
    standings = [Standing(**one) for one in said]
    if failure is not None:
        raise failure
    _refuse_failures(standings)
    _refuse_versions(standings)
    if len({one.digest for one in standings}) > 1:
        _refuse_policies([one.rank for one in standings], gathered(mine, mesh))
    return result


def policies(model: nn.Module, device: torch.device) -> dict[str, Policy]:
    """What decides the backward of each converted layer, and which modules are frozen, by what messages call them."""
    found: dict[str, Policy] = {}
    for name, module in model.named_modules():
        if is_frozen(module):
            found[f"freezing of {name!r}"] = {}
        if isinstance(module, LoGELinear):
            factors, every, dtype = module.factors, module.exact_every, module.exact_dtype
            shape = module.out_features, module.in_features
            runs = dtype is None or why_not(dtype, device, *shape) is None
            found[f"layer {name!r}"] = {
                "shape": shape,
                "rank": None if factors is None else factors.rank,
                "subspace": None if factors is None else factors.method,
                "residual rows": 0 if factors is None or factors.rows is None else len(factors.rows),
                "low_rank_dtype": None if factors is None else factors.low_rank_dtype,
                "exact_dtype": dtype if runs else f"{dtype}, which cannot run there",
                "base_dtype": module.base_dtype,
                "exact_every": None if every is None else every.every,
                "exact_fraction": module.exact_fraction,
                "trains": module.weight.requires_grad,
            }
    return found


def gathered(value: Any, mesh: Any) -> list[Any]:
    """`value` of every rank of `mesh`, in the same order on each."""
    values = [value]
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        lists: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(lists, values, group=group)
        values = [one for part in lists for one in part]
    return values


def _refuse_failures(standings: list[Standing]) -> None:
    failed = [one for one in standings if one.error is not None]
    if failed:
        raise ValueError(f"the model cannot be sharded on {_ranks(one.rank for one in failed)}: {failed[0].error}")


def _refuse_versions(standings: list[Standing]) -> None:
    having = _by_value([(one.rank, one.version) for one in standings])
    if len(having) > 1:
        said = ", ".join(f"{version} on {_ranks(ranks)}" for version, ranks in having.items())
        raise ValueError(f"ranks have different versions of loge_kernels: {said}; install the same on each")


def _refuse_policies(ranks: list[int], of_each: list[dict[str, Policy]]) -> None:
    named = dict.fromkeys(what for one in of_each for what in one)
    for what in sorted(named, key=lambda what: what.startswith("layer")):  # freezing first: it leaves layers out
        having = [one.get(what) for one in of_each]
        fields = dict.fromkeys(field for policy in having if policy is not None for field in policy)
        for field in [None, *fields]:
            shown = [_show(policy, field) for policy in having]
            values = _by_value(list(zip(ranks, shown, strict=True)))
            if len(values) > 1:
                said = ", ".join(f"{value} on {_ranks(those)}" for value, those in values.items())
                raise ValueError(
                    f"ranks differ in {what}: {said}; give loge_kernels.apply the same model and arguments on every "
                    "rank"
                )


def _show(policy: Policy | None, field: str | None) -> str:
    if field is None or policy is None:
        return "not applied" if policy is None else "applied"
    return f"{field}={policy[field]!r}"


def _by_value(pairs: list[tuple[int, str]]) -> dict[str, list[int]]:
    """The ranks that have each value."""
    having: dict[str, list[int]] = {}
    for rank, value in pairs:
        having.setdefault(value, []).append(rank)
    return having


def _ranks(ranks: Iterable[int]) -> str:
    """As in "rank 3", "ranks 0, 1, 2, 3 and 60 more"."""
    those = list(ranks)
    if len(those) == 1:
        return f"rank {those[0]}"
    more = f" and {len(those) - SHOWN} more" if len(those) > SHOWN else ""
    return f"ranks {', '.join(map(str, those[:SHOWN]))}{more}"
