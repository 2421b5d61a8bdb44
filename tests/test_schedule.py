"""Exact steps in turn, and the bias correction that they feed, in whole training loops."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from models import LINEARS, VOCABULARY, assert_close, llama, lora, tokens
from peft import LoraConfig
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

import loge_kernels as loge
from loge_kernels import LoGELinear, cheap_backward, schedule_of

RANK = 16


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def backward(model: Any, share: float = 1.0) -> None:
    (model(input_ids=tokens(), labels=tokens()).loss * share).backward()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in adapters(model).items() if p.grad is not None}


def gradient(model: Any, cheap: bool = False) -> dict[str, Tensor]:
    """The gradient that a model without schedule would have here: exact, or through factors of `RANK`."""
    twin = copy.deepcopy(model)
    loge.remove(twin)
    if cheap:
        loge.apply(twin, RANK)
    twin.zero_grad()
    backward(twin)
    return snapshot(twin)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(adapters(model).values(), lr=0.05)


def step(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """One training step; the gradient that the optimizer saw."""
    optimizer.zero_grad()
    backward(model)
    seen = snapshot(model)
    optimizer.step()
    return seen


@pytest.mark.parametrize(
    ("every", "exact"),
    [
        (1.5, [0, 2, 3, 5, 6, 8, 9]),
        (2, [0, 2, 4, 6, 8]),
        (4, [0, 4, 8]),
        (1 / 0.9, [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1 / (1 / 3), [0, 3, 6, 9]),
        (1e12, [0]),
    ],
)
def test_which_steps_are_exact(every: float, exact: list[int]) -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=every, correction=None)
    schedule, optimizer = schedule_of(model), optimizer_of(model)
    assert schedule is not None
    turns = []
    for _ in range(10):
        turns.append(schedule.exact)
        optimizer.step()
    assert [number for number, turn in enumerate(turns) if turn] == exact


def test_the_steps_take_the_gradients_they_claim() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=3, correction=None)
    optimizer = optimizer_of(model)
    for number in range(5):
        expected = gradient(model, cheap=number % 3 != 0)
        assert_close(step(model, optimizer), expected)


def through_the_module(model: Any) -> Tensor:
    return model(input_ids=tokens(), labels=tokens()).loss


def through_the_weight(model: Any) -> Tensor:
    """A loss that never calls the head's module, as chunked and fused ones do not."""
    inner = model.get_base_model()
    logits = inner.base_model(input_ids=tokens()).last_hidden_state @ inner.lm_head.weight.T
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4}


def experts() -> Any:
    """Its loss has a part that does not come through the head: the balance of its routers."""
    torch.manual_seed(7)
    config = MixtralConfig(
        **_SIZES,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
        initializer_range=0.15,
    )
    return lora(MixtralForCausalLM(config), target_modules=["q_proj", "v_proj"])


