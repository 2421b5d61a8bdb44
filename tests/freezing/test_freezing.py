"""`freeze` and `apply(freeze_below=)`: gradients above the boundary, nothing below it, and a way back."""

from __future__ import annotations

import copy
import pickle
import statistics
import time
from typing import Any

import pytest
import torch
import transformers as hf
from models import assert_close, gradients, llama, lora, tokens
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from situations import checkpointed
from torch import Tensor, nn

import loge_kernels as loge


def deep(tied: bool = False, **options: Any) -> Any:
    """A PEFT model of four layers."""
    base = llama(tied=tied)
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 4
    torch.manual_seed(7)
    return lora(type(base)(config), **options)


def below(name: str, boundary: int = 2) -> bool:
    return "embed" in name or any(f".layers.{number}." in name for number in range(boundary))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def saved_bytes(model: nn.Module) -> int:
    """Storage that autograd keeps between forward and backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    model.zero_grad()
    return sum(kept.values())


def freeze(model: nn.Module, layers: int, converted: bool) -> None:
    """By `apply`, or alone."""
    if converted:
        loge.apply(model, 0.25, freeze_below=layers)
    else:
        loge.freeze(model, layers)


def test_the_prefix_keeps_no_activations() -> None:
    model = deep()
    outputs: list[Tensor] = []
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    whole = saved_bytes(model)
    assert all(output.requires_grad for output in outputs)
    outputs.clear()
    loge.freeze(model, 2)
    half = saved_bytes(model)
    assert [output.requires_grad for output in outputs] == [False, False, True, True]
    head = 2 * 12 * 50 * 4 * 3  # logits, their softmax, the shifted labels: kept either way
    assert half < 0.55 * whole + head


def test_apply_converts_only_what_trains() -> None:
    model, other = deep(), deep()
    reference = {row.name: row for row in loge.apply(other, 0.25).layers}
    expected = {name: g for name, g in gradients(other).items() if not below(name)}
    report = loge.apply(model, 0.25, freeze_below=2)
    assert_close(gradients(model), expected)
    for row in report.layers:
        if below(row.name):
            assert (row.path, row.dx, row.reason, row.flops_saved) == ("frozen", "-", "frozen prefix", 1.0)
            assert not isinstance(model.get_submodule(row.name).base_layer, loge.LoGELinear)
        else:
            assert row == reference[row.name]
    assert len(report.converted) == 14
    assert "14 frozen" in report.summary()
    assert report.flops_saved > 0.5


@pytest.mark.parametrize("order", ["freeze first", "apply first"])
def test_freeze_and_apply_compose(order: str) -> None:
    model, other = deep(), deep()
    loge.apply(other, 0.25, freeze_below=2)
    for call in (loge.freeze, loge.apply)[:: 1 if order == "freeze first" else -1]:
        call(model, 2 if call is loge.freeze else 0.25)
    assert trained(model) == trained(other)
    assert_close(gradients(model), gradients(other))
    loge.remove(model)
    assert_close(gradients(model), gradients(deep()), 0.0)


@pytest.mark.parametrize("converted", [True, False])
def test_remove_restores_everything(converted: bool) -> None:
    model, other = deep(modules_to_save=["embed_tokens"]), deep(modules_to_save=["embed_tokens"])
    classes = [(name, type(module)) for name, module in model.named_modules()]
    keys, dictionary = set(vars(model.get_base_model().model.layers[0])), model.state_dict()
    freeze(model, 3, converted)
    assert not any("embed" in name for name in trained(model))
    assert list(model.state_dict()) == list(dictionary)
    loge.remove(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == classes
    assert set(vars(model.get_base_model().model.layers[0])) == keys
    assert trained(model) == trained(other)
    assert_close(gradients(model), gradients(other), 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hooks_first", [False, True])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.filterwarnings("error:None of the inputs")
def test_checkpointing_and_inputs_that_require_gradients(reentrant: bool, hooks_first: bool, converted: bool) -> None:
    model, other = deep(), deep()

    if converted:
        loge.apply(other, 0.25)
    expected = {name: g for name, g in gradients(other).items() if not below(name)}
    calls = [lambda: checkpointed(model, reentrant), lambda: freeze(model, 2, converted)]
    for call in calls if hooks_first else reversed(calls):
        call()
    runs = []
    layers = model.get_base_model().model.layers
    layers[1].mlp.register_forward_hook(lambda module, inputs, output: runs.append(output.requires_grad))
    assert_close(gradients(model), expected)
    assert runs == [False]  # once, and never again in backward
    loge.remove(model)
    if not reentrant:
        whole = {name for name in trained(model) if "lora" in name}
        assert set(gradients(model)) >= whole
        assert layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


def test_embeddings_given_as_input_get_no_gradient() -> None:
    model = deep()
    loge.freeze(model, 1)
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=tokens()).loss.backward()
    assert embeddings.grad is None


def test_a_tied_embedding_trains_through_the_head_alone() -> None:
    model, other = llama(tied=True), llama(tied=True)
    for one in (model, other):
        one.requires_grad_(False)
        one.get_input_embeddings().weight.requires_grad_()
    frozen = loge.freeze(model, 1)
    assert frozen.parameters == ()
    hidden = other.model(tokens()).last_hidden_state.detach()
    loss = other.loss_function(other.lm_head(hidden), tokens(), vocab_size=50)
    loss.backward()
    expected = other.get_input_embeddings().weight.grad
    assert_close(gradients(model), {"model.embed_tokens.weight": expected}, 1e-5)


def test_copies_and_pickles_are_frozen_too() -> None:
    model = deep()
    loge.freeze(model, 2)
    expected = gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(gradients(twin), expected, 0.0)
        loge.remove(twin)
        assert_close(gradients(twin), gradients(deep()), 0.0)
    assert_close(gradients(model), expected, 0.0)
    name = type(model.get_base_model().model.layers[0]).__name__
    assert name == "LlamaDecoderLayer"


def test_an_adapter_deleted_since_is_no_obstacle_to_remove() -> None:
    model = deep()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    loge.freeze(model, 2)
    model.set_adapter("second")
    model.delete_adapter("default")
    loge.remove(model)
    assert all(".second." in name for name in gradients(model))


def test_hidden_states_and_compiled_models() -> None:
    model = deep()
    loge.freeze(model, 2)
    expected = gradients(model)
    found = model(tokens(), output_hidden_states=True).hidden_states
    assert len(found) == 5
    torch.compiler.reset()
    assert_close(gradients(torch.compile(model, backend="eager")), {f"_orig_mod.{n}": g for n, g in expected.items()})


def test_a_half_frozen_model_is_calibrated_above_the_boundary() -> None:
    model, other = deep(), deep()
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    report = loge.apply(model, 0.25, calibration=batches, freeze_below=2)
    reference = {row.name: row for row in loge.apply(other, 0.25, calibration=batches).layers}
    assert [row.energy for row in report.converted] == [reference[row.name].energy for row in report.converted]


@pytest.mark.parametrize(
    ("below", "message"),
    [
        (5, "freeze_below=5: this model has 4 layers; give a number from 1 to 4"),
        (0, "freeze_below=0: this model has 4 layers"),
        (True, "freeze_below=True is a bool"),
        (0.5, "freeze_below=0.5 is a float; give a number of layers or a FreezePlan"),
        (loge.FreezePlan("cosine", "marginal", 1, (1.0,) * 7, (0.0,) * 6, 2), "a plan for 6 layers, and this model"),
        (4, "freeze_below=4 of 4 layers leaves no parameter that trains"),
    ],
)
def test_refused_boundaries_change_nothing(below: Any, message: str) -> None:
    model = deep()
    before = trained(model)
    for call in (lambda: loge.freeze(model, below), lambda: loge.apply(model, 0.25, freeze_below=below)):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
        assert trained(model) == before
        assert type(model.get_base_model().model.layers[0]).__mro__[1].__name__ != "NoAutograd"


def test_a_refused_apply_thaws_again() -> None:
    model = deep()
    before = trained(model)
    with pytest.raises(ValueError, match="matches no linear layer"):
        loge.apply(model, 0.25, targets=["nothing"], freeze_below=2)
    assert trained(model) == before
    with pytest.raises(ValueError, match="every linear layer is in the frozen prefix"):
        loge.apply(model, 0.25, targets=r".*layers\.0\..*", freeze_below=2)
    assert trained(model) == before


_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (lambda: hf.EsmForMaskedLM(hf.EsmConfig(**_SIZES, pad_token_id=1, mask_token_id=2)), "emb_layer_norm_after"),
        (
            lambda: hf.Lfm2ForCausalLM(
                hf.Lfm2Config(**_SIZES, num_key_value_heads=2, layer_types=["full_attention"] * 3)
            ),
            "embedding_norm",
        ),
    ],
)
def test_a_norm_after_the_layers_that_is_named_like_an_embedding(make: Any, norm: str) -> None:
    names = ["query", "value", "q_proj", "v_proj"]
    model = get_peft_model(make(), LoraConfig(target_modules=names)).train()
    loge.freeze(model, 2)
    ids = torch.randint(5, 40, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert trained(model) == {name for name, p in model.named_parameters() if p.grad is not None}
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(norm):
            module.register_forward_hook(lambda *_: seen.append(norm))
    loge.plan_freezing(model, [{"input_ids": ids, "labels": ids}])
    assert len(seen) == 1 + 4  # in the forward, and for each latent space


def test_an_embedding_that_is_there_twice() -> None:
    model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert model.word_embeddings is model.get_base_model().model.embed_tokens
    expected = gradients(model)["prompt_encoder.default.embedding.weight"]
    loge.freeze(model, 1)
    found = gradients(model)["prompt_encoder.default.embedding.weight"]
    below, above = found.chunk(2, dim=1)  # keys and values of the two layers
    assert not below.any()
    assert_close({"above": above}, {"above": expected.chunk(2, dim=1)[1]}, 1e-5)
    loge.remove(model)
    assert type(model.word_embeddings) is nn.Embedding


def test_models_that_cannot_be_cut() -> None:
    model = deep()
    loge.freeze(model, 1)
    with pytest.raises(ValueError, match=r"frozen already: call loge_kernels\.remove"):
        loge.freeze(model, 1)
    with pytest.raises(ValueError, match=r"this Linear has no torch\.nn\.ModuleList"):
        loge.freeze(nn.Linear(4, 4), 1)
    with pytest.raises(TypeError, match="model is a int"):
        loge.freeze(3, 1)  # type: ignore[arg-type]
    config = hf.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match=r"two stacks of layers, .*decoder\.block.*encoder\.block"):
        loge.freeze(hf.T5ForConditionalGeneration(config), 1)


@pytest.mark.slow
def test_half_of_the_layers_frozen_is_a_step_1_3_times_as_fast() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
    whole = lora(hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=1000, use_cache=False, **sizes)))
    half = copy.deepcopy(whole)
    loge.freeze(half, 4)
    ids = torch.randint(1000, (2, 128))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-4) for m in (whole, half)]
    seconds: list[list[float]] = [[], []]
    for _ in range(12):  # in turn, by the CPU's clock: other work on the machine falls on both
        for model, optimizer, own in zip((whole, half), optimizers, seconds, strict=True):
            started = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(time.process_time() - started)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    assert statistics.median(ratios[2:]) >= 1.3  # 1.45 on an AMD EPYC


def test_a_tower_that_trains_before_the_layers_is_refused() -> None:
    class WithTower(nn.Module):
        """A vision tower whose output joins the text's, small beside the language model."""

        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList([nn.Linear(4, 4)])
            self.language = deep()

    model = WithTower()
    before = trained(model)
    with pytest.raises(ValueError, match=r"layers in 'tower' train.*requires_grad_\(False\)"):
        loge.freeze(model, 2)
    assert trained(model) == before
    model.tower.requires_grad_(False)
    assert loge.freeze(model, 2).layers == 2
