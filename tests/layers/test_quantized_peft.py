"""PEFT models over quantised bases: QLoRA's outputs and adapters, with another backward."""

from __future__ import annotations

import copy
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
    assert_differ,
    bases,
    gradients,
    llama,
    logits,
    lora,
    modules_of,
    paths,
    use_surrogate,
)
from peft import PeftModel
from quantized_layers import quantised_llama, weights_out_of_reach
from situations import checkpointed
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.layers.peft import FusedLora
from loge_kernels.layers.quantized import QuantizedLinear

FLOAT32 = ["nf4", "int8", "torchao int8"]
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*get_apply_tensor_subclass")


def adapted(kind: str, **options: Any) -> Any:
    return lora(quantised_llama(kind), **{**POWER_OF_TWO, **options})


def quantised_names(model: nn.Module) -> list[str]:
    return modules_of(model, lambda module: isinstance(module, QuantizedLinear))


def dense_twin(model: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A converted model without quantisation: its dequantised weights and its adapters in `dtype`, and the input
    gradient of its factors."""
    other = lora(llama(), **{**POWER_OF_TWO, **options}).to(dtype)
    source = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if "base_layer" not in name:
            parameter.data = source[name].detach().to(dtype)
    stand_ins: dict[str, Tensor] = {}
    for name in quantised_names(model):
        layer = model.get_submodule(name)
        other.get_submodule(name).weight.data = layer.dequantize(layer, torch.float32).to(dtype)
        if layer.factors is not None:
            stand_ins[name] = layer.factors.left.to(dtype) @ layer.factors.right.to(dtype)
    use_surrogate(other, stand_ins)
    return other


@pytest.mark.parametrize("kind", FLOAT32)
def test_gradients_are_those_of_a_float64_surrogate(kind: str) -> None:
    model = adapted(kind)
    plain = gradients(model)
    report = loge.apply(model, RANK)
    assert paths(report) == {"fused"}
    assert len(quantised_names(model)) == 14
    got = gradients(model)
    assert_close(got, gradients(dense_twin(model)), 1e-4)
    assert_differ(got, plain)
    for name in quantised_names(model):
        model.get_submodule(name).exact_fraction = 1.0
    assert_close(gradients(model), plain, 1e-4)


@pytest.mark.parametrize("kind", [*FLOAT32, "nf4 in bfloat16", "torchao float8", "torchao int4"])
def test_outputs_are_pefts_and_remove_gives_its_model_back(kind: str) -> None:
    model, other = adapted(kind), adapted(kind)
    kinds = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    loge.apply(model, RANK)
    assert torch.equal(logits(model), logits(other))
    assert list(model.state_dict()) == keys
    gradients(model)
    loge.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert_close(gradients(model), gradients(other), 0.0)


@pytest.mark.parametrize("kind", [*FLOAT32, "nf4 in bfloat16"])
def test_training_lowers_the_loss_without_dequantising(kind: str) -> None:
    model = adapted(kind)
    loge.apply(model, RANK)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=models.tokens(), labels=models.tokens()).loss
        with weights_out_of_reach(model):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_rows_of_the_report() -> None:
    rows = {row.name.split("layers.")[-1]: row for row in loge.apply(adapted("nf4"), RANK).layers}
    row = rows["0.mlp.gate_proj"]
    assert (row.shape, row.rank, row.path, row.reason) == ((96, 64), 16, "fused", "NF4 base")
    assert row.energy > 0.3
    rows = {row.name.split("layers.")[-1]: row for row in loge.apply(adapted("nf4", use_dora=True), RANK).layers}
    assert rows["0.mlp.gate_proj"].path == "base"
    assert rows["0.mlp.gate_proj"].reason.startswith("NF4 base; LoRA variant Dora")
    report = loge.apply(adapted("nf4", target_modules=["q_proj"]), RANK)
    paths_of = {row.name.rpartition(".")[2]: row.path for row in report.layers}
    assert paths_of == {"q_proj": "fused", **dict.fromkeys(LINEARS[1:], "plain"), "lm_head": "skipped"}


# Mixed precision


def test_float32_activations_over_a_bfloat16_base_leave_the_adapter_to_peft() -> None:
    """QLoRA without autocast: the adapter in float32, the base's products in bfloat16, in both directions."""
    model, other = adapted("nf4 in bfloat16"), adapted("nf4 in bfloat16")
    loge.apply(model, 1.0)
    assert torch.equal(logits(model), logits(other))
    assert_close(gradients(model), gradients(other), 0.05)
    layer: Any = next(module for module in model.modules() if isinstance(module, FusedLora))
    assert layer.why_not_fused() is None
    assert "torch.bfloat16" in layer.why_not_fused(torch.zeros(1, 64))
    assert layer.why_not_fused(torch.zeros(1, 64, dtype=torch.bfloat16)) is None


def test_under_autocast_within_twice_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = adapted("nf4 in bfloat16"), adapted("nf4 in bfloat16")
    loge.apply(model, 1.0)
    for name in quantised_names(model):
        layer = model.get_submodule(name)
        layer.factors = loge.factorize(layer.dequantize(layer, torch.float32), 1.0).bind(layer.weight)
    truth = gradients(dense_twin(model))
    fused: list[Tensor] = []
    run = QuantizedLinear.run
    monkeypatch.setattr(QuantizedLinear, "run", lambda self, x, *rest: fused.append(rest[0]) or run(self, x, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = gradients(model), gradients(other)
    assert len(fused) == 14
    assert all(adapter is not None for adapter in fused)
    models.assert_within_twice_pefts(got, plain, truth)


# The rest of training


@pytest.mark.parametrize("kind", FLOAT32)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_dropout(kind: str, reentrant: bool) -> None:
    model = adapted(kind, lora_dropout=0.5)
    loge.apply(model, RANK)
    model.train().enable_input_require_grads()
    expected = gradients(model, seed=4)
    assert_close(gradients(checkpointed(model, reentrant), seed=4), expected, 0.0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_every_second_forward_exact_and_8_bits(kind: str) -> None:
    model = adapted(kind).train()
    exact = gradients(model)
    loge.apply(model, RANK, exact_every=2)
    assert_close(gradients(model), exact, 1e-4)
    assert_differ(gradients(model), exact)
    assert_close(gradients(model), exact, 1e-4)
    loge.remove(model)
    loge.apply(model, exact_dtype="int8")
    in_eight_bits = gradients(model)
    assert_close(in_eight_bits, exact, 0.1)
    assert any(not torch.allclose(in_eight_bits[name], exact[name], rtol=1e-4) for name in exact)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_factors_follow_a_merge(kind: str) -> None:
    model, other = adapted(kind), adapted(kind)
    loge.apply(model, RANK)
    name = quantised_names(model)[0]
    layer = model.get_submodule(name)
    before = layer.dense_weight()
    for one in (model, other):
        one.merge_adapter()
    assert not torch.allclose(layer.dense_weight(), before)
    merged = models.input_gradient(model)
    assert torch.equal(layer.factors.left, loge.factorize(layer.dense_weight(), 16).left)
    assert not layer.factors.made_of.changed(layer.weight)
    again = copy.deepcopy(other)
    loge.apply(again, RANK)
    assert_close({"x": merged}, {"x": models.input_gradient(again)}, 1e-5)
    model.unmerge_adapter()
    models.input_gradient(model)
    assert torch.equal(layer.factors.left, loge.factorize(layer.dense_weight(), 16).left)


@pytest.mark.parametrize("kind", FLOAT32)
def test_adapters_are_saved_and_loaded_as_ever(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    loge.apply(model, RANK)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised_llama(kind), tmp_path, is_trainable=True)
    loge.apply(again, RANK)
    assert_close(gradients(again), gradients(model), 0.0)
    with model.disable_adapter(), again.disable_adapter():
        assert torch.equal(logits(model), logits(again))


def test_two_adapters_take_pefts_forward() -> None:
    model, other = adapted("nf4"), adapted("nf4")
    for one in (model, other):
        torch.manual_seed(3)
        one.add_adapter("second", copy.deepcopy(one.peft_config["default"]))
        one.base_model.set_adapter(["default", "second"])
        models.randomised(one)
    report = loge.apply(model, RANK)
    assert paths(report) == {"base"}
    assert torch.equal(logits(model), logits(other))
    got = gradients(model)
    assert got.keys() == gradients(other).keys()
    model.base_model.set_adapter("default")
    assert bases(model) == []  # none of them is PEFT's plain layer


@pytest.mark.parametrize("kind", FLOAT32)
@pytest.mark.parametrize("subspace", ["gradient", "salience"])
def test_calibrated_subspaces(kind: str, subspace: str) -> None:
    model = adapted(kind)
    batch = {"input_ids": models.tokens(), "labels": models.tokens()}
    statistics = loge.calibrate(model.train(), [batch], scores=subspace == "salience")
    report = loge.apply(model, RANK, subspace=subspace, calibration=statistics)
    assert paths(report) == {"fused"}
    tolerance = 3e-3 if kind == "int8" else 1e-4  # factors in float16
    for name in quantised_names(model):
        layer = model.get_submodule(name)
        left, right = layer.factors.left.float(), layer.factors.right.float()
        torch.testing.assert_close(right @ right.t(), torch.eye(layer.factors.rank), rtol=0, atol=tolerance)
        torch.testing.assert_close(left, layer.dense_weight().float() @ right.t(), rtol=0, atol=tolerance)
        assert not layer.factors.made_of.changed(layer.weight)
    assert_close(gradients(model), gradients(dense_twin(model)), 1e-4)
