"""LoRETTA_rep as a method of PEFT, alone and under `apply`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from loretta_models import adapted, adapters, family, gradcheck, gradients, inputs, moved, output
from models import assert_close, assert_differ
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import loge_kernels as loge
from loge_kernels.methods.loretta.rep_layer import RepLinear
from loge_kernels.methods.loretta.tensor_train import TensorTrain

REP = loge.LorettaRepConfig()
PLAIN = loge.LorettaRepConfig(dropout=0.0)


def test_the_start_is_exact_under_dropout():
    model = adapted("llama", loge.LorettaRepConfig(dropout=0.5)).train()
    assert torch.equal(output(model, "llama"), output(family("llama"), "llama"))


def test_targets_of_the_families():
    leaves = {
        "llama": {"q_proj", "v_proj"},
        "bert": {"query", "value"},
        "deberta": {"in_proj"},
        "deberta-v2": {"query_proj", "value_proj"},
        "vit": {"q_proj", "v_proj"},
    }
    for name, expected in leaves.items():
        assert {layer.rpartition(".")[2] for layer in adapters(adapted(name, REP))} == expected


def test_the_output_is_that_of_the_moved_weight():
    model, expected = moved(adapted("llama", PLAIN)), family("llama")
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, RepLinear):
            A, B = layer.loretta_rep_A["default"], layer.loretta_rep_B["default"]
            A0, B0 = layer.loretta_rep_A0["default"], layer.loretta_rep_B0["default"]
            delta = B.matrix() @ A.matrix() - B0.matrix() @ A0.matrix()
            expected.get_submodule(name).weight.data += 16 / 8 * delta
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "modules_to_save"):
            expected.get_submodule(name).load_state_dict(module.modules_to_save["default"].state_dict())
    difference = (output(model, "llama") - output(family("llama"), "llama")).abs().max()
    assert difference > 0.1
    torch.testing.assert_close(output(model, "llama"), output(expected, "llama"), atol=1e-5, rtol=1e-5)


def test_gradients_of_the_cores():
    layer = RepLinear(nn.Linear(12, 18).double())
    layer.update_layer("default", loge.LorettaRepConfig(tensor_rank=2, bottleneck=3, dropout=0.0))
    layer.base_layer.requires_grad_(False)
    assert len([p for p in layer.parameters() if p.requires_grad]) == 4
    assert gradcheck(moved(layer), torch.randn(4, 12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_gives_the_same_logits(dtype):
    base = family("llama").to(dtype)
    model = moved(get_peft_model(base, copy.deepcopy(PLAIN)).eval())
    frozen = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    expected, weight = output(model, "llama"), frozen.clone()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    model.merge_adapter()
    torch.testing.assert_close(output(model, "llama"), expected, **tolerance)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model, "llama"), expected, **tolerance)
    torch.testing.assert_close(frozen, weight, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=0)
    merged = model.merge_and_unload(safe_merge=True)
    assert not adapters(merged)
    torch.testing.assert_close(output(merged, "llama"), expected, **tolerance)


def test_a_merge_that_is_not_finite_is_refused():
    model = adapted("llama", PLAIN)
    layer = next(m for m in model.modules() if isinstance(m, RepLinear))
    layer.loretta_rep_A["default"].core_0.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="adapter 'default' would make weight of Linear not finite"):
        model.merge_adapter(safe_merge=True)


def test_a_quantised_weight_is_not_merged_into():
    layer = RepLinear(nn.Linear(12, 18))
    layer.update_layer("default", REP)
    layer.base_layer.weight = nn.Parameter(torch.zeros(108, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"cannot be merged into a Linear with weight in torch.uint8: dequantise"):
        layer.merge()


def test_norms_train_and_come_back(tmp_path):
    model = moved(adapted("llama", REP))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "loretta" not in n}
    assert len(trained) == 5
    assert all("norm" in n and n.endswith("modules_to_save.default.weight") for n in trained)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.model.norm.weight"], model.base_model.model.model.norm.weight)
    kept = set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"])
    assert kept == {"input_layernorm", "norm", "post_attention_layernorm"}
    without = adapted("llama", loge.LorettaRepConfig(train_norms=False))
    assert all("loretta" in n for n, p in without.named_parameters() if p.requires_grad)


def test_several_adapters():
    model = moved(adapted("llama", PLAIN))
    first = output(model, "llama")
    model.add_adapter("second", loge.LorettaRepConfig(bottleneck=6, tensor_rank=3, dropout=0.0))
    assert model.peft_config["second"].modules_to_save == model.peft_config["default"].modules_to_save
    assert not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)
    assert torch.equal(output(model, "llama"), first)
    model.set_adapter("second")
    assert torch.equal(output(model, "llama"), output(family("llama"), "llama"))
    moved(model)
    second = output(model, "llama")
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(output(model, "llama"), first)
    model.delete_adapter("default")
    assert torch.equal(output(model, "llama"), second)


def test_an_inactive_adapter_on_layers_of_its_own_does_not_train():
    def trained():
        names = (n for n, p in model.named_parameters() if p.requires_grad and "loretta_rep" in n)
        return {n.partition(".loretta_rep")[0].rpartition(".")[2] for n in names}

    model = get_peft_model(family("llama"), REP, adapter_name="first")
    model.add_adapter("second", loge.LorettaRepConfig(target_modules=["k_proj"]))
    assert trained() == {"q_proj", "v_proj"}
    model.set_adapter("second")
    assert trained() == {"k_proj"}


def test_two_active_adapters_add_up():
    model = moved(adapted("llama", loge.LorettaRepConfig(dropout=0.0, train_norms=False)))
    model.add_adapter("second", loge.LorettaRepConfig(bottleneck=6, tensor_rank=3, dropout=0.0, train_norms=False))
    model.set_adapter("second")
    moved(model)
    model.base_model.set_adapter(["default", "second"])
    both = output(model, "llama")
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged, "llama"), both, atol=1e-5, rtol=1e-5)


def test_the_trainer_of_transformers(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted("llama", REP)
    batch = inputs("llama")
    data = [{key: value[i % 3] for key, value in batch.items()} for i in range(12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    before = output(model, "llama")
    Trainer(model=model, args=arguments, train_dataset=data).train()
    model.eval()
    assert not torch.equal(output(model, "llama"), before)
    again = PeftModel.from_pretrained(family("llama"), tmp_path / "checkpoint-3").eval()
    assert torch.equal(output(again, "llama"), output(model, "llama"))


# Under `apply`


def test_dropout_under_apply():
    model = moved(adapted("llama", loge.LorettaRepConfig(dropout=0.5))).train()
    loge.apply(model, rank=0.25)
    again = gradients(model, seed=1)
    assert_close(again, gradients(model, seed=1))
    assert_differ(again, gradients(model, seed=2))


def test_factors_follow_a_merge():
    model = moved(adapted("llama", PLAIN))
    loge.apply(model, rank=0.25)
    layer = next(m for m in model.modules() if isinstance(m, RepLinear))
    layer.train()
    factors = layer.base_layer.current_factors()
    before = factors.left @ factors.right
    layer.merge()
    merged = layer.base_layer.current_factors()
    assert not torch.allclose(merged.left @ merged.right, before, atol=1e-3)
    layer.unmerge()
    after = layer.base_layer.current_factors()
    torch.testing.assert_close(after.left @ after.right, before, atol=1e-4, rtol=1e-4)


# What is refused


def test_other_layers_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(12, 18))
    with pytest.raises(ValueError, match="target '0' is a Embedding; LoRETTA goes on"):
        get_peft_model(model, loge.LorettaRepConfig(target_modules=["0"]))


def test_shapes_of_the_user_are_taken():
    config = loge.LorettaRepConfig(tensor_shapes={"64x8": [2, 32, 8]})
    layer = next(m for m in adapted("llama", config).modules() if isinstance(m, TensorTrain))
    assert (layer.in_modes, layer.out_modes) == ((2, 32), (8,))
