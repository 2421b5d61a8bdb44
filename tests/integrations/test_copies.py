"""Copies of an applied model, and what changes it in the middle of a training: it goes on as PEFT's own does."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing
from models import LINEARS, assert_close, assert_differ, llama, randomised
from peft import LoraConfig
from situations import (
    EXACT,
    LOW,
    ONE_IN_TWO,
    applied,
    assert_same_gradients,
    assert_same_weights,
    batch,
    derived,
    gradients_of,
    loss_of,
    pair,
    three,
    train,
    trained,
)
from torch import Tensor
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import loge_kernels as loge


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sent(model: Any) -> Any:
    """As to a process that `torch.multiprocessing` starts: the tensors are shared."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        return pickle.loads(bytes(ForkingPickler.dumps(model)))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, saved, pickled, sent], ids=lambda way: way.__name__)


@pytest.mark.parametrize("way", [copy.deepcopy, saved, pickled], ids=lambda way: way.__name__)
def test_a_copy_trains_as_the_model(way: Callable[[Any], Any]) -> None:
    plain, model = pair()
    train(model, range(2))
    train(plain, range(2))
    train(way(model), range(2, 4))  # a copy that is dropped: it takes nothing of the model along
    other = way(model)
    for one in (plain, model, other):
        train(one, range(2, 4))
    assert_same_weights(plain, model)
    assert_same_weights(plain, other)


def test_what_another_process_trains_is_shared() -> None:
    plain, model = pair()
    other = sent(model)
    train(plain, range(3))
    train(other, range(3))
    assert_same_weights(plain, model)
    assert_close(derived(model, 5), derived(plain, 5))


@WAYS
@pytest.mark.parametrize(
    "policy",
    [LOW, {**LOW, "exact_layers": 0.5}, {**LOW, "exact_fraction": 0.5}, {"exact_dtype": "int8"}],
    ids=["low rank", "exact above", "exact rows", "8 bits"],
)
def test_a_copy_has_the_gradients_of_the_model(way: Callable[[Any], Any], policy: dict[str, Any]) -> None:
    plain, model = pair(policy=policy)
    expected = derived(model)
    assert_differ(derived(plain), expected)
    other = way(model)
    assert_close(derived(other), expected, 1e-6)
    assert_close(derived(way(other)), expected, 1e-6)
    assert_close(derived(model), expected, 1e-6)


@WAYS
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_copy_begins_with_an_exact_forward(way: Callable[[Any], Any], before: int) -> None:
    """And counts for itself: neither disturbs the other."""
    plain, low, model = three()
    for seed in range(before):
        derived(model, seed)
    other = way(model)
    for step in range(3):
        for one, count in ((model, before + step), (other, step)):
            assert_close(derived(one, step), derived(low if count % 2 else plain, step))


def test_a_copy_between_forward_and_backward() -> None:
    for policy in (EXACT, LOW, ONE_IN_TWO):
        plain, model = pair(policy=policy)
        expected = derived(applied(plain, policy))
        loss = loss_of(model)
        other = copy.deepcopy(model)
        derived(other)
        loss.backward()
        assert_close(gradients_of(model), expected, 1e-6)


def test_a_copy_of_the_model_without_its_peft_wrapper() -> None:
    plain, low, model = three()
    derived(model)
    inner = copy.deepcopy(model.get_base_model())
    outer = (copy.deepcopy(one.get_base_model()) for one in (plain, low))
    expected = [derived(one) for one in outer]
    assert_close(derived(inner), expected[0])
    assert_close(derived(inner), expected[1])


