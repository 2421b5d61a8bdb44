"""`register_fused`: a PEFT layer of one's own shares the op."""

from __future__ import annotations

from typing import Any

import pytest
from models import assert_close, gradients, lora, paths
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

import loge_kernels as loge
from loge_kernels.layers import peft as peft_layers


class Mine(LoraLinear):
    """A LoRA layer whose user has given it a class."""


def mine() -> Any:
    model = lora()
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = Mine
    return model


def test_a_layer_of_ones_own_is_fused_once_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layers, "_FUSED", dict(peft_layers._FUSED))

    class FusedMine(loge.FusedAdapter, Mine):
        def held(self) -> list[str]:
            return list(self.active_adapters)

        def why_not(self, name: str) -> str | None:
            return None

        def lora(self, name: str) -> tuple[Any, Any, nn.Module]:
            return self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]

    model, expected = mine(), gradients(mine())
    with pytest.raises(ValueError, match=r"its adapter is a .*Mine: factors could not follow"):
        loge.apply(model, exact_dtype=None)
    loge.register_fused(Mine, FusedMine)
    report = loge.apply(model, exact_dtype=None)
    assert paths(report) == {"fused"}
    assert_close(gradients(model), expected)
    loge.remove(model)
    assert {type(module) for module in model.modules() if isinstance(module, LoraLinear)} == {Mine}

    with pytest.raises(ValueError, match="layer_class=Mine has FusedMine already"):
        loge.register_fused(Mine, FusedMine)


def test_a_class_that_cannot_stand_for_the_layer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fused_class=Mine: give a class with the bases \(FusedAdapter, Linear\)"):
        loge.register_fused(LoraLinear, Mine)
    with pytest.raises(TypeError, match="FusedAdapter"):
        loge.register_fused(Mine, peft_layers.LoGELoraLinear)
