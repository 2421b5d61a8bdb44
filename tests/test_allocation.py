"""Where a budget goes among the layers: within it, by depth, by energy, and what `apply` makes of it."""

from __future__ import annotations

import pytest
import torch
from models import lora
from test_calibration import batches

import loge_kernels as loge
from loge_kernels.allocation import Candidate, allocate, average


def candidates(count: int = 6, exact: float = 1.0, decay: float = 0.9) -> list[Candidate]:
    worth = decay ** torch.arange(256, dtype=torch.float64)
    return [Candidate(512, 256, exact, worth / worth.sum()) for _ in range(count)]


@pytest.mark.parametrize("exact", [1.0, 0.5])
@pytest.mark.parametrize("allocation", ["depth", "energy"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.45, 0.9, 1.0])
def test_the_budget_holds_and_is_used(budget: float, allocation: str, exact: float) -> None:
    layers = candidates(12, exact)
    ranks = allocate(layers, budget, allocation)
    assert average(layers, ranks) <= budget
    # Less than what one more layer, or 16 more directions, would cost is left over.
    assert ranks == [None] * 12 or average(layers, ranks) > budget - exact / 12


def test_depth_makes_layers_exact_from_the_output_downwards() -> None:
    layers = candidates(8)
    ranks = allocate(layers, 0.45, "depth", 1 / 8)
    assert ranks == [32, 32, 32, 32, 32, 32, None, None]
    assert average(layers, ranks) == pytest.approx((6 * 0.1875 + 2) / 8)


def test_depth_takes_a_smaller_share_where_the_one_asked_for_does_not_fit() -> None:
    ranks = allocate(candidates(), 0.1, "depth", 1 / 2)
    assert set(ranks) == {16}


def test_energy_gives_more_to_the_layer_that_needs_more_and_to_the_deeper_one() -> None:
    flat, steep = candidates(1, decay=0.995), candidates(1, decay=0.8)
    first, second = allocate([*flat, *steep], 0.35, "energy")
    assert first is not None
    assert second is not None
    assert first > second
    shallow, deep = allocate(candidates(2, decay=0.99), 0.35, "energy")
    assert shallow is not None
    assert deep is None or deep > shallow


def test_a_budget_below_the_smallest_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget=0\.05: rank 16 everywhere costs 0\.094"):
        allocate(candidates(), 0.05, "depth")


def test_apply_spends_the_budget_among_the_layers() -> None:
    model = lora()
    statistics = loge.calibrate(model, batches())
    report = loge.apply(model, budget=0.8, allocation="depth", calibration=statistics, exact_dtype="int8")
    assert report.policy.cost <= 0.8
    assert 1.0 - report.flops_saved == pytest.approx(report.policy.cost)
    loge.remove(model)
    report = loge.apply(model, budget=0.48, allocation="energy", calibration=statistics)
    ranks = {row.rank for row in report.converted}
    assert report.policy.cost <= 0.48
    assert len(ranks) > 1
    assert any(row.reason == "exact by allocation" for row in report.converted)


def test_a_budget_for_every_layer_makes_every_step_exact() -> None:
    report = loge.apply(lora(), subspace="svd", budget=0.5, allocation="depth", exact_every=3, exact_dtype="int8")
    assert report.policy.exact_every == 1.0
    assert report.policy.cost == 0.5


def test_exact_steps_are_paid_first() -> None:
    model = lora()
    options = {"allocation": "depth", "exact_every": 8, "exact_dtype": "int8", "correction": None}
    report = loge.apply(model, subspace="svd", budget=0.49, **options)  # type: ignore[arg-type]
    assert report.policy.exact_every == 8.0
    assert report.policy.cost <= 0.49
    loge.remove(model)
    with pytest.raises(ValueError, match=r"exact_every=2 alone costs 0\.250.*budget=0\.2:"):
        loge.apply(model, subspace="svd", budget=0.2, **{**options, "exact_every": 2})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "magic", "budget": 0.5}, "allocation='magic' is unknown; choose one of 'depth', 'energy'"),
        ({"allocation": "depth"}, "allocation='depth' spends a budget among the layers: give budget= too"),
        ({"allocation": "depth", "budget": 0.5, "subspace": "dropped"}, "subspace='dropped' has none"),
        ({"allocation": "energy", "budget": 0.5, "subspace": "svd"}, "allocation='energy' needs calibration="),
        ({"allocation": "depth", "budget": 0.5, "rank": 64}, "rank=64 with allocation='depth', which gives out"),
        ({"allocation": "depth", "budget": 0.5, "residual": 0.1}, "counts neither residual= nor exact_fraction="),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loge.apply(lora(), **options)  # type: ignore[arg-type]
