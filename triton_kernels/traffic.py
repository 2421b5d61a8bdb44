"""Bytes that kernels move, counted in Triton's interpreter: every load, store and atomic, by address.

Active lanes only: what a mask hides is not traffic. The counts are those that `cost_model.predicted_bytes` predicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .cost_model import Traffic


@dataclass
class Recorder:
    """The accesses of the kernels that ran: a start address and a size in bytes for every active lane."""

    loads: list[tuple[Any, int]] = field(default_factory=list)
    stores: list[tuple[Any, int]] = field(default_factory=list)
    atomics: list[tuple[Any, int]] = field(default_factory=list)

    def of(self, tensor: Tensor) -> Traffic:
        """The traffic of one tensor, atomics counted as stores. Tensors must not interleave in memory."""
        return Traffic(self._bytes(self.loads, tensor), self._bytes(self.stores + self.atomics, tensor))

    def most_loads_of_an_element(self, tensor: Tensor) -> int:
        """How often the most often loaded element of a tensor was loaded."""
        return self._most(self.loads, tensor)

    def most_stores_of_an_element(self, tensor: Tensor) -> int:
        """How often the most often stored element of a tensor was stored, atomics included."""
        return self._most(self.stores + self.atomics, tensor)

    def total(self) -> Traffic:
        """All traffic, that of workspaces included."""

        def total(accesses: list[tuple[Any, int]]) -> int:
            return sum(len(addresses) * size for addresses, size in accesses)

        return Traffic(total(self.loads), total(self.stores) + total(self.atomics))

    @staticmethod
    def _inside(accesses: list[tuple[Any, int]], tensor: Tensor) -> list[tuple[Any, int]]:
        if tensor.numel() == 0:
            return []
        begin = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = begin + (last + 1) * tensor.element_size()
        return [(a[(a >= begin) & (a < end)], size) for a, size in accesses]

    def _bytes(self, accesses: list[tuple[Any, int]], tensor: Tensor) -> int:
        return sum(len(addresses) * size for addresses, size in self._inside(accesses, tensor))

    def _most(self, accesses: list[tuple[Any, int]], tensor: Tensor) -> int:
        inside = [addresses for addresses, _ in self._inside(accesses, tensor)]
        if not any(len(addresses) for addresses in inside):
            return 0
        return int(np.unique(np.concatenate(inside), return_counts=True)[1].max())


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record what kernels do inside the block. Needs TRITON_INTERPRET=1; not for concurrent use."""
    from triton.runtime.interpreter import InterpreterBuilder

    recorder = Recorder()
    originals = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }

    def lanes(ptrs: Any, mask: Any) -> tuple[Any, int]:
        active = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        return ptrs.data[active].astype(np.int64), ptrs.get_element_ty().primitive_bitwidth // 8

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        recorder.loads.append(lanes(ptrs, mask))
        return originals["create_masked_load"](self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        recorder.stores.append(lanes(ptrs, mask))
        return originals["create_masked_store"](self, ptrs, value, mask, *rest)

    def atomic(self: Any, operation: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        recorder.atomics.append(lanes(ptrs, mask))
        return originals["create_atomic_rmw"](self, operation, ptrs, value, mask, *rest)

    replacements = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic}
    try:
        for name, function in replacements.items():
            setattr(InterpreterBuilder, name, function)
        yield recorder
    finally:
        for name, function in originals.items():
            setattr(InterpreterBuilder, name, function)
