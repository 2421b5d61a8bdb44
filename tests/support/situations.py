"""Pairs of models for what users do in training: PEFT's own, and the same one applied with the exact backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import VOCABULARY, assert_close, lora
from torch import Tensor, nn

import loge_kernels as loge

EXACT: dict[str, Any] = {"exact_dtype": None}
LOW: dict[str, Any] = {"rank": 16, "subspace": "svd", "exact_dtype": None}
ONE_IN_TWO = {**LOW, "exact_every": 2}
REENTRANT = pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])


def pair(
    base: nn.Module | None = None, policy: dict[str, Any] | None = None, reentrant: bool | None = None, **options: Any
) -> tuple[Any, Any]:
    """(PEFT's model, a deep copy of it after `loge.apply` with `policy`), in training mode, every lora_B other than
    zero. `base`: what PEFT wraps, or None for a tiny LLaMA; `reentrant`: how both are checkpointed, as `checkpointed`
    has it; `options` are those of `LoraConfig`."""
    plain = lora(base, **options).train()
    model = applied(copy.deepcopy(plain), policy)
    return checkpointed(plain, reentrant), checkpointed(model, reentrant)


def applied(model: Any, policy: dict[str, Any] | None = None) -> Any:
    """`model` itself, applied: exactly, or as `policy` says."""
    loge.apply(model, **(EXACT if policy is None else policy))
    return model


def three() -> tuple[Any, Any, Any]:
    """PEFT's model; the same of low rank; the same of low rank, one training forward in two exact."""
    plain, low = pair(policy=LOW)
    return plain, low, applied(copy.deepcopy(plain), ONE_IN_TWO)


def batch(seed: int = 0, rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(100 + seed))
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, seed: int = 0) -> Tensor:
    return model(**batch(seed)).loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """What `.grad` holds now, copied."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def derived(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """The gradients of one forward and backward alone; `.grad` is empty afterwards."""
    model.zero_grad()
    loss_of(model, seed).backward()
    found = gradients_of(model)
    model.zero_grad()
    return found


def train(
    model: Any,
    steps: Iterable[int] = range(3),
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 0.1,
    loss: Callable[[Any, int], Tensor] = loss_of,
) -> None:
    """A batch a step, by plain SGD where no optimizer is given."""
    optimizer = optimizer or torch.optim.SGD(trained(model).values(), lr=lr)
    for step in steps:
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=1e-2, eps=1e-3)


def step_in_backward(model: Any, kind: Callable[..., torch.optim.Optimizer], **options: float) -> None:
    """Three batches; each parameter steps as soon as its gradient is there, and keeps none."""
    handles = []
    for p in trained(model).values():
        own = kind([p], **options)

        def step(p: Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            own.zero_grad()

        handles.append(p.register_post_accumulate_grad_hook(step))
    for seed in range(3):
        loss_of(model, seed).backward()
        assert not gradients_of(model)
    for handle in handles:
        handle.remove()


def checkpointed(model: Any, reentrant: bool | None) -> Any:
    """Activation checkpointing of either kind on the model's blocks; None for none."""
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def assert_same_gradients(plain: nn.Module, applied: nn.Module, rtol: float = 1e-5) -> None:
    """`.grad` on the same parameters, each within `rtol` of the largest value of the plain model's."""
    expected = gradients_of(plain)
    assert expected
    assert_close(gradients_of(applied), expected, rtol)


def assert_same_weights(plain: nn.Module, applied: nn.Module, rtol: float = 1e-5) -> None:
    """The same of everything that trains."""
    values = ({name: p.detach() for name, p in trained(one).items()} for one in (plain, applied))
    expected, got = values
    assert expected
    assert_close(got, expected, rtol)
