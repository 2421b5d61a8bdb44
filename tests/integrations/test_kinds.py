"""Forwards before their backwards, some exact and some low-rank: each backward has the kind of its own forward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_close, assert_differ, tokens
from situations import (
    ONE_IN_TWO,
    REENTRANT,
    applied,
    assert_same_weights,
    batch,
    checkpointed,
    derived,
    gradients_of,
    loss_of,
    pair,
    step_in_backward,
    three,
    train,
    trained,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Found = dict[str, Tensor]


def added(*found: Found) -> Found:
    return {name: torch.stack([one[name] for one in found]).sum(0) for name in found[0]}


def check_kinds(models: tuple[Any, ...], kinds: str, first: int = 0) -> None:
    """The coming forwards have these kinds, "e" for exact and "l" for low-rank."""
    plain, low, model = models
    for seed, kind in enumerate(kinds, start=first):
        expected = {"e": derived(plain, seed), "l": derived(low, seed)}
        assert_differ(expected["e"], expected["l"])
        assert_close(derived(model, seed), expected[kind])


@REENTRANT
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["in order", "backwards"])
def test_three_forwards_before_their_backwards(order: tuple[int, ...], reentrant: bool | None) -> None:
    plain, low, model = (checkpointed(one, reentrant) for one in three())
    losses = [loss_of(model, seed) for seed in range(3)]
    for seed in order:
        losses[seed].backward()
        assert_close(gradients_of(model), derived(low if seed == 1 else plain, seed))
        model.zero_grad()
    check_kinds((plain, low, model), "lel", 3)


@REENTRANT
def test_one_backward_of_several_forwards(reentrant: bool | None) -> None:
    plain, low, model = (checkpointed(one, reentrant) for one in three())
    torch.stack([loss_of(model, seed) for seed in range(3)]).sum().backward()
    assert_close(gradients_of(model), added(derived(plain, 0), derived(low, 1), derived(plain, 2)))


def test_a_graph_keeps_its_kind() -> None:
    """Differentiated twice, in part, and after later forwards."""
    plain, low, model = three()
    some = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight"
    first, second = loss_of(model, 0), loss_of(model, 1)
    for loss, kind, seed in ((second, low, 1), (first, plain, 0)):
        expected = derived(kind, seed)
        (part,) = torch.autograd.grad(loss, [model.get_parameter(some)], retain_graph=True)
        assert_close({some: part}, {some: expected[some]})
        for _ in range(2):
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert_close(gradients_of(model), expected)
    model.zero_grad()
    check_kinds((plain, low, model), "el", 2)


# What counts as a training forward


def evaluated(model: Any) -> None:
    torch.autograd.grad(loss_of(model.eval(), 5), list(trained(model).values()))
    model.train()


def generated(model: Any) -> None:
    model.eval()
    model.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()


def without_gradients(model: Any) -> None:
    """As a reference's log-probabilities are taken."""
    with torch.no_grad(), model.disable_adapter():
        loss_of(model, 5)
    with torch.inference_mode():
        loss_of(model, 5)


@pytest.mark.parametrize("between", [evaluated, generated, without_gradients])
@pytest.mark.parametrize("reentrant", [None, True], ids=["plain", "reentrant"])
def test_forwards_that_do_not_train_do_not_count(between: Callable[[Any], None], reentrant: bool | None) -> None:
    plain, low, model = (checkpointed(one, reentrant) for one in three())
    for step, kind in enumerate("ele"):
        between(model)
        loss = loss_of(model, step)
        between(model)
        loss.backward()
        assert_close(gradients_of(model), derived(plain if kind == "e" else low, step))
        model.zero_grad()


def test_a_forward_counts_whether_or_not_its_backward_runs() -> None:
    plain, low, model = three()
    loss_of(model, 7)
    check_kinds((plain, low, model), "le")


class Wrapped(nn.Module):
    """As a data-parallel wrapper or a reward model holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.module(**inputs)


@pytest.mark.parametrize("way", [Wrapped, lambda model: model.get_base_model()], ids=["wrapped", "inner"])
def test_forwards_through_another_module(way: Callable[[Any], Any]) -> None:
    plain, low, model = three()
    called = way(model)
    for step, kind in enumerate("elel"):
        loss_of(called, step).backward()
        assert_close(gradients_of(model), derived(plain if kind == "e" else low, step))
        model.zero_grad()


@pytest.mark.parametrize(("reentrant", "kinds"), [(False, "elel"), (True, "eeee")], ids=["non-reentrant", "reentrant"])
def test_the_whole_model_in_one_checkpoint(reentrant: bool, kinds: str) -> None:
    """Its forward runs again in the backward, where it is no forward of its own. The first run of a reentrant one is
    without gradients and does not count: nothing does, and the model stays at its first forward."""
    plain, low, model = three()

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, labels=labels).loss

    for step, kind in enumerate(kinds):
        ids = batch(step)["input_ids"]
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        checkpoint(loss, embeddings, ids, use_reentrant=reentrant).backward()
        assert_close(gradients_of(model), derived(plain if kind == "e" else low, step))
        model.zero_grad()


# Loops and threads


def test_an_optimizer_in_backward() -> None:
    plain, model = pair(policy=ONE_IN_TWO)
    other = applied(copy.deepcopy(plain), ONE_IN_TWO)
    step_in_backward(model, torch.optim.SGD, lr=0.3)
    train(other, lr=0.3)
    assert_same_weights(other, model)


def in_threads(*functions: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("policy", [None, ONE_IN_TWO], ids=["exact", "exact_every"])
@REENTRANT
def test_two_models_in_two_threads(policy: dict[str, Any] | None, reentrant: bool | None) -> None:
    """Each is in its forward while the other is in its backward, and they are not at the same count: the second has
    a forward behind it that the first has not."""
    plain = pair()[0]
    made = [copy.deepcopy(plain) for _ in range(4)]
    for model in made if policy is not None else made[:2]:  # the exact ones against PEFT's own
        applied(model, policy)
    for model in made:
        checkpointed(model, reentrant)
    for model in made[1::2]:
        loss_of(model, 7)
    meet = threading.Barrier(2, timeout=20)

    def loop(model: nn.Module, wait: Callable[[], Any]) -> None:
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        for step in range(4):
            loss = loss_of(model, step)
            wait()
            loss.backward()
            wait()
            optimizer.step()
            optimizer.zero_grad()

    def late() -> None:
        meet.wait()
        loop(made[1], meet.wait)

    def early() -> None:
        loop(made[0], meet.wait)
        meet.wait()

    in_threads(early, late)
    for model in made[2:]:
        loop(model, lambda: None)
    for model, other in zip(made[:2], made[2:], strict=True):
        assert_same_weights(other, model)
