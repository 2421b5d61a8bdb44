"""The subspaces that calibration chooses, through `apply`: optimal where they claim it."""

from __future__ import annotations

import pytest
import torch
from calibrating import QUERY, UP, batches, by_hand
from models import gradients, lora, tokens

import loge_kernels as loge
from loge_kernels.factors.subspaces import READINGS, subspace


@pytest.mark.parametrize("name", [QUERY, UP])
def test_gradient_keeps_the_most_of_dx(name: str) -> None:
    model = lora()
    statistics = loge.calibrate(model, batches())
    dy = torch.cat([one.flatten(0, 1) for one, _ in by_hand(model, name)]).double()
    weight = model.get_submodule(name).base_layer.weight.detach()
    dx = dy @ weight.double()
    chosen = subspace(weight, statistics.layers[name], "gradient", 64)
    factors = chosen.factors(weight, 16)
    kept = (dy @ factors.left.double() @ factors.right.double()).square().sum() / dx.square().sum()
    best = torch.linalg.svdvals(dx).square()
    assert kept.item() == pytest.approx((best[:16].sum() / best.sum()).item(), rel=1e-3)
    assert factors.energy == pytest.approx(kept.item(), rel=1e-3)
    assert factors.method == "gradient"
    identity = factors.right @ factors.right.t()
    torch.testing.assert_close(identity, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
def test_salience_orders_singular_directions_by_its_index(reading: str) -> None:
    model = lora()
    layer = loge.calibrate(model, batches(), scores=True).layers[QUERY]
    weight = model.get_submodule(QUERY).base_layer.weight.detach()
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    samples = [one.t() @ x for dy, xs in by_hand(model, QUERY) for one, x in zip(dy, xs, strict=True)]
    g = torch.stack([torch.einsum("nj,nk,jk->j", U, gradient, Vt) for gradient in samples])
    index = {
        "taylor": S * g.abs().mean(0),
        "signed": (S * g.mean(0)).abs(),
        "fisher": S.square() * g.square().mean(0),
        "gradient": g.abs().mean(0),
    }[reading]
    kept = index.argsort(descending=True)[:16]
    factors = subspace(weight, layer, "salience", 16, reading).factors(weight, 16)
    expected = (U[:, kept] * S[kept]) @ Vt[kept]
    torch.testing.assert_close(factors.left @ factors.right, expected, rtol=0, atol=1e-5)
    assert factors.energy == pytest.approx((S[kept].square().sum() / S.square().sum()).item(), rel=1e-4)


def test_apply_takes_statistics_or_batches() -> None:
    first, second = lora(), lora()
    given = loge.apply(first, 16, calibration=loge.calibrate(first, batches()))
    taken = loge.apply(second, 16, subspace="gradient", calibration=batches())
    assert [row.energy for row in given.layers] == [row.energy for row in taken.layers]
    found, expected = gradients(second), gradients(first)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(module.factors.method == "gradient" for module in first.modules() if isinstance(module, loge.LoGELinear))


def test_the_gradient_subspace_is_nearer_to_the_exact_gradient_than_svd() -> None:
    def error(**options: object) -> float:
        model = lora()
        exact = gradients(model)
        loge.apply(model, 16, **options)  # type: ignore[arg-type]
        cheap = gradients(model)
        return sum((cheap[n] - exact[n]).square().sum().item() for n in exact)

    same = {"input_ids": tokens(), "labels": tokens()}
    assert error(calibration=[same]) < 0.7 * error(subspace="svd")


def test_the_residual_takes_the_rows_that_the_gradient_weighs_most() -> None:
    model = lora()
    statistics = loge.calibrate(model, batches())
    loge.apply(model, 16, calibration=statistics, residual=0.1)
    factors = model.get_submodule(QUERY).base_layer.factors
    weight = model.get_submodule(QUERY).base_layer.weight
    missing = (weight - factors.left @ factors.right).square().sum(1)
    best = torch.topk(missing * statistics.layers[QUERY].importance, 7).indices.sort().values
    assert torch.equal(factors.rows, best)
    assert not torch.equal(factors.rows, torch.topk(missing, 7).indices.sort().values)


def test_a_changed_weight_is_projected_onto_the_same_directions() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches())
    layer = next(module for module in model.modules() if isinstance(module, loge.LoGELinear))
    right = layer.factors.right.clone()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    gradients(model)
    assert torch.equal(layer.factors.right, right)
    torch.testing.assert_close(layer.factors.left, layer.weight @ right.t())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspace": "gradient"}, "subspace='gradient' needs gradients of your task"),
        ({"subspace": "salience"}, "subspace='salience' needs gradients of your task"),
        ({"subspace": "svd", "calibration": "good"}, "calibration goes with subspace='gradient' or 'salience'"),
        ({"subspace": "salience", "calibration": "good"}, "no gradient scores: calibrate.*scores=True"),
        ({"calibration": "good", "salience": "magic"}, "salience='magic' is unknown"),
        ({"calibration": "partial"}, "calibration has nothing of layer .*same targets"),
        ({"calibration": "untouched"}, "layer .*q_proj': calibration saw no gradient"),
        ({"calibration": "misshapen"}, r"layer .*q_proj': calibration is of a weight \[8, 8\], and this one is \[64"),
        ({"calibration": []}, "batches is empty"),
    ],
)
def test_refusals_change_nothing(options: dict[str, object], message: str) -> None:
    model = lora()
    statistics = loge.calibrate(model, batches())
    layer = loge.LayerStatistics.empty
    untouched = layer((64, 64), "cpu")
    untouched.tokens = 3
    statistics_of = {
        "good": statistics,
        "partial": loge.Statistics({UP: statistics.layers[UP]}),
        "untouched": loge.Statistics({**statistics.layers, QUERY: untouched}),
        "misshapen": loge.Statistics({**statistics.layers, QUERY: layer((8, 8), "cpu")}),
    }
    given = options.get("calibration")
    if isinstance(given, str):
        options = {**options, "calibration": statistics_of[given]}
    with pytest.raises(ValueError, match=message):
        loge.apply(model, 16, **options)  # type: ignore[arg-type]
    assert not any(isinstance(module, loge.LoGELinear) for module in model.modules())
