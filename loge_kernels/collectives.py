"""The ranks that train a model together: their wrapper and group, and errors that all of them see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Group = Any  # a torch.distributed.ProcessGroup, which not every build of torch has; None: the default one


def group_of(model: nn.Module) -> Group:
    """The process group of a `DistributedDataParallel` wrapper; None, the default one, for any other module."""
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel`, whose output head and names are those to go by."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def distributed() -> bool:
    """Whether this process has ranks beside it, or could have."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def failing_alike(what: str, device: torch.device, group: Group = None) -> Iterator[None]:
    """Where the block raises on one rank of `group` it raises on all: there its own error, elsewhere ValueError.

    Otherwise the others would wait for that rank in their next collective. `device` is one that the group's backend can
    send from. Nothing is sent outside torch.distributed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not distributed():
            raise
        failure = error
    if distributed():
        failed = torch.tensor(float(failure is not None), device=device)
        torch.distributed.all_reduce(failed, group=group)
        if failure is not None:
            raise failure
        if failed.item() > 0:
            raise ValueError(f"{what} failed on another rank, whose error says why")