def inside_the_head() -> Any:
    """A low-rank layer above the backbone: BERT's head has one below its output."""
    torch.manual_seed(7)
    config = BertConfig(
        **_SIZES,
        intermediate_size=96,
        num_hidden_layers=1,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return lora(BertLMHeadModel(config), target_modules=["query", "dense"])


def decoder_alone() -> Any:
    """A model that calls the decoder in its backbone and never the backbone."""
    torch.manual_seed(7)
    config = OPTConfig(
        **_SIZES,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        dropout=0.0,
        init_std=0.15,
    )
    return lora(OPTForCausalLM(config), target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("build", "loss"),
    [
        (lora, through_the_module),
        (decoder_alone, through_the_module),
        (lora, through_the_weight),
        (experts, through_the_module),
        (inside_the_head, through_the_module),
    ],
)
def test_a_corrected_cheap_step_of_the_same_batch_is_exact(build: Any, loss: Any) -> None:
    model, exact = build(), build()
    loge.apply(model, RANK, exact_every=2)
    optimizer = torch.optim.SGD(adapters(model).values(), lr=0.0)
    loss(exact).backward()
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        assert_close(snapshot(model), snapshot(exact), 1e-4)
        optimizer.step()


def test_a_trained_weight_of_embedding_and_head_is_left_uncorrected() -> None:
    """Its gradient as a head is no part of what the factors get wrong."""

    def build() -> Any:
        built = llama(tied=True).requires_grad_(False)
        built.get_input_embeddings().weight.requires_grad_(True)
        built.model.norm.weight.requires_grad_(True)
        built.model.layers[0].input_layernorm.weight.requires_grad_(True)
        return built

    model, cheap, exact = build(), build(), build()
    loge.apply(model, RANK, exact_every=2)
    loge.apply(cheap, RANK)
    for each in (cheap, exact):
        backward(each)
    expected = snapshot(exact) | {"model.embed_tokens.weight": snapshot(cheap)["model.embed_tokens.weight"]}
    optimizer = torch.optim.SGD(adapters(model).values(), lr=0.0)
    assert_close(step(model, optimizer), snapshot(exact), 1e-4)
    assert_close(step(model, optimizer), expected, 1e-4)


def test_the_correction_is_the_running_mean_of_exact_minus_cheap() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2, correction=0.25)
    optimizer = optimizer_of(model)
    mean: dict[str, Tensor] = {}
    for number in range(6):
        exact, cheap = gradient(model), gradient(model, cheap=True)
        seen = step(model, optimizer)
        if number % 2 == 0:
            assert_close(seen, exact)
            for name in exact:
                difference = exact[name] - cheap[name]
                mean[name] = difference if number == 0 else 0.25 * mean[name] + 0.75 * difference
        else:
            assert_close(seen, {name: cheap[name] + mean[name] for name in cheap})


def test_dropped_steps_with_correction() -> None:
    model = lora()
    loge.apply(model, subspace="dropped", exact_every=2)
    optimizer = optimizer_of(model)
    exact = gradient(model)
    assert_close(step(model, optimizer), exact)
    schedule = schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    dropped = {name: exact[name] - mean for name, mean in schedule.correction.means.items()}
    # What a layer's adapter is told without the frozen paths above it: less than everything, more than nothing.
    assert any((dropped[name] - exact[name]).norm() > 0.1 * exact[name].norm() for name in exact)
    assert all(dropped[name].norm() > 0 for name in exact)
    last = [name for name in exact if "layers.1.mlp.down_proj" in name]
    assert_close({name: dropped[name] for name in last}, {name: exact[name] for name in last})


def test_accumulation_counts_optimizer_steps() -> None:
    whole, parts = lora(), lora()
    grads = []
    for model, micro in ((whole, 1), (parts, 4)):
        loge.apply(model, RANK, exact_every=2)
        optimizer, seen = optimizer_of(model), []
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(micro):
                backward(model, 1 / micro)
            seen.append(snapshot(model))
            optimizer.step()
        grads.append(seen)
    for one, other in zip(*grads, strict=True):
        assert_close(other, one)


def test_checkpointed_models_are_corrected_too() -> None:
    plain, checkpointed = lora(), lora()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    means = []
    for model in (plain, checkpointed):
        model.train()
        loge.apply(model, RANK, exact_every=2)
        step(model, optimizer_of(model))
        schedule = schedule_of(model)
        assert schedule is not None
        assert schedule.correction is not None
        means.append(schedule.correction.means)
    assert_close(means[1], means[0])


def test_reentrant_checkpoints_hide_the_cheap_pass(caplog: pytest.LogCaptureFixture) -> None:
    model = lora()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    loge.apply(model, RANK, exact_every=2)
    step(model, optimizer_of(model))
    assert "give use_reentrant=False?" in caplog.text


