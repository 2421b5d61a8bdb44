"""What PEFT's own tests of LoRA on linear layers hold, held of converted models: whatever is done to a converted model
leaves it in the state, with the outputs and the gradients of PEFT's own after the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LINEARS, assert_close, gradients, input_gradient, llama, logits, lora, modules_of, tokens
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter

import loge_kernels as loge
from loge_kernels import LoGELinear

SECOND = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]}


def several() -> Any:
    """A model with the adapters "default", "second" and "like" (of default's rank), all of them other than zero."""
    model = lora()
    torch.manual_seed(21)
    model.add_adapter("second", LoraConfig(**SECOND, init_lora_weights=False))
    model.add_adapter("like", LoraConfig(r=4, lora_alpha=3, target_modules=LINEARS, init_lora_weights=False))
    return model


def exact(model: Any) -> None:
    loge.apply(model, exact_dtype=None)


def full_rank(model: Any) -> None:
    """Through factors that leave nothing of the weights out."""
    exact(model)
    for name in modules_of(model, lambda module: isinstance(module, LoGELinear) and module.converted):
        layer: Any = model.get_submodule(name)
        layer.factors = loge.factorize(layer.weight, 1.0)


def weighted(kind: str, **options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        torch.manual_seed(5)
        adapters = ["default", "like"] if kind not in ("cat", "svd") else ["default", "second"]
        model.add_weighted_adapter(adapters, [0.7, -0.4], "sum", combination_type=kind, **options)
        model.set_adapter("sum")

    return change


def both_merged_and_back(model: Any) -> None:
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    model.unmerge_adapter()


def merged_and_disabled(model: Any) -> None:
    model.merge_adapter()
    with model.disable_adapter():  # takes the merge back
        model(input_ids=tokens())


def layers_off_and_on(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model(input_ids=tokens())
    model.base_model.enable_adapter_layers()


def deleted(model: Any) -> None:
    model.delete_adapter("default")
    model.set_adapter("like")


def frozen_second(model: Any) -> None:
    model.set_adapter("second", inference_mode=True)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)
    model.set_requires_grad("second")


def added_later(model: Any) -> None:
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model.add_adapter("later", config)
    model.set_adapter("later")


def copied(model: Any) -> None:
    """The copy is dropped: it takes nothing of the model along."""
    copy.deepcopy(model)(input_ids=tokens())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("second"),
    "both active": lambda model: model.base_model.set_adapter(["default", "second"]),
    "merged and disabled": merged_and_disabled,
    "one of two merged": lambda model: model.merge_adapter(["second"]),
    "merged safely": lambda model: model.merge_adapter(safe_merge=True),
    "both merged and back": both_merged_and_back,
    "layers off": lambda model: model.base_model.disable_adapter_layers(),
    "layers off and on": layers_off_and_on,
    "deleted": deleted,
    "set_requires_grad": frozen_second,
    "added later, with a head": added_later,
    "linear": weighted("linear"),
    "cat": weighted("cat"),
    "svd": weighted("svd"),
    "ties": weighted("ties", density=0.5),
    "dare_ties": weighted("dare_ties", density=0.5),
    "magnitude_prune": weighted("magnitude_prune", density=0.5),
    "merged and unloaded": lambda model: model.merge_and_unload(adapter_names=["default", "second"]),
    "unloaded": lambda model: model.unload(),
    "copied": copied,
}


def assert_alike(model: Any, other: Any) -> None:
    """State, what trains, outputs in both modes, gradients."""
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6)
    trained = [[name for name, p in one.named_parameters() if p.requires_grad] for one in (model, other)]
    assert trained[0] == trained[1]
    for training in (False, True):
        torch.testing.assert_close(logits(model.train(training)), logits(other.train(training)), rtol=1e-4, atol=1e-5)
    assert_close({"x": input_gradient(model)}, {"x": input_gradient(other)}, 1e-4)
    if other(input_ids=tokens()).logits.requires_grad:
        assert_close(gradients(model), gradients(other), 1e-4)


@pytest.mark.parametrize("convert", [exact, full_rank])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_as_pefts_own(change: Callable[[Any], Any], convert: Callable[[Any], None]) -> None:
    model, other = several(), several()
    convert(model)
    # What a change returns, where it does, is the model without its adapters.
    left = [one if result is None else result for one in (model, other) for result in [change(one)]]
    if change in (CHANGES["merged and unloaded"], CHANGES["unloaded"]):
        assert not any("lora" in name for name in left[0].state_dict())
    assert_alike(*left)


@pytest.mark.parametrize("convert", [exact, full_rank])
def test_rescaled(convert: Callable[[Any], None]) -> None:
    model, other = lora(), lora()
    convert(model)
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(other, 0.5):
        assert_alike(model, other)
        assert not torch.allclose(logits(model), logits(lora().eval()), atol=1e-3)
    assert_alike(model, other)


@pytest.mark.parametrize("convert", [exact, full_rank])
def test_the_gradients_of_a_mixed_batch(convert: Callable[[Any], None]) -> None:
    model, other = several(), several()
    convert(model)
    for one in (model, other):
        one.eval()  # PEFT takes adapter_names outside training alone
        one.base_model.set_adapter(["default", "second"])
    names = {"adapter_names": ["second", "__base__"]}
    got, expected = gradients(model, **names), gradients(other, **names)
    assert any("second" in name for name in expected)
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_into_a_converted_model(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    several().save_pretrained(tmp_path)
    model, other = lora(), lora()
    full_rank(model)
    for one in (model, other):
        options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        one.load_adapter(tmp_path / "second", "second", **options)
        one.set_adapter("second")
    assert not any(p.is_meta for p in model.parameters())
    assert_alike(model, other)
    ours, pefts = (get_peft_model_state_dict(one, adapter_name="second") for one in (model, other))
    assert list(ours) == list(pefts)


def test_hotswapped(tmp_path: Path) -> None:
    swapped = lora()
    with torch.no_grad():
        for name, p in swapped.named_parameters():
            if "lora_A" in name:
                p.mul_(2.0)
    swapped.save_pretrained(tmp_path)
    model, other = lora(), lora()
    before = logits(model.eval())
    full_rank(model)
    for one in (model, other):
        hotswap_adapter(one, str(tmp_path), "default", torch_device="cpu")
    assert not torch.allclose(logits(model.eval()), before, atol=1e-3)
    assert_alike(model, other)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2, 3]},
        {"exclude_modules": ["k_proj"]},
        {"layers_to_transform": [1]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("convert", [exact, full_rank])
def test_options_of_the_config(convert: Callable[[Any], None], options: dict[str, Any]) -> None:
    model, other = lora(**options), lora(**options)
    convert(model)
    assert_alike(model, other)


def test_a_printed_layer_has_pefts_name() -> None:
    model = lora()
    full_rank(model)
    text = repr(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj"))
    assert text.startswith("lora.Linear[LoGE](")
    for part in ("LoGELinear", "in_features=64", "out_features=96", "lora_A", "default"):
        assert part in text


def test_a_loaded_model_is_converted_like_a_made_one(tmp_path: Path) -> None:
    several().save_pretrained(tmp_path)
    model, other = (PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True) for _ in range(2))
    full_rank(model)
    assert_alike(model, other)
