"""The residual rows of `Factors`: which are chosen, what they add, and that they follow the weight."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from surrogate import Case, assert_same, assert_within_twice, case, drawn_mask, gradients, heaviest, run
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import LoGELinear


def stand_in(factors: loge.Factors) -> Tensor:
    """What the factors put in the weight's place."""
    dense = factors.left @ factors.right
    if factors.rows is not None:
        dense[factors.rows] += factors.residual
    return dense


def with_stand_in(c: Case, factors: loge.Factors) -> Case:
    """The case whose surrogate is that stand-in: full rank, the identity times it."""
    return replace(c, left=torch.eye(c.weight.shape[0], dtype=c.weight.dtype), right=stand_in(factors))


# Through the op


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 4, 13])
@pytest.mark.parametrize("shape", [{}, {"P": None}, {"M": 1}, {"M": 0}], ids=str)
def test_gradients_of_the_surrogate(shape: dict[str, Any], count: int, dropout: float) -> None:
    c = case(**shape)
    made = c.factors().with_residual(c.weight, count)
    scale = drawn_mask(c, dropout)
    got = run(c, factors=made, dropout=dropout)
    assert_same(got, gradients(with_stand_in(c, made), scale))
    if count == 13 and not dropout:
        assert_same(got, gradients(replace(c, left=None, right=None)))


@pytest.mark.parametrize(("fraction", "rows"), [(0.3, 3), (1.0, 7)])
def test_exact_rows_take_no_residual(fraction: float, rows: int) -> None:
    c = case()
    made = c.factors().with_residual(c.weight, 5)
    expected = gradients(with_stand_in(c, made), exact_rows=heaviest(c.dy, rows))
    assert_same(run(c, factors=made, exact_fraction=fraction), expected)


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_within_twice_plain_pytorch(dtype: torch.dtype) -> None:
    narrow = case(M=33, N=48, K=40, R=16, P=8).to(dtype)
    made = narrow.factors().with_residual(narrow.weight, 8)
    got = run(narrow, factors=made)
    dy = narrow.dy
    plain = dy @ narrow.left @ narrow.right + narrow.scaling * dy @ narrow.lora_B @ narrow.lora_A
    plain += dy[:, made.rows] @ made.residual
    wide = narrow.to(torch.float64)
    full = loge.Factors(wide.left, wide.right, rows=made.rows, residual=made.residual.double())
    truth = gradients(with_stand_in(wide, full))["x"]
    assert got["x"].dtype == dtype
    assert_within_twice(got["x"], plain, truth)


@pytest.mark.usefixtures("either_processor")
def test_autocast_and_strided_dy() -> None:
    c = case(M=6, dtype=torch.float32)
    made = c.factors().with_residual(c.weight, 5)
    half = c.to(torch.bfloat16)
    x = c.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loge.linear(x, c.weight, made).backward(half.dy.t().contiguous().t())
    y, in_half = half.x.requires_grad_(), copy.deepcopy(made)
    in_half.apply_(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t)
    loge.linear(y, half.weight, in_half).backward(half.dy)
    assert torch.equal(x.grad, y.grad.float())


# The choice


@pytest.mark.parametrize("weighted", [False, True])
def test_chooses_the_rows_that_lower_the_loss_most(weighted: bool) -> None:
    weight = torch.randn(40, 30, dtype=torch.float64) * torch.rand(40, 1, dtype=torch.float64)
    importance = torch.logspace(0, -6, 40, dtype=torch.float64) if weighted else None
    made = loge.factorize(weight, 6)
    missing = (weight - made.left @ made.right).square().sum(1)
    scores = missing if importance is None else missing * importance
    with_rows = made.with_residual(weight, 7, importance)
    best = scores.argsort(descending=True)[:7].sort().values
    assert torch.equal(with_rows.rows, best)
    assert (with_rows.rows.dtype, with_rows.residual.shape) == (torch.int64, (7, 30))
    torch.testing.assert_close(stand_in(with_rows)[best], weight[best])
    assert torch.equal(with_rows.left, made.left)
    assert (made.rows, made.residual) == (None, None), "the factors it was asked of stay as they are"
    share = 1 - scores[best].sum() / scores.sum()
    assert with_rows.energy == pytest.approx(1 - (1 - made.energy) * share.item(), abs=1e-9)
    if importance is None:
        left_out = (weight - stand_in(with_rows)).square().sum() / weight.square().sum()
        assert with_rows.energy == pytest.approx(1 - left_out.item(), abs=1e-9)
    assert with_rows.made_of.bound
    assert not with_rows.made_of.changed(weight)


def test_energy_and_cost() -> None:
    weight = torch.randn(20, 12, dtype=torch.float64)
    made = loge.factorize(weight, 4)
    assert made.cost == pytest.approx(4 * 32 / 240)
    assert made.with_residual(weight, 5).cost == pytest.approx((4 * 32 + 5 * 12) / 240)
    energies = [made.energy] + [made.with_residual(weight, q).energy for q in (1, 5, 20)]
    assert energies == sorted(energies)
    assert energies[-1] == pytest.approx(1.0)
    given = loge.Factors(made.left, made.right).with_residual(weight, 2)
    assert math.isnan(given.energy)
    exact = loge.factorize(weight[:, :4] @ weight[:4], 4)
    assert exact.with_residual(weight[:, :4] @ weight[:4], 2).energy == pytest.approx(1.0)
    assert "5 exact rows" in repr(made.with_residual(weight, 5))


