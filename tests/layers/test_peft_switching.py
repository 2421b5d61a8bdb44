"""PEFT models that change after `apply`: other adapters, merges, what `remove` gives back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import (
    LINEARS,
    RANK,
    assert_close,
    assert_low_rank_of_its_weights,
    gradients,
    input_gradient,
    llama,
    logits,
    lora,
    modules_of,
    stand_ins,
    two,
    use_surrogate,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

import loge_kernels as loge
from loge_kernels import LoGELinear
from loge_kernels.layers.peft import LoGELoraLinear

# Switching adapters


@pytest.mark.parametrize("after", [False, True])
def test_set_adapter(after: bool) -> None:
    model, other = two(after=after)
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        other.set_adapter(name)
        got = gradients(model)
        assert all(name in key for key in got)
        assert_close(got, gradients(other))


def test_two_active_adapters() -> None:
    def both(one: Any) -> None:
        one.base_model.set_adapter(["default", "second"])

    model, other = two(both)
    obstacles = {model.get_submodule(name).why_not_fused() for name in modules_of(model, LoGELoraLinear)}
    assert obstacles == {"2 active adapters", None}
    assert_close(gradients(model), gradients(other))
    model.set_adapter("second")
    obstacles = {model.get_submodule(name).why_not_fused() for name in modules_of(model, LoGELoraLinear)}
    assert obstacles == {"0 active adapters", None}


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_an_adapter_whose_start_changes_the_weight(init: str) -> None:
    model, other = lora(), lora()
    loge.apply(model, RANK)
    for one in (model, other):
        torch.manual_seed(8)
        one.add_adapter("second", LoraConfig(r=3, target_modules=LINEARS, init_lora_weights=init))
        one.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)
    assert_low_rank_of_its_weights(model, other)


# Merging


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe: bool) -> None:
    model, other = lora(), lora()
    loge.apply(model, RANK)
    before = gradients(model)
    for one in (model, other):
        one.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model), logits(other))
    assert_low_rank_of_its_weights(model, other)
    layer = model.get_submodule(modules_of(model, LoGELoraLinear)[0])
    assert layer.why_not_fused() == "adapter is merged"
    for one in (model, other):
        one.unmerge_adapter()
    assert_close(gradients(model), before, 1e-3)
    assert_low_rank_of_its_weights(model, other)


def test_merged_weights_without_gradients_say_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = lora()
    loge.apply(model, RANK)
    model.merge_adapter()
    with torch.no_grad():
        model(input_ids=models.tokens())
    package = Path(loge.__file__).parent
    ours = [w for w in recwarn if package in Path(w.filename).parents or "factors" in str(w.message)]
    assert [str(w.message) for w in ours] == []


def test_a_merge_that_fails_halfway() -> None:
    model, other = two()
    for one in (model, other):
        for name, parameter in one.named_parameters():
            if "second" in name and "q_proj" in name:
                parameter.data.fill_(float("nan"))
        layer = one.base_model.model.model.layers[0].self_attn.q_proj
        with pytest.raises(ValueError, match="NaN"):
            layer.merge(safe_merge=True, adapter_names=["default", "second"])
        assert layer.merged_adapters == ["default"]
        if one is model:
            assert layer.base_layer.factors.made_of.changed(layer.base_layer.weight)


def test_merge_and_unload() -> None:
    model, other = lora(), lora()
    loge.apply(model, RANK)
    merged, expected = model.merge_and_unload(), other.merge_and_unload()
    state = merged.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(merged), logits(expected))
    names = [name for name in modules_of(expected, nn.Linear) if name != "lm_head"]
    use_surrogate(expected, stand_ins(expected, names, RANK))
    assert_close({"x": input_gradient(merged)}, {"x": input_gradient(expected)}, 1e-3)
    loge.remove(merged)
    assert not modules_of(merged, LoGELinear)


# Apply first, adapters later; adapters that are not LoRA


@pytest.mark.xfail(strict=True, reason="PEFT's own layer merges through .data, which nothing counts: call refresh()")
def test_merging_adapters_around_a_converted_model() -> None:
    model, other = llama().requires_grad_(False), lora()
    loge.apply(model, RANK)
    model = lora(model)
    for one in (model, other):
        one.merge_adapter()
    assert_low_rank_of_its_weights(model, other)


def loha(model: nn.Module) -> Any:
    torch.manual_seed(1)
    made = get_peft_model(model, peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj", "down_proj"]))  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if "hada" in name:
            parameter.data = torch.randn(parameter.shape) * 0.2
    return made


def test_another_kind_of_adapter_stays_pefts() -> None:
    model, other = loha(llama()), loha(llama())
    rows = {row.name.split("layers.")[-1]: row for row in loge.apply(model, RANK).layers}
    assert rows["0.self_attn.q_proj"].path in ("base", "skipped")
    assert "loha" in rows["0.self_attn.q_proj"].reason.lower()
    assert rows["0.self_attn.k_proj"].path == "plain"
    names = [row.name for row in rows.values() if row.path in ("base", "plain")]
    names = [n + ".base_layer" if n.rpartition(".")[2] in ("q_proj", "down_proj") else n for n in names]
    merged = copy.deepcopy(other)
    use_surrogate(other, stand_ins(other, names, RANK))
    assert_close(gradients(model), gradients(other))
    for one in (model, merged):
        one.merge_adapter()
    use_surrogate(merged, stand_ins(merged, names, RANK))
    assert_close({"x": input_gradient(model)}, {"x": input_gradient(merged)}, 1e-3)


# remove


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}], ids=str)
def test_remove_gives_back_what_was_there(options: dict[str, Any]) -> None:
    model = lora(**options)
    types = {name: type(module) for name, module in model.named_modules()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    before, output = gradients(model), logits(model)
    loge.apply(model, RANK)
    assert modules_of(model, LoGELoraLinear)
    loge.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert torch.equal(logits(model), output)
    assert_close(gradients(model), before, 0.0)


def test_targets_are_pefts_names() -> None:
    model = lora()
    report = loge.apply(model, RANK, targets=["q_proj", "v_proj"])
    assert [row.name.rpartition(".")[2] for row in report.layers] == ["q_proj", "v_proj"] * 2
    assert len(modules_of(model, LoGELoraLinear)) == 4
    assert len(modules_of(model, LoraLinear)) == 10
