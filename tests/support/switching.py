"""SwitchLoRA models for tests, small enough to train, and the loop that trains them."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCABULARY, llama
from peft import get_peft_model
from torch import Tensor, nn

import loge_kernels as loge

STEPS = 12


def config(**options: Any) -> Any:
    return loge.SwitchLoraConfig(**{"r": 4, "interval": 10, "ratio": 1.0, "total_steps": 1000, **options})


def switching(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A two-layer LLaMA with SwitchLoRA; the same at every call."""
    base = llama(dtype)
    torch.manual_seed(9)
    return get_peft_model(base, config(**options))


def optimizer_of(model: nn.Module, **options: Any) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return loge.SwitchAdamW(trained, **{"lr": 1e-2, "model": model, **options})


def batch(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(100 + step))


def train(
    model: Any, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = STEPS, rows: slice = slice(2)
) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        ids = batch(step)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
