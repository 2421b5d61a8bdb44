"""Batches of a task as calibration and planning take them: any iterable of dicts of tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Batch = Mapping[str, Any]


def numbered(batches: Iterable[Batch], doing: str) -> Iterator[tuple[int, Batch]]:
    """The batches with their numbers, and a progress bar on a terminal's standard error."""
    total = _length(batches)
    if not sys.stderr.isatty():
        yield from enumerate(batches)
        return
    from rich.console import Console

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=total)
        for item in enumerate(batches):
            yield item
            progress.advance(task)


def _length(batches: Iterable[Batch]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset has a __len__ that raises
        return None


def on_device(batch: Batch, model: nn.Module, number: int) -> dict[str, Any]:
    """The batch with its tensors where the model's parameters are. Raises TypeError for what is no dict."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch {number} is a {type(batch).__name__}; expected a dict of tensors")
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
