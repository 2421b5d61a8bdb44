"""SwitchLoRA as a method of PEFT: start, parameter counts, saving, errors."""

import math

import pytest
import torch
from models import llama, logits
from peft import PeftModel, get_peft_model
from switching import assert_identical, config, optimizer_of, state_of, switching, train
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import loge_kernels as loge
from loge_kernels.methods.switchlora.law import deviations
from loge_kernels.methods.switchlora.layer import SwitchLoraLinear


def layers(model):
    return [module for module in model.modules() if isinstance(module, SwitchLoraLinear)]


@pytest.mark.parametrize(("r", "millions"), [(256, 370.65), (512, 609.72)])
def test_the_papers_parameter_counts(r, millions):
    sizes = {"hidden_size": 2048, "intermediate_size": 5461, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32100, **sizes))
        dense = sum(p.numel() for p in model.parameters())
        adapted = get_peft_model(model, loge.SwitchLoraConfig(r=r))
    assert round(dense / 1e6, 2) == 1339.49
    assert round(sum(p.numel() for p in adapted.parameters() if p.requires_grad) / 1e6, 2) == millions


def test_the_start_is_the_dense_function():
    dense = logits(llama())
    torch.testing.assert_close(logits(switching()), dense, rtol=1e-5, atol=1e-5)


def test_a_16_bit_start_is_the_dense_function_within_its_rounding():
    truth = logits(llama(torch.bfloat16).double())
    plain = (logits(llama(torch.bfloat16)).double() - truth).abs().max()
    model = switching(torch.bfloat16)
    assert (logits(model).double() - truth).abs().max() <= 2 * plain
    for layer in layers(model):
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        start = layer.base_layer.weight.double() + layer.remainder.double() + layer.scaling["default"] * B @ A
        original = llama(torch.bfloat16).get_submodule(layer.path).weight.double()
        assert (start - original).abs().max() < 2e-5 * original.abs().max()


def test_the_law_of_the_start():
    N, K, r = 384, 128, 16
    std_A, std_B = deviations(N, K, r)
    assert math.isclose(std_A, (math.sqrt(N) * r / K**1.5) ** 0.25 * 3**-0.25)
    assert math.isclose(std_B, (r / math.sqrt(N * K)) ** 0.25 * 3**-0.25)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 2))
    adapted = get_peft_model(model, loge.SwitchLoraConfig(r=r, target_modules=["0"], total_steps=10))
    place = optimizer_of(adapted).switcher.places[0]
    for matrix, pool, std in zip(place.matrices, (place.A, place.B), (std_A, std_B), strict=True):
        for values in (matrix.detach(), pool.candidates):
            assert abs(values.std().item() / std - 1) < 0.05
            assert values.abs().max() <= math.sqrt(3) * std
    assert place.A.candidates.shape == (128, K)
    assert place.B.candidates.shape == (128, N)


def test_the_start_follows_from_the_seed_alone():
    first = switching()
    torch.manual_seed(1234)
    second = get_peft_model(llama(), config())
    assert_identical(state_of(first), state_of(second))
    other = switching(seed=1)
    assert not torch.equal(layers(first)[0].lora_A["default"].weight, layers(other)[0].lora_A["default"].weight)
    matrices = [layer.lora_A["default"].weight for layer in layers(first) if layer.in_features == 64]
    assert not any(torch.equal(matrices[0], matrix) for matrix in matrices[1:])


def test_everything_but_the_weights_under_adapters_is_trained():
    model = switching()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"{name}.base_layer.weight" for name, m in model.named_modules() if isinstance(m, SwitchLoraLinear)
    }
    assert all("lora_" in name for name, p in switching(train_rest=False).named_parameters() if p.requires_grad)


@pytest.mark.parametrize("train_rest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_is_the_trained_model(tmp_path, dtype, train_rest):
    model = switching(dtype, train_rest=train_rest)
    train(model, optimizer_of(model))
    model.save_pretrained(tmp_path)
    torch.manual_seed(55)
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path)
    assert_identical(state_of(loaded), state_of(model))
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    assert loaded.peft_config["default"].total_steps == 1000
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "lora_" in name)


def test_tied_embeddings_are_saved_and_stay_tied(tmp_path):
    model = get_peft_model(llama(tied=True), config())
    train(model, optimizer_of(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tied=True), tmp_path, is_trainable=True)
    assert_identical(state_of(loaded), state_of(model))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.get_input_embeddings().weight.requires_grad


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_is_refused():
    base = llama(tied=True)
    before = logits(base)
    with pytest.raises(
        ValueError, match=r"'lm_head' has a tied weight \(model.embed_tokens.weight and lm_head.weight\)"
    ):
        get_peft_model(base, config(target_modules=["lm_head"]))
    assert torch.equal(logits(base), before)
    get_peft_model(llama(), config(target_modules=["lm_head"]))


def test_a_merged_model_gives_the_same_logits():
    model = switching()
    train(model, optimizer_of(model))
    before = logits(model.eval())
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 9, "freeze_steps": 5}, "interval=9 .* 2 · freeze_steps = 10"),
        ({"interval": 0.5, "freeze_steps": 0}, "interval=0.5"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"r": 0}, "r=0"),
        ({"freeze_steps": -1}, "freeze_steps=-1"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"pool_device": "disk"}, "pool_device='disk' .* 'cuda:N'"),
        ({"pool_device": "meta"}, "pool_device='meta'"),
        ({"lora_alpha": 16}, "lora_alpha=16 and alpha=1"),
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_configs_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_rank_above_the_pool_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"r=33 is larger than the pool of .*k_proj \[32, 64\], min\(N, K\) = 32"):
        switching(r=33)
    with pytest.raises(ValueError, match="r=33"):
        switching(r=4, rank_pattern={"k_proj": 33})


def test_at_the_full_rank_nothing_is_switched():
    switcher = optimizer_of(switching(r=32)).switcher
    assert {place.layer.out_features for place in switcher.places} == {64, 96}


def test_one_adapter_alone():
    with pytest.raises(ValueError, match="one adapter"):
        switching().add_adapter("second", config())


def test_a_layer_that_cannot_be_edited_is_refused():
    with pytest.raises(TypeError, match="Embedding"):
        get_peft_model(llama(), config(target_modules=["embed_tokens"]))
