"""SwitchLoRA under `apply`: one op, an exact dX, 8-bit copies that follow every switch, and no factors."""

from __future__ import annotations

import pytest
import torch
from models import logits
from switching import optimizer_of, switching, train

import loge_kernels as loge
from loge_kernels.methods.switchlora.layer import LoGESwitchLoraLinear, SwitchLoraLinear


def test_the_adapter_shares_the_layers_op() -> None:
    model = switching()
    before = logits(model)
    report = loge.apply(model, exact_dtype=None)
    assert {row.path for row in report.layers if row.name.endswith("_proj")} == {"fused"}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    loge.remove(model)
    assert {type(m) for m in model.modules() if isinstance(m, SwitchLoraLinear)} == {SwitchLoraLinear}


def test_8_bit_copies_follow() -> None:
    model = switching()
    loge.apply(model, exact_dtype="int8")
    train(model, optimizer_of(model), stop=4)
    layers = [m.base_layer for m in model.modules() if isinstance(m, LoGESwitchLoraLinear)]
    for layer in layers:
        tensor, scale = layer.eight_bit.current(layer.weight)
        assert ((tensor * scale) - layer.weight).abs().max() <= 0.51 * scale.max()


def test_a_rank_is_refused_and_nothing_changed() -> None:
    model = switching()
    with pytest.raises(ValueError, match=r"rank=16: the weight of layer '.*_proj' changes at every switch"):
        loge.apply(model, 16)
    assert not any(isinstance(m, loge.LoGELinear) for m in model.modules())
