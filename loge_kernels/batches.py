"""Batches of a task as calibration and planning take them: any iterable of dicts of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]


def on_device(batch: Batch, model: nn.Module, number: int) -> dict[str, Any]:
    """The batch with its tensors where the model's parameters are. Raises TypeError for what is no dict."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch {number} is a {type(batch).__name__}; expected a dict of tensors")
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
