"""`apply`, `calibrate`, `freeze` and `plan_freezing` on every family of models: causal, encoders, vision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from models import assert_close, assert_differ, stand_ins, use_surrogate
from situations import checkpointed

import loge_kernels as loge

everywhere = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def base_name(model: Any, name: str) -> str:
    return f"{name}.base_layer" if hasattr(model.get_submodule(name), "base_layer") else name


def in_layers(name: str, family: Family) -> bool:
    return f".{family.layers}." in name


@everywhere
def test_exact_mode_is_plain_autograd(family: Family) -> None:
    model = family.model()
    expected = family.gradients(model)
    assert any(".lora_A." in name for name in expected)
    for rank in (None, 1.0):  # of full rank dense is cheaper, and taken
        loge.apply(model, rank, exact_dtype=None)
        assert_close(family.gradients(model), expected, 5e-5)
        loge.remove(model)


@everywhere
def test_low_rank_gradients_are_those_of_the_surrogate(family: Family) -> None:
    model, other = family.model(), family.model()
    report = loge.apply(model, 16)
    rows = {base_name(other, row.name): row for row in report.converted if row.rank is not None}
    assert rows
    use_surrogate(other, stand_ins(other, list(rows), 16))
    found = family.gradients(model)
    assert_close(found, family.gradients(other), 5e-5)
    assert_differ(found, family.gradients(family.model()))


@everywhere
def test_what_is_converted_and_what_is_not(family: Family) -> None:
    model = family.model()
    before = {name: type(module) for name, module in model.named_modules()}
    expected, state = family.gradients(model), list(model.state_dict())
    report = loge.apply(model, 16)
    assert list(model.state_dict()) == state
    converted = {row.name for row in report.converted}
    within = {row.name for row in report.layers if in_layers(row.name, family)}
    assert within <= converted
    assert all("project_in" in name for name in converted - within)
    assert {row.path for row in report.layers if row.name.endswith(family.targets)} == {"fused"}
    for row in report.layers:
        if row.path == "skipped":
            assert any(word in row.reason for word in ("output head", "trainable", "between the layers and the head"))
    loge.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert_close(family.gradients(model), expected, 0.0)


@everywhere
def test_calibrated_subspaces(family: Family) -> None:
    model = family.model()
    statistics = loge.calibrate(model, [family.batch(seed) for seed in range(2)])
    assert statistics.batches == 2
    assert statistics.tokens > 0
    report = loge.apply(model, 16, calibration=statistics, exact_every=2)
    assert statistics.layers.keys() == {row.name for row in report.converted}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    before = model(**family.batch()).loss.item()
    for _ in range(6):
        model(**family.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**family.batch()).loss.item() < before


@everywhere
def test_frozen_below_the_last_layer(family: Family) -> None:
    model = family.model()
    expected = family.gradients(model)
    prefix = f".{family.layers}."
    above = {
        name: g
        for name, g in expected.items()
        if not any(f"{prefix}{number}." in name for number in (0, 1)) and "embed" not in name
    }
    frozen = loge.freeze(model, 2)
    assert (frozen.layers, frozen.total) == (2, 3)
    assert set(frozen.parameters) == expected.keys() - above.keys()
    assert_close(family.gradients(model), above, 0.0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(above)
    loge.remove(model)
    assert_close(family.gradients(model), expected, 0.0)
    report = loge.apply(model, 16, freeze_below=2)
    frozen = {row.name for row in report.layers if row.path == "frozen"}
    below = {row.name for row in report.layers if any(f"{prefix}{number}." in row.name for number in (0, 1))}
    assert below <= frozen
    assert all("project_in" in name for name in frozen - below)
    assert set(family.gradients(model)) == set(above)


@everywhere
def test_checkpointed_and_frozen(family: Family) -> None:
    model = family.model()
    expected = family.gradients(model)
    loge.freeze(model, 1)
    found = family.gradients(checkpointed(model, True))
    assert any(f".{family.layers}.1." in name for name in found)
    assert_close(found, {name: expected[name] for name in found}, 1e-5)


@everywhere
def test_a_plan(family: Family) -> None:
    model = family.model()
    plan = loge.plan_freezing(model, [family.batch(seed) for seed in range(2)])
    assert len(plan.trace) == 4
    assert plan.boundary in (1, 2)
    assert plan.tokens == 2 * (36 if family.task == "CAUSAL_LM" else 4)
    assert loge.apply(model, 16, freeze_below=plan).converted


def test_the_state_that_a_classifier_reads() -> None:
    family = FAMILIES["llama, classes"]
    model, batch = family.model(), family.batch()
    states: list[torch.Tensor] = []
    last = model.get_base_model().model.layers[-1]
    handle = last.register_forward_hook(lambda module, inputs, output: states.append(output))
    model.eval()(**batch)
    handle.remove()
    seen: list[torch.Tensor] = []

    def deviation(bases: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden.square().mean(-1)

    loge.plan_freezing(model, [batch], deviation)
    norm = model.get_base_model().model.norm
    torch.testing.assert_close(seen[-1], norm(states[0][torch.arange(4), torch.tensor([5, 9, 9, 9])]))