def test_the_residual_makes_up_for_rounded_factors() -> None:
    weight = torch.randn(20, 12).bfloat16()
    made = loge.factorize(weight, 4).with_residual(weight, 20)
    assert made.residual.dtype == torch.bfloat16
    exact = made.left.double() @ made.right.double() + made.residual.double()
    assert (exact - weight.double()).abs().max() < 2**-8 * made.residual.abs().max().double()


# It follows the weight


def assert_current(factors: loge.Factors, weight: Tensor) -> None:
    """Fresh factors of `weight`, with the best rows."""
    W = weight.detach().double()
    fresh = loge.factorize(W, factors.rank).with_residual(W, factors.rows.shape[0])
    assert torch.equal(factors.rows, fresh.rows)
    torch.testing.assert_close(stand_in(factors).double(), stand_in(fresh), rtol=1e-3, atol=1e-4)
    assert factors.energy == pytest.approx(fresh.energy, abs=1e-4)
    assert not factors.made_of.changed(weight)


def test_refresh_and_become() -> None:
    weight = torch.randn(20, 12)
    made = loge.factorize(weight, 4).with_residual(weight, 5)
    nn.init.normal_(weight)
    assert made.made_of.changed(weight)
    made.refresh(weight)
    assert_current(made, weight)
    nn.init.normal_(weight)
    made.take_values(loge.factorize(weight, 4), weight)
    assert_current(made, weight)
    plain = loge.factorize(weight, 4)
    plain.take_values(made, weight)
    assert_current(plain, weight)


def test_importance_lasts_until_there_is_a_newer_one() -> None:
    weight, importance = torch.randn(20, 12), torch.zeros(20)
    importance[[3, 8, 17]] = 1.0
    made = loge.factorize(weight, 4).with_residual(weight, 3, importance)
    nn.init.normal_(weight)
    made.refresh(weight)
    assert made.rows.tolist() == [3, 8, 17]
    made.take_values(loge.factorize(weight, 4), weight)
    assert made.rows.tolist() == [3, 8, 17]
    covariance = torch.diag(torch.rand(20) + 0.1)
    covariance[[2, 5, 6], [2, 5, 6]] = 100.0
    of_gradient = loge.factorize(weight, 4, "gradient", covariance).with_residual(weight, 3)
    of_gradient.refresh(weight, covariance)
    missing = (weight - of_gradient.left @ of_gradient.right).square().sum(1) * covariance.diagonal()
    assert of_gradient.rows.tolist() == missing.topk(3).indices.sort().values.tolist()


def test_factors_move_with_the_module_and_stay_out_of_its_state() -> None:
    layer = LoGELinear.from_linear(nn.Linear(24, 20), rank=8, lora_rank=4)
    layer.factors = layer.factors.with_residual(layer.weight, 5)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    layer.to(torch.bfloat16)
    made = layer.factors
    assert (made.left.dtype, made.residual.dtype, made.rows.dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)
    assert not made.made_of.changed(layer.weight)
    assert layer(torch.ones(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta")
    assert (made.residual.device.type, made.rows.device.type) == ("meta", "meta")


def test_a_layer_follows_a_loaded_weight() -> None:
    layer = LoGELinear.from_linear(nn.Linear(24, 20), rank=8, lora_rank=0)
    layer.factors = layer.factors.with_residual(layer.weight, 5)
    layer.load_state_dict({"weight": torch.randn(20, 24), "bias": torch.randn(20)})
    x, dy = torch.randn(3, 24, requires_grad=True), torch.randn(3, 20)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    assert_current(layer.factors, layer.weight)
    torch.testing.assert_close(dx, dy @ stand_in(layer.factors), rtol=1e-4, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"count": 0}, ["count=0", "1 to 20"]),
        ({"count": 21}, ["count=21", "1 to 20"]),
        ({"count": 2.0}, ["count=2.0"]),
        ({"count": True}, ["count=True"]),
        ({"weight": torch.zeros(12, 20)}, ["weight has shape (12, 20)", "(20, 12)"]),
        ({"importance": torch.zeros(12)}, ["importance has shape (12,)", "(20,)"]),
    ],
)
def test_errors(arguments: dict[str, Any], parts: list[str]) -> None:
    weight = torch.randn(20, 12)
    with pytest.raises(ValueError, match=r"count|weight|importance") as caught:
        loge.factorize(weight, 4).with_residual(**{"weight": weight, "count": 3, **arguments})
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("rows", "residual", "part"),
    [
        (torch.tensor([1]), None, "rows and residual"),
        (None, torch.zeros(1, 12), "rows and residual"),
        (torch.tensor([1.0]), torch.zeros(1, 12), "torch.float32"),
        (torch.tensor([[1]]), torch.zeros(1, 12), "(1, 1)"),
        (torch.tensor([1, 2]), torch.zeros(1, 12), "residual has shape (1, 12)"),
        (torch.tensor([2, 2]), torch.zeros(2, 12), "ascend"),
        (torch.tensor([3, 1]), torch.zeros(2, 12), "ascend"),
        (torch.tensor([0, 20]), torch.zeros(2, 12), "0..19"),
        (torch.tensor([-1, 2]), torch.zeros(2, 12), "0..19"),
    ],
)
def test_errors_of_rows_given_by_hand(rows: Any, residual: Any, part: str) -> None:
    with pytest.raises(ValueError, match=r"rows|residual") as caught:
        loge.Factors(torch.zeros(20, 4), torch.zeros(4, 12), rows=rows, residual=residual)
    assert part in str(caught.value)
