"""What autocast would do to an operand, and how to stay out of its reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, casts `x` to for a matrix product; None where it leaves it alone."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None  # what is below costs 5 us
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if _autocasts(device_type) and x.dtype != torch.float64 else None


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """A function of tensors, or tuples of them, out of reach of autocast on the first one's device: its products run in
    the dtypes that it chose, also when it is called, or its backward is, inside an autocast block."""

    @functools.wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():  # the rest costs 5 us
            return function(*arguments, **named)
        tensors = chain.from_iterable(a if isinstance(a, tuple) else (a,) for a in chain(arguments, named.values()))
        device_type = next((a.device.type for a in tensors if isinstance(a, Tensor)), None)
        if device_type is None or not _autocasts(device_type):
            return function(*arguments, **named)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments, **named)

    return run
