"""Loops that are more than forward, backward, step: the applied model ends where PEFT's own does in the same loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_close, assert_differ
from peft import LoraConfig, get_peft_model
from situations import (
    ONE_IN_TWO,
    REENTRANT,
    applied,
    assert_same_gradients,
    assert_same_weights,
    batch,
    checkpointed,
    derived,
    gradients_of,
    loss_of,
    pair,
    step_in_backward,
    train,
    trained,
)
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

Loop = Callable[[Any], None]


def assert_same_loop(loop: Loop, models: tuple[Any, Any], rtol: float = 3e-5) -> None:
    """Both models end with the same weights, which the loop has moved far, and with the same gradients there."""
    plain, model = models
    start = {name: p.detach().clone() for name, p in trained(plain).items()}
    for one in models:
        torch.manual_seed(5)
        loop(one)
    assert_differ({name: p.detach() for name, p in trained(plain).items()}, start)
    assert_same_weights(plain, model, rtol)
    assert_close(derived(model, 9), derived(plain, 9), rtol)


# AdamW divides by the root of the square: where a gradient is all rounding, a large eps keeps it small.
@REENTRANT
@pytest.mark.parametrize(
    "options", [{"kind": torch.optim.SGD, "lr": 0.3}, {"kind": torch.optim.AdamW, "lr": 0.03, "eps": 1e-2}]
)
def test_an_optimizer_for_each_parameter_in_backward(options: dict[str, Any], reentrant: bool | None) -> None:
    assert_same_loop(lambda model: step_in_backward(model, **options), pair(reentrant=reentrant))


# Two backwards before one step


def sharpness_aware(model: Any) -> None:
    """SAM: the gradient at the worst point nearby."""
    parameters = list(trained(model).values())
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for seed in range(3):
        loss_of(model, seed).backward()
        with torch.no_grad():
            grads = [p.grad.clone() for p in parameters if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            kept = [p.clone() for p in parameters]
            for p, g in zip(parameters, grads, strict=True):
                p.add_(g, alpha=0.2 / norm.item())
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
        optimizer.step()
        optimizer.zero_grad()


def adversarial_embeddings(model: Any) -> None:
    """FGM: a second backward on perturbed embeddings, added to the first."""
    table = model.get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.3)
    for seed in range(3):
        loss_of(model, seed).backward()
        kept = table.detach().clone()
        table.data.add_(table.grad / table.grad.norm())
        loss_of(model, seed).backward()
        table.data = kept
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("loop", [sharpness_aware, adversarial_embeddings])
def test_backwards_before_one_step(loop: Loop) -> None:
    assert_same_loop(loop, pair())


# A part of the gradients


@REENTRANT
def test_some_gradients_first_and_then_all(reentrant: bool | None) -> None:
    models = pair(reentrant=reentrant)
    found = []
    for one in models:
        loss = loss_of(one)
        some = {name: p for name, p in trained(one).items() if "layers.1.mlp" in name}
        if reentrant is not True:  # torch refuses autograd.grad over reentrant checkpoints
            grads = torch.autograd.grad(loss, list(some.values()), retain_graph=True)
            found.append(dict(zip(some, (g.clone() for g in grads), strict=True)))
        loss.backward()
    if found:
        assert_close(found[1], found[0], 1e-5)
    assert_same_gradients(*models)


@pytest.mark.parametrize("part", ["layers.0", "layers.1.self_attn", "q_proj.lora_A", "lora_B"])
def test_a_backward_to_these_inputs_alone(part: str) -> None:
    models = pair()
    for one in models:
        loss_of(one).backward(inputs=[p for name, p in trained(one).items() if part in name])
        assert gradients_of(one)
        assert all(part in name for name in gradients_of(one))
    assert_same_gradients(*models)


def test_adapters_that_train_in_part() -> None:
    """LoRA-FA: A stays as it starts; and layers whose adapters stay as they are."""
    models = pair()
    for one in models:
        for name, p in trained(one).items():
            p.requires_grad_("lora_B" in name and "layers.0" not in name)
    assert_same_loop(lambda model: train(model, lr=0.3), models)


# An exception in the backward


class Stopped(Exception):
    pass


@REENTRANT
@pytest.mark.parametrize("exact_every", [None, 2])
def test_training_goes_on_after_an_exception_in_backward(reentrant: bool | None, exact_every: int | None) -> None:
    plain, model = pair()
    if exact_every is not None:  # against a copy whose backward was not disturbed
        plain, model = (applied(copy.deepcopy(plain), ONE_IN_TWO) for _ in range(2))
    for one in (plain, model):
        checkpointed(one, reentrant)
        middle = one.get_submodule("base_model.model.model.layers.1")

        def stop(grad: Tensor) -> None:
            raise Stopped

        handle = middle.register_forward_pre_hook(lambda module, args: args[0].register_hook(stop) and None)
        raises = exact_every is None or one is model
        if raises:
            with pytest.raises(Stopped):
                loss_of(one, 7).backward()
        else:
            loss_of(one, 7)
        handle.remove()
        one.zero_grad()
        train(one, lr=0.3)
    assert_same_weights(plain, model)


# Losses on hidden states


def distilled(model: Any, seed: int = 0) -> Tensor:
    """Features of two layers, taken by hooks, drawn to fixed ones."""
    taken: list[Tensor] = []
    names = ("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj", "layers.0")
    handles = [
        model.get_submodule(f"base_model.model.model.{name}").register_forward_hook(
            lambda module, args, output: taken.append(output if isinstance(output, Tensor) else output[0])
        )
        for name in names
    ]
    loss = loss_of(model, seed)
    for handle in handles:
        handle.remove()
    assert len(taken) == len(names)
    generator = torch.Generator().manual_seed(seed)
    return loss + sum((t - torch.randn(t.shape, generator=generator)).square().mean() for t in taken)


def on_hidden_states(model: Any, seed: int = 0) -> Tensor:
    states = model(**batch(seed), output_hidden_states=True).hidden_states
    return states[1].square().mean() + (states[2] - states[1]).abs().mean() + states[-1].sin().mean()


@pytest.mark.parametrize("loss", [distilled, on_hidden_states])
def test_losses_on_hidden_states(loss: Callable[..., Tensor]) -> None:
    assert_same_loop(lambda model: train(model, loss=loss), pair())


# Compiled autograd


def test_compiled_autograd() -> None:
    """On a small model: a graph of a whole LLaMA is traced for a minute."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    plain: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    model = applied(copy.deepcopy(plain))
    x = torch.randn(6, 32)
    plain(x).square().mean().backward()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        model(x).square().mean().backward()
    assert_same_gradients(plain, model)
