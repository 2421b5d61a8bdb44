"""`apply` on PEFT models: PEFT's outputs and gradients, files and names, with another backward."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import (
    LINEARS,
    POWER_OF_TWO,
    RANK,
    assert_close,
    bases,
    gradients,
    llama,
    logits,
    lora,
    modules_of,
    paths,
    stand_ins,
    twins,
    use_surrogate,
)
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.layers.peft import LoGELoraLinear

# Gradients


CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain": ({}, "fused", ""),
    "rslora": ({"use_rslora": True, "r": 5}, "fused", ""),
    "alpha": ({"lora_alpha": 1}, "fused", ""),
    "bias lora_only": ({"bias": "lora_only"}, "fused", ""),
    "bias all": ({"bias": "all"}, "fused", ""),
    "modules_to_save": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "fused", ""),
    "rank pattern": ({"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}}, "fused", ""),
    "lora_bias": ({"lora_bias": True}, "base", "bias"),
    "dora": ({"use_dora": True}, "base", "DoraLinearVariant"),
}


@pytest.mark.parametrize(("options", "path", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_low_rank_gradients_are_those_of_the_surrogate(options: dict[str, Any], path: str, reason: str) -> None:
    model, other, report = twins(**options)
    assert paths(report) == {path}
    assert all(reason in row.reason for row in report.layers if row.path == path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    assert_close(gradients(model), gradients(other))
    models.assert_differ(gradients(model), gradients(lora(**options)))


def test_layers_with_a_bias() -> None:
    def build() -> Any:
        return lora(llama(attention_bias=True, mlp_bias=True), bias="all")

    model, other = build(), build()
    loge.apply(model, RANK)
    use_surrogate(other, stand_ins(other, bases(other), RANK))
    got = gradients(model)
    assert any(name.endswith("base_layer.bias") for name in got)
    assert_close(got, gradients(other))


def test_layers_without_an_adapter_are_plain() -> None:
    model, other = lora(target_modules=["q_proj"]), lora(target_modules=["q_proj"])
    report = loge.apply(model, RANK)
    assert {row.name.rpartition(".")[2]: row.path for row in report.layers} == {
        "q_proj": "fused",
        **dict.fromkeys(LINEARS[1:], "plain"),
        "lm_head": "skipped",
    }
    names = modules_of(other, lambda m: type(m) is nn.Linear and "lora" not in str(m))
    names = [n for n in names if "lora_" not in n and "lm_head" not in n]
    use_surrogate(other, stand_ins(other, names, RANK))
    assert_close(gradients(model), gradients(other))


@pytest.mark.parametrize("path", ["fused", "base"])
def test_outputs_are_pefts_to_the_bit(path: str) -> None:
    options = {**POWER_OF_TWO, "use_dora": path == "base"}
    model, other = lora(**options), lora(**options)
    assert paths(loge.apply(model, RANK)) == {path}
    assert torch.equal(logits(model), logits(other))


def test_options_reach_the_fused_op() -> None:
    model, other = lora(), lora()
    report = loge.apply(model, RANK, exact_fraction=1.0, exact_dtype=None, backend="reference")
    assert paths(report) == {"fused"}
    assert_close(gradients(model), gradients(other))
    model.get_submodule(bases(model)[0]).backend = "nope"
    with pytest.raises(ValueError, match="nope"):
        gradients(model)


# Dropout


def test_dropout_only_in_training() -> None:
    options = {**POWER_OF_TWO, "lora_dropout": 0.3}
    model, other = lora(**options), lora(**options)
    assert paths(loge.apply(model, RANK)) == {"fused"}
    model.eval()
    other.eval()
    assert torch.equal(logits(model), logits(other))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_dropout_has_pefts_mean_and_spread() -> None:
    model, other = (lora(lora_dropout=0.3, target_modules=["q_proj"]) for _ in range(2))
    loge.apply(model, RANK)
    name = next(iter(modules_of(model, LoGELoraLinear)))
    ours, pefts = model.get_submodule(name).train(), other.get_submodule(name).train()
    x = torch.randn(1, 64).expand(4000, 64)
    with torch.no_grad():
        mine, theirs, mean = ours(x), pefts(x), pefts.eval()(x[:1])
    spread = theirs.std(0)
    assert ((mine.mean(0) - mean).abs() < 5 * spread / 4000**0.5 + 1e-6).all()
    torch.testing.assert_close(mine.std(0), spread, rtol=0.15, atol=1e-6)


# Files and names


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"], "bias": "all"}, {"use_dora": True}], ids=str)
def test_saved_adapters_are_pefts_to_the_byte(options: dict[str, Any], tmp_path: Path) -> None:
    model, other = lora(**options), lora(**options)
    loge.apply(model, RANK, exact_every=2)
    for one in (model, other):
        gradients(one)
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    model.save_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "pefts")
    names = sorted(path.name for path in (tmp_path / "pefts").iterdir())
    assert "adapter_model.safetensors" in names
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert filecmp.cmp(tmp_path / "ours" / name, tmp_path / "pefts" / name, shallow=False), name
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=1e-5, atol=1e-5)


# What keeps an adapter out of the op


def hook_base(layer: Any, seen: list[str]) -> None:
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))


def hook_adapter(layer: Any, seen: list[str]) -> None:
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append("A"))


def replace_forward(layer: Any, seen: list[str]) -> None:
    original = layer.lora_B["default"].forward

    def forward(x: Tensor) -> Tensor:
        seen.append("B")
        return original(x)

    layer.lora_B["default"].forward = forward


def half_adapter(layer: Any, seen: list[str]) -> None:
    layer.lora_A["default"].bfloat16()
    layer.lora_B["default"].bfloat16()
    seen.append("cast")


def always_drop(layer: Any, seen: list[str]) -> None:
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    seen.append("dropout")


def other_dropout(layer: Any, seen: list[str]) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)
    seen.append("dropout")


@pytest.mark.parametrize("change", [hook_base, hook_adapter, replace_forward, half_adapter, always_drop, other_dropout])
def test_obstacles(change: Callable[[Any, list[str]], None]) -> None:
    model, other = lora(), lora()
    report = None
    seen: list[str] = []
    for one in (model, other):
        change(one.base_model.model.model.layers[0].mlp.up_proj, seen)
    report = loge.apply(model, RANK)
    rows = {row.name.split("layers.")[-1]: row for row in report.layers}
    assert rows["0.mlp.up_proj"].path == "base"
    assert rows["0.mlp.up_proj"].reason
    assert rows["1.mlp.up_proj"].path == "fused"
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=5e-3)
    assert len(seen) in (0, 2), "what was hooked runs in both"
    assert bool(seen) == (change in (hook_base, hook_adapter, replace_forward))


class Quantised(nn.Linear):
    """Stands for a quantised layer under an adapter."""


def test_a_quantised_base_is_left_to_peft() -> None:
    base = llama()
    base.model.layers[0].mlp.up_proj.__class__ = Quantised
    model = lora(base)
    rows = {row.name.split("layers.")[-1]: row for row in loge.apply(model, RANK).layers}
    assert rows["0.mlp.up_proj"].path == "skipped"
    assert "Quantised" in rows["0.mlp.up_proj"].reason
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert (type(layer), type(layer.base_layer)) == (LoraLinear, Quantised)


def test_an_adapted_head() -> None:
    model, other = (lora(target_modules=["q_proj", "lm_head"]) for _ in range(2))
    rows = {row.name.rpartition(".")[2]: row for row in loge.apply(model, exact_dtype=None).layers}
    assert rows["lm_head"].path == "skipped"
    assert type(model.base_model.model.lm_head) is LoraLinear
    assert_close(gradients(model), gradients(other))