def test_a_model_without_an_output_head() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.low, self.high = nn.Linear(64, 64), nn.Linear(64, 64)
            self.high.requires_grad_(False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.high(torch.tanh(self.low(x)))}

    model = Stack()
    loge.apply(model, subspace="dropped", exact_every=2)
    optimizer = torch.optim.SGD(model.low.parameters(), lr=0.1)
    x = torch.randn(5, 64)
    for number in range(3):
        low = model.low.weight.detach().clone().requires_grad_()
        y = model.high(torch.tanh(nn.functional.linear(x, low, model.low.bias.detach())))
        (expected,) = torch.autograd.grad(y.square().sum(), low)
        optimizer.zero_grad()
        model(x)["y"].square().sum().backward()
        assert model.low.weight.grad is not None
        if number == 0:
            torch.testing.assert_close(model.low.weight.grad, expected)
            first = expected
        elif number == 1:  # nothing comes through the dropped layer: the mean is all there is
            torch.testing.assert_close(model.low.weight.grad, first)
        optimizer.step()


def test_another_optimizer_is_not_counted() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    other = nn.Linear(2, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    schedule = schedule_of(model)
    assert schedule is not None
    assert schedule.step == 0
    schedule.advance()
    assert schedule.step == 1
    assert not schedule.exact


def test_saved_and_resumed_is_as_if_never_interrupted() -> None:
    straight, resumed = lora(), lora()
    for model in (straight, resumed):
        loge.apply(model, RANK, exact_every=2)
    optimizer = optimizer_of(straight)
    for _ in range(3):
        step(straight, optimizer)
    schedule, again = schedule_of(straight), schedule_of(resumed)
    assert schedule is not None
    assert again is not None
    kept = io.BytesIO()
    torch.save((straight.state_dict(), schedule.state_dict()), kept)
    kept.seek(0)
    weights, state = torch.load(kept)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    other = optimizer_of(resumed)
    for _ in range(3):
        assert_close(step(resumed, other), step(straight, optimizer))


def test_a_foreign_state_is_refused_whole() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    schedule = schedule_of(model)
    assert schedule is not None
    step(model, optimizer_of(model))
    before = schedule.state_dict()
    name = next(iter(before))
    for state, message in (
        ({}, "no 'step'"),
        ({"step": torch.tensor(9), "correction.nobody": torch.zeros(2)}, "nobody .*no such trained parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule.load_state_dict(state)
        assert_close(schedule.state_dict(), before)
    loge.remove(model)
    loge.apply(model, RANK, exact_every=2, correction=None)
    uncorrected = schedule_of(model)
    assert uncorrected is not None
    with pytest.raises(ValueError, match="without one"):
        uncorrected.load_state_dict(before)
    loge.remove(model)
    loge.apply(model, RANK, calibration=[{"input_ids": tokens(), "labels": tokens()}], exact_every=2)
    with pytest.raises(ValueError, match=r"state has nothing of layer"):
        schedule_of(model).load_state_dict(before)  # type: ignore[union-attr]
    followed = schedule_of(model).state_dict()  # type: ignore[union-attr]
    loge.remove(model)
    loge.apply(model, RANK, exact_every=2)
    with pytest.raises(ValueError, match=r"subspaces that follow the gradient.*without them"):
        schedule_of(model).load_state_dict(followed)  # type: ignore[union-attr]
    assert name == "step"


def test_remove_takes_everything_back() -> None:
    model = lora()
    exact = gradient(model)
    loge.apply(model, RANK, exact_every=2, exact_dtype="int8")
    optimizer = optimizer_of(model)
    step(model, optimizer)
    loge.remove(model)
    assert schedule_of(model) is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(not p._backward_hooks for p in adapters(model).values())
    assert set(step(model, optimizer)) == set(exact)
    fresh = gradient(model)
    optimizer.zero_grad()
    backward(model)
    assert_close(snapshot(model), fresh)


def test_copies_and_pickles_have_no_schedule() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    step(model, optimizer_of(model))
    schedule = schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    before = schedule.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert schedule_of(twin) is None
        backward(twin)
        optimizer_of(twin).step()
    assert schedule.step == 1
    assert_close(schedule.state_dict(), before)


def test_copies_made_before_an_exact_step_are_cheap() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2, exact_fraction=0.25)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = [module for module in twin.modules() if isinstance(module, LoGELinear)]
        assert {layer.exact_fraction for layer in layers} == {0.25}
        loge.remove(twin)
    assert {module.exact_fraction for module in model.modules() if isinstance(module, LoGELinear)} == {1.0}


def test_nothing_outlives_the_model() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    step(model, optimizer_of(model))
    layer = weakref.ref(next(module for module in model.modules() if isinstance(module, LoGELinear)))
    schedule = weakref.ref(schedule_of(model))
    del model
    gc.collect()
    assert layer() is None
    assert schedule() is None


def test_adapters_that_come_later_are_corrected() -> None:
    model = llama().requires_grad_(False)
    loge.apply(model, RANK, targets=LINEARS, exact_every=2)
    model.add_adapter(LoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False))
    optimizer = optimizer_of(model)
    exact = step(model, optimizer)
    schedule = schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    assert set(schedule.correction.means) == set(exact)


def test_an_overflow_teaches_nothing() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=1.5)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    step(model, optimizer)
    schedule = schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    assert schedule.exact
    before = schedule.state_dict()
    backward(model, float("inf"))
    schedule.advance()
    after = schedule.state_dict()
    assert_close({n: t for n, t in after.items() if n != "step"}, {n: t for n, t in before.items() if n != "step"})


