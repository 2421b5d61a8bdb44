"""`remove(model, weights=)`: the weights that a base in 8 bits stood for, or one clear refusal that changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import llama, logits, lora
from torch import nn

import loge_kernels as loge

NAMED = pytest.mark.parametrize("name", ["float8", "int8"])


def merge(model: Any) -> Any:
    model.merge_adapter()
    return model


@NAMED
@pytest.mark.filterwarnings("ignore:merged into a weight")
@pytest.mark.parametrize("how", [merge, lambda model: model.merge_and_unload()], ids=["merged", "unloaded"])
def test_an_adapter_that_is_merged_is_not_lost(name: str, how: Callable[[Any], Any]) -> None:
    model = lora()
    whole = copy.deepcopy(model.state_dict())
    loge.apply(model, base_dtype=name)
    model = how(model)
    inside = logits(model)
    with pytest.raises(ValueError, match=r"an adapter is merged into layer '.*q_proj', and weights is without"):
        loge.remove(model, weights=whole)
    assert torch.equal(logits(model), inside)


@pytest.mark.filterwarnings("ignore:merged into a weight")
def test_an_adapter_that_was_unmerged_is_no_obstacle() -> None:
    model = lora()
    whole, before = copy.deepcopy(model.state_dict()), logits(model)
    loge.apply(model, base_dtype="int8")
    model.merge_adapter()
    model.unmerge_adapter()
    loge.remove(model, weights=whole)
    assert torch.equal(logits(model), before)


def test_the_weights_given_stay_the_callers() -> None:
    model, reference = llama().requires_grad_(False), llama()
    loge.apply(model, base_dtype="int8")
    loge.remove(model, weights=reference.state_dict())
    before = logits(reference)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    assert torch.equal(logits(reference), before)


@NAMED
def test_a_model_that_was_cast_meanwhile_stays_so(name: str) -> None:
    model, expected = llama().requires_grad_(False), llama().bfloat16()
    loge.apply(model, base_dtype=name)
    model.bfloat16()
    loge.remove(model, weights=llama().state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(expected))


def on_meta(model: Any) -> Any:
    return {name: tensor.to("meta") for name, tensor in lora().state_dict().items()}


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (on_meta, ValueError, r"weights has a torch.float32 \(.*\) on meta for '.*q_proj.weight'; expected"),
        (lambda model: model.state_dict(), ValueError, r"weights has a torch.float8_e4m3fn \(.*\) on cpu for"),
        (lambda model: dict.fromkeys(model.state_dict(), 3), ValueError, "weights has a int for"),
        (lambda model: 5, TypeError, "weights is a int; give a state dict, or None"),
    ],
    ids=["meta", "its own", "numbers", "a number"],
)
def test_other_weights_change_nothing(weights: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    model = lora()
    loge.apply(model, base_dtype="float8")
    inside = logits(model)
    with pytest.raises(error, match=words):
        loge.remove(model, weights=weights(model))
    assert torch.equal(logits(model), inside)


def test_a_single_layer_and_what_is_none() -> None:
    layer = nn.Linear(32, 16).requires_grad_(False)
    whole = copy.deepcopy(layer.state_dict())
    loge.apply(layer, targets=[""], base_dtype="int8")
    with pytest.raises(ValueError, match=r"weights has nothing for 'weight'; expected \(16, 32\)"):
        loge.remove(layer, weights={})
    loge.remove(layer, weights=whole)
    assert torch.equal(layer.weight, whole["weight"])
    nothing: Any = None
    with pytest.raises(TypeError, match=r"model is a NoneType; expected a torch\.nn\.Module"):
        loge.remove(nothing)
