"""Batches to calibrate on, and what calibration should see of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
UP = "base_model.model.model.layers.1.mlp.up_proj"


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(50, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def by_hand(model: nn.Module, name: str) -> list[tuple[Tensor, Tensor]]:
    """dY and x of the layer, for each batch."""
    base: Any = model.get_submodule(name)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedding.weight.requires_grad_()  # the gradient of the first layers exists then
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda dy: seen.append((dy.clone(), inputs[0].detach())))

    handle = base.base_layer.register_forward_hook(keep)
    for batch in batches():
        model(**batch).loss.backward()
    handle.remove()
    embedding.weight.requires_grad_(False)
    model.zero_grad()
    return seen