def test_a_loss_scale_is_taken_out_and_put_back() -> None:
    class Scaler:
        def scale(self, outputs: Tensor) -> Tensor:
            return outputs * 1024.0

    plain, scaled = lora(), lora()
    for model in (plain, scaled):
        loge.apply(model, RANK, exact_every=2)
    schedule = schedule_of(scaled)
    assert schedule is not None
    assert schedule.correction is not None
    schedule.correction.scaler = Scaler()
    one, other = optimizer_of(plain), optimizer_of(scaled)
    for _ in range(2):
        expected = step(plain, one)
        other.zero_grad()
        backward(scaled, 1024.0)
        for p in adapters(scaled).values():
            assert p.grad is not None
            p.grad /= 1024.0
        assert_close(snapshot(scaled), expected)
        other.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(to_none: bool) -> None:
    plain, scaled = lora(), lora()
    for model in (plain, scaled):
        loge.apply(model, RANK, exact_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    schedule = schedule_of(scaled)
    assert schedule is not None
    assert schedule.correction is not None
    schedule.correction.scaler = scaler
    one, other = optimizer_of(plain), optimizer_of(scaled)
    for number in range(2):  # an exact step and a cheap one
        expected = step(plain, one)
        for skipped in (True, False):
            other.zero_grad(to_none)
            for _ in range(2):
                scaler.scale(scaled(input_ids=tokens(), labels=tokens()).loss / 2).backward()
            if skipped:
                next(iter(adapters(scaled).values())).grad.fill_(torch.inf)  # type: ignore[union-attr]
            else:
                scaler.unscale_(other)
                assert_close(snapshot(scaled), expected)
            scaler.step(other)
            scaler.update()
            assert schedule.step == number + (not skipped)


def test_a_converted_head_is_corrected_from_the_loss_down() -> None:
    model = lora()
    targets = [*LINEARS, "lm_head"]
    exact = gradient(model)
    loge.apply(model, subspace="dropped", exact_every=2, targets=targets)
    optimizer = torch.optim.SGD(adapters(model).values(), lr=0.0)
    assert_close(step(model, optimizer), exact)
    # Nothing comes through the dropped head: the mean is the whole gradient, and stays it.
    assert_close(step(model, optimizer), exact)


def test_no_hook_is_left_where_every_layer_is_exact() -> None:
    model = lora()
    loge.apply(model, 1.0, exact_every=4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_with_nothing_to_train_but_its_input() -> None:
    model = llama().requires_grad_(False)
    loge.apply(model, RANK, exact_every=2)
    x = model.get_input_embeddings()(tokens()).requires_grad_()
    model(inputs_embeds=x, labels=tokens()).loss.backward()
    assert x.grad is not None


def test_a_compiled_model_is_corrected() -> None:
    torch._dynamo.reset()  # a graph of another test's model has no hooks, and would be taken for this one's
    plain, other = lora(), lora()
    for model in (plain, other):
        loge.apply(model, RANK, exact_every=2)
    compiled = torch.compile(other, backend="aot_eager")
    one, two = optimizer_of(plain), optimizer_of(other)
    for _ in range(4):
        expected = step(plain, one)
        two.zero_grad()
        backward(compiled)
        assert_close(snapshot(other), expected)
        two.step()


def test_a_correction_that_sees_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    optimizer_of(model).step()
    assert "saw no gradient in an exact step" in caplog.text


def test_evaluation_between_steps_changes_nothing() -> None:
    model, other = lora(), lora()
    optimizers = []
    for each in (model, other):
        loge.apply(each, RANK, exact_every=2)
        optimizers.append(optimizer_of(each))
    for _ in range(3):
        with torch.no_grad():
            model(input_ids=tokens())
        with cheap_backward():
            pass
        assert_close(step(model, optimizers[0]), step(other, optimizers[1]))


class _Sub(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_without_the_first_parameter_is_followed() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    schedule, trained = schedule_of(model), list(adapters(model).values())
    assert schedule is not None
    torch.optim.SGD([torch.zeros(2, requires_grad=True)]).step()
    assert schedule.step == 0
    partial = torch.optim.SGD(trained[3:], lr=0.05)
    for number in range(3):
        step(model, partial)
        assert schedule.step == number + 1


def test_two_optimizers_of_one_model_count_once() -> None:
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    schedule, trained = schedule_of(model), list(adapters(model).values())
    assert schedule is not None
    first, second = (torch.optim.SGD(part, lr=0.05) for part in (trained[5:], trained[:5]))
    for number in range(3):
        step(model, first)
        second.step()
        assert schedule.step == number + 1
    counts = []
    for _ in range(3):  # the first one is left behind
        step(model, second)
        counts.append(schedule.step)
    assert counts == [4, 5, 6]
    trained[0].requires_grad_(False)
    step(model, first)
    assert schedule.step == 7


def test_a_subclass_that_calls_its_base_is_counted_once() -> None:
    """Once both classes have had an instance, torch runs the hooks after the base's step and after the subclass's."""
    model = lora()
    loge.apply(model, RANK, exact_every=2)
    schedule, plain, sub = schedule_of(model), optimizer_of(model), _Sub(adapters(model).values(), lr=0.05)
    assert schedule is not None
    for number, optimizer in enumerate((sub, plain, sub, sub), 1):
        step(model, optimizer)
        assert schedule.step == number


def test_a_cheap_pass_of_the_users_leaves_an_exact_step_alone() -> None:
    model, other = lora(), lora()
    seen = []
    for one, measured in ((model, True), (other, False)):
        loge.apply(one, RANK, exact_every=2)
        optimizer = optimizer_of(one)
        if measured:
            with cheap_backward():
                measured_gradient = torch.autograd.grad(
                    one(input_ids=tokens(), labels=tokens()).loss, list(adapters(one).values())
                )
        seen.append([step(one, optimizer) for _ in range(2)])
    for ours, theirs in zip(*seen, strict=True):
        assert_close(ours, theirs, 1e-6)
    assert_close(dict(zip(adapters(model), measured_gradient, strict=True)), gradient(lora(), cheap=True))
