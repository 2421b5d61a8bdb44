"""A bottleneck adapter of two tensor trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .tensor_train import TensorTrain

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


def bottleneck(h: Tensor, down: TensorTrain, up: TensorTrain, activation: str) -> Tensor:
    """h + up(act(down(h))) [..., features], in h's dtype; the trains run in their own, or in autocast's."""
    inner = ACTIVATIONS[activation](down(down.suited(h)))
    return h + up(inner).to(h.dtype)
