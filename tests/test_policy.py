"""What steps cost, and how many may be exact within a budget."""

from __future__ import annotations

import math

import pytest
import torch
from models import LINEARS, llama, lora
from torch import nn

import loge_kernels as loge
from loge_kernels import LoGELinear, Policy
from loge_kernels.policy import average_cost, dense_cost, exact_every_within, preferred_exact_dtype


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("cheap", "exact"), [(0.0, 0.5), (0.125, 0.5), (0.2, 1.0)])
def test_the_cost_is_that_of_the_steps_counted_one_by_one(cheap: float, exact: float, corrected: bool) -> None:
    every = 4
    steps = [exact + cheap * corrected if step % every == 0 else cheap for step in range(400)]
    assert average_cost(cheap, exact, every, corrected) == pytest.approx(sum(steps) / len(steps))
    assert average_cost(cheap, exact, None, corrected) == cheap
    assert average_cost(cheap, exact, 1.0, corrected) == exact


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("budget", "cheap", "exact"), [(0.45, 0.0, 0.5), (0.25, 0.1, 0.5), (0.6, 0.2, 1.0)])
def test_the_budget_is_spent_whole(budget: float, cheap: float, exact: float, corrected: bool) -> None:
    every = exact_every_within(budget, cheap, exact, corrected)
    assert every is not None
    assert every > 1.0
    assert average_cost(cheap, exact, every, corrected) == pytest.approx(budget)


def test_the_ends_of_the_budget() -> None:
    assert exact_every_within(0.5, 0.1, 0.5, True) == 1.0
    assert exact_every_within(0.1, 0.1, 0.5, True) is None
    with pytest.raises(ValueError, match=r"budget=0\.05 is less than .*0\.100.*smaller rank"):
        exact_every_within(0.05, 0.1, 0.5, True)


def test_8_bits_count_half_where_they_run() -> None:
    weight = torch.zeros(16, 16)
    assert dense_cost(weight, None) == 1.0
    assert dense_cost(weight, "int8") == dense_cost(weight, "float8") == 0.5
    assert dense_cost(torch.zeros(16, 16, device="meta"), "int8") == 0.5
    assert preferred_exact_dtype(weight) == "int8"
    assert preferred_exact_dtype(weight.double()) is None


def test_a_budget_alone_drops_the_frozen_path_between_exact_steps() -> None:
    model = lora()
    report = loge.apply(model, budget=0.25)
    assert report.policy == Policy(2.0, "int8", 0.5, 0.25)
    assert report.flops_saved == pytest.approx(0.75)
    assert all(row.rank == 0 and row.path == "fused" for row in report.converted)
    layers = [module for module in model.modules() if isinstance(module, LoGELinear)]
    assert all(layer.exact_dtype == "int8" and layer.exact_fraction == 1.0 for layer in layers)
    assert "one step in 2 exact in int8" in str(report)


def test_a_budget_for_exact_steps_makes_every_step_exact() -> None:
    model = lora()
    report = loge.apply(model, budget=0.5)
    assert report.policy == Policy(1.0, "int8", None, 0.5)
    assert loge.schedule_of(model) is None
    assert {row.path for row in report.converted} == {"exact"}
    assert report.flops_saved == pytest.approx(0.5)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256).requires_grad_(False))


def test_a_budget_with_a_rank_keeps_the_factors() -> None:
    model = wide()
    report = loge.apply(model, rank=16, budget=0.3)
    assert report.policy == Policy(pytest.approx(0.5 / (0.3 - 0.125)), "int8", 0.5, pytest.approx(0.3))
    assert report.layers[0].rank == 16
    loge.remove(model)
    with pytest.raises(ValueError, match=r"budget=0\.1 is less than a step through the factors costs \(0\.125 "):
        loge.apply(model, rank=16, budget=0.1)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("options", [{"budget": 0.5}, {"exact_every": 1}])
def test_nothing_is_factorised_where_every_step_is_exact(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loge_kernels.planning.cached_factors", None)
    assert loge.apply(wide(), rank=16, **options).layers[0].path == "exact"  # type: ignore[arg-type]


def test_float64_has_no_8_bits() -> None:
    report = loge.apply(llama(torch.float64).requires_grad_(False), targets=LINEARS, budget=0.25)
    assert report.policy == Policy(4.0, None, 0.5, 0.25)
    model = wide().double()
    with pytest.raises(TypeError, match=r"exact_dtype='int8': .*'0' is float64"):
        loge.apply(model, exact_dtype="int8")
    assert type(model[0]) is nn.Linear


def test_the_residual_is_counted() -> None:
    model = wide()
    report = loge.apply(model, rank=16, residual=0.1)
    layer = model[0]
    assert isinstance(layer, LoGELinear)
    assert layer.factors is not None
    assert layer.factors.rows is not None
    assert len(layer.factors.rows) == math.ceil(25.6)
    assert report.policy.cost == pytest.approx(16 * 512 / 256**2 + 26 / 256)
    assert report.flops_saved == pytest.approx(1 - report.policy.cost)


def test_exact_rows_are_counted() -> None:
    model = wide()
    report = loge.apply(model, rank=16, exact_fraction=0.2, exact_dtype="int8")
    assert report.policy.cost == pytest.approx(16 * 512 / 256**2 + 0.2 * 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"budget=0\.0 is not a share"),
        ({"budget": 1.5}, r"budget=1\.5 is not a share"),
        ({"budget": math.nan}, "budget=nan is not a share"),
        ({"exact_every": 0.5}, r"exact_every=0\.5: .*from 1 up"),
        ({"exact_every": math.inf}, "exact_every=inf"),
        ({"budget": "x"}, "budget='x' is a str; give a number"),
        ({"exact_every": True}, "exact_every=True is a bool"),
        ({"residual": "x"}, "residual='x' is a str"),
        ({"correction": "x"}, "correction='x' is a str"),
        ({"exact_every": 2, "budget": 0.5}, r"budget=0\.5 decides"),
        ({"exact_dtype": "int4"}, "exact_dtype='int4' is unknown"),
        ({"residual": -0.1}, r"residual=-0\.1 is not a share"),
        ({"correction": 1.0}, r"correction=1\.0 is the decay"),
        ({"subspace": "magic"}, "subspace='magic' is unknown; choose one of 'svd', 'gradient'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(options: dict[str, object], message: str) -> None:
    model = lora()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        loge.apply(model, **options)  # type: ignore[arg-type]
    assert kinds == [type(module) for module in model.modules()]
    assert loge.schedule_of(model) is None


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Policy(None, None, None, 0.2), "no exact steps"),
        (Policy(None, "int8", None, 0.2), "no exact steps; dense products in int8"),
        (Policy(1.0, "int8", None, 0.5), "every step exact in int8"),
        (Policy(1.5, None, None, 0.5), "one step in 1.5 exact"),
        (Policy(2.0, "float8", 0.5, 0.25), "one step in 2 exact in float8, the steps between corrected"),
    ],
)
def test_a_policy_says_what_it_does(policy: Policy, text: str) -> None:
    assert text in str(policy)
