"""SwitchLoRA under a low-rank backward: one op, and factors that follow every switch for little."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from models import llama, logits, tokens
from peft import get_peft_model
from switching import STEPS, config, optimizer_of, state_of, switching, train

import loge_kernels as loge
from loge_kernels.factors import projection
from loge_kernels.switchlora.layer import LoGESwitchLoraLinear, SwitchLoraLinear
from loge_kernels.switchlora.switcher import Switcher

RANK = 16


def calibrated(model: Any) -> None:
    loge.apply(model, RANK, "gradient", calibration=[{"input_ids": tokens(), "labels": tokens()}])


def applied(subspace: str = "svd", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = switching(dtype)
    if subspace == "gradient":
        calibrated(model)
    else:
        loge.apply(model, RANK, subspace, **options)
    return model


def wander(model: Any, vectors: int) -> Switcher:
    """Switch so many vectors in every layer, and give those in use something learnt."""
    switcher = Switcher(model)
    while switcher.switched < vectors * len(switcher.places):
        switcher.switch()
        switcher.step += 1
    return switcher


def test_the_adapter_shares_the_layers_op() -> None:
    model = switching()
    before = logits(model)
    report = loge.apply(model, RANK)
    paths = {row.path for row in report.layers if row.name.endswith("_proj")}
    assert paths == {"fused"}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    loge.remove(model)
    assert {type(m) for m in model.modules() if isinstance(m, SwitchLoraLinear)} == {SwitchLoraLinear}


@pytest.mark.parametrize("subspace", ["svd", "gradient", "random", "dropped"])
def test_training_never_computes_factors_anew(subspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = applied(subspace)
    optimizer = optimizer_of(model)

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("factors were computed anew")

    for module, name in (("linear", "cached_factors"), ("factors", "factorize"), ("factors", "projection")):
        monkeypatch.setattr(import_module(f"loge_kernels.{module}"), name, refuse)
    train(model, optimizer)
    assert optimizer.switcher.switched > 50
    layers = [m for m in model.modules() if isinstance(m, LoGESwitchLoraLinear)]
    assert not any(layer.base_layer.factors.stale(layer.base_layer.weight) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("subspace", ["gradient", "random"])
def test_projections_are_those_of_the_weight_as_it_is(subspace: str, dtype: torch.dtype) -> None:
    model = applied(subspace, dtype)
    start = {p.name: p.layer.base_layer.factors.right.clone() for p in Switcher(model).places}
    bound = 2e-6 if dtype == torch.float32 else 0.02
    for place in wander(model, 100).places:
        factors, weight = place.layer.base_layer.factors, place.layer.base_layer.weight
        assert torch.equal(factors.right, start[place.name])
        fresh = projection(weight.detach(), factors.right.detach(), subspace)
        assert (factors.left - fresh.left).norm() <= bound * fresh.left.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_directions_stay_close_to_the_best(dtype: torch.dtype) -> None:
    model = applied("svd", dtype)
    start = {p.name: p.layer.base_layer.factors.left.float().clone() for p in Switcher(model).places}
    followed, left_alone = [], []
    for place in wander(model, 40).places:
        factors, weight = place.layer.base_layer.factors, place.layer.base_layer.weight.detach()
        W, best, old = weight.float(), loge.factorize(weight, factors.rank), start[place.name]
        missed, least = ((W - f.left.float() @ f.right.float()).norm() for f in (factors, best))
        kept = (W - old @ (old.t() @ W)).norm()  # what the directions of the beginning would miss
        followed.append((missed / least).item())
        left_alone.append((kept / least).item())
    # The weights' spectra are flat and the switches violent: vectors that nobody trained, all at once.
    assert max(followed) < 1.3
    assert sum(followed) / len(followed) - 1 < 0.75 * (sum(left_alone) / len(left_alone) - 1)


def test_the_gradient_is_that_of_fresh_factors() -> None:
    model = applied("random")
    train(model, optimizer_of(model), stop=8)
    other = applied("random")
    other.load_state_dict(model.state_dict())
    found = []
    for one in (model, other):
        for layer in (m for m in one.modules() if isinstance(m, LoGESwitchLoraLinear)):
            twin = model.get_submodule(next(n for n, m in one.named_modules() if m is layer))
            fresh = projection(layer.base_layer.weight.detach(), twin.base_layer.factors.right.detach(), "random")
            if one is other:
                layer.base_layer.factors.become(fresh, layer.base_layer.weight)
        one.zero_grad()
        one(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_residual_rows_follow() -> None:
    model = applied("svd", residual=0.25)
    for place in wander(model, 40).places:
        factors, weight = place.layer.base_layer.factors, place.layer.base_layer.weight.detach()
        stand_in = factors.left @ factors.right
        stand_in[factors.rows] += factors.residual
        torch.testing.assert_close(stand_in[factors.rows], weight[factors.rows], rtol=1e-5, atol=1e-5)


def test_a_model_applied_before_its_adapters() -> None:
    base = llama().requires_grad_(False)
    loge.apply(base, RANK, "random")
    model = get_peft_model(base, config())
    optimizer = optimizer_of(model)
    train(model, optimizer)
    for place in optimizer.switcher.places:
        factors, weight = place.layer.base_layer.factors, place.layer.base_layer.weight.detach()
        assert not factors.stale(weight) or factors.replaced(weight)
        assert (factors.left - weight @ factors.right.t()).norm() <= 1e-5 * factors.left.norm()


def test_factors_given_by_hand_are_declared_stale() -> None:
    layer = torch.nn.Linear(8, 6, bias=False).requires_grad_(False)
    factors = loge.Factors(torch.randn(6, 2), torch.randn(2, 8)).bind(layer.weight)
    factors.follow(layer.weight, torch.ones(6, 1), torch.ones(1, 8))
    assert factors.stale(layer.weight)


def test_exact_steps_and_their_correction_go_together_with_switches() -> None:
    model = switching()
    loge.apply(model, RANK, exact_every=2, correction=0.5)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    schedule = loge.schedule_of(model)
    assert schedule is not None
    assert schedule.step == STEPS
    assert all(torch.isfinite(tensor).all() for tensor in state_of(model).values())


def test_8_bit_copies_follow() -> None:
    model = applied("svd", low_rank_dtype="int8")
    optimizer = optimizer_of(model)
    train(model, optimizer, stop=4)
    for place in optimizer.switcher.places:
        factors = place.layer.base_layer.factors
        for factor, copy in ((factors.left, factors.left_copy), (factors.right, factors.right_copy)):
            tensor, scale = copy.current(factor)
            assert ((tensor * scale) - factor).abs().max() <= 0.51 * scale.max()