def rescale(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "base_layer" in name:
                p.mul_(torch.linspace(0.5, 1.5, p.shape[-1]))


@pytest.mark.parametrize("way", [copy.deepcopy, saved], ids=["deep", "saved"])
@pytest.mark.parametrize("policy", [EXACT, LOW], ids=["exact", "low"])
def test_a_copy_follows_its_own_weights(way: Callable[[Any], Any], policy: dict[str, Any]) -> None:
    plain, model = pair(policy=policy)
    before = derived(model)
    other = way(model)
    rescale(other)
    rescale(plain)
    assert_close(derived(other), derived(applied(copy.deepcopy(plain), policy)))
    assert_close(derived(model), before, 1e-6)
    loge.remove(other)
    assert_close(derived(other), derived(plain))
    assert_close(derived(model), before, 1e-6)


def test_a_copy_stays_applied_when_the_model_is_not() -> None:
    plain, low, model = three()
    other = copy.deepcopy(model)
    loge.remove(model)
    assert_close(derived(other, 0), derived(plain, 0))
    assert_close(derived(other, 1), derived(low, 1))
    for seed in range(2):
        assert_close(derived(model, seed), derived(plain, seed))


def test_an_average_of_the_weights() -> None:
    """It deep-copies the model, and goes over the parameters of both in step."""
    models = pair()
    averages = [AveragedModel(one) for one in models]
    for one, average in zip(models, averages, strict=True):
        for step in range(3):
            train(one, [step])
            average.update_parameters(one)
    assert_same_weights(*averages)
    assert_close(derived(averages[1]), derived(averages[0]))


@pytest.mark.parametrize("policy", [EXACT, LOW], ids=["exact", "low"])
def test_with_other_parameters_in_their_place(policy: dict[str, Any]) -> None:
    plain, model = pair(policy=policy)
    if policy is LOW:
        plain = applied(plain, policy)
    found = []
    for one in (plain, model):
        others = {name: (1.5 * p).detach().requires_grad_() for name, p in trained(one).items()}
        functional_call(one, others, (), batch()).loss.backward()
        assert all(p.grad is None for p in one.parameters())
        found.append({name: p.grad for name, p in others.items()})
    assert_close(found[1], found[0])


# Changed in the middle of a training


@pytest.mark.parametrize(
    ("alone", "options"),
    [(False, {}), (False, {"lora_dropout": 0.0, "use_rslora": True}), (True, {"target_modules": LINEARS})],
    ids=["plain", "rslora", "the only one"],
)
def test_an_adapter_anew_under_the_same_name(alone: bool, options: dict[str, Any]) -> None:
    models = pair()
    for one in models:
        train(one, range(2))
        if not alone:
            one.add_adapter("spare", LoraConfig(r=2, target_modules=LINEARS))
            one.set_adapter("spare")
        one.delete_adapter("default")
        if not alone:
            train(one, range(2, 4))
        torch.manual_seed(4)
        config = {"r": 7, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], **options}
        one.add_adapter("default", LoraConfig(**config))
        randomised(one)
        one.set_adapter("default")
        assert {p.shape[0] for name, p in trained(one).items() if "lora_A" in name} == {7}
        train(one, range(4, 6))
    assert_same_weights(*models)


def true_gradients(model: Any, plain: Any) -> dict[str, Tensor]:
    """PEFT's in float64, of `model`'s weights."""
    other = copy.deepcopy(plain)
    other.load_state_dict(model.state_dict())
    return derived(other.double())


@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
def test_bfloat16_from_now_on(reentrant: bool | None) -> None:
    models = plain, _ = pair(reentrant=reentrant)
    errors = []
    for one in models:
        train(one, range(2))
        one.to(torch.bfloat16)
        train(one, [2])
        truth, got = true_gradients(one, plain), derived(one)
        assert set(got) == set(truth)
        errors.append({name: (got[name].double() - t).norm() / t.norm() for name, t in truth.items()})
    worst = max(errors[0].values())
    assert 0 < worst < 0.1
    # Of a tensor on its own the rounding is luck, of a few hundred numbers: the tensors' worst is the measure.
    assert max(errors[1].values()) <= 2 * worst
    assert sum(errors[1].values()) <= 2 * sum(errors[0].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_with_factors(dtype: torch.dtype) -> None:
    plain, model = pair(policy=LOW)
    derived(model)
    for one in (plain, model):
        one.to(dtype)
    fresh, got = derived(applied(plain, LOW)), derived(model)
    assert all(g.dtype == dtype for g in got.values())
    assert_close(got, fresh, 5e-2 if dtype == torch.bfloat16 else 1e-4)


def test_trained_tokens_of_a_tied_embedding() -> None:
    """The head's weight is the embedding's, and both see the tokens that train."""
    models = pair(llama(tied=True), trainable_token_indices=[1, 2, 3, 30])
    for one in models:
        assert any("token_adapter" in name for name in trained(one))
        loss_of(one).backward()
    assert_same_gradients(*models)
    for one in models:
        one.zero_grad()
        train(one, range(3))
    assert_same_weights(*models)


@pytest.mark.parametrize("way", [copy.deepcopy, saved], ids=["deep", "saved"])
def test_a_copy_with_trained_tokens(way: Callable[[Any], Any]) -> None:
    plain, model = pair(llama(tied=True), trainable_token_indices=[1, 2, 3])
    train(plain, range(2))
    train(model, range(2))
    assert_close(derived(way(model), 5), derived(way(plain), 5))
