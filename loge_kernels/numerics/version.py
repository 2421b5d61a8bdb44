"""`WeightVersion`: of which weight, in which state, something was computed.

A tensor counts its in-place changes in `_version`: optimizer steps, `load_state_dict` and merges that write the
parameter raise it. Writes through `.data` do not; who makes them calls `invalidate`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class WeightVersion:
    """Remembers a weight without keeping it alive. A copy or pickle is not bound, and stays invalid where it was."""

    def __init__(self) -> None:
        self.invalid = False  # declared changed, or known to be when this was copied
        self._weight: weakref.ref[Tensor] | None = None
        self._count = 0
        self._alike: tuple[weakref.ref[Tensor], int] | None = None  # another tensor of the same values

    @property
    def bound(self) -> bool:
        """Whether the weight is known."""
        return self._weight is not None

    def bind(self, weight: Tensor) -> None:
        """Remember `weight` as it is now."""
        self._weight, self._count = weakref.ref(weight), weight._version
        self._alike, self.invalid = None, False

    def invalidate(self) -> None:
        """Declare the weight changed in a way that torch does not count."""
        self.invalid = True

    def changed(self, weight: Tensor) -> bool:
        """Whether `weight` is not what was remembered: changed in place, declared changed, or another one."""
        if self.invalid:
            return True
        if self._weight is None:
            return False
        if self._weight() is weight:
            return weight._version != self._count
        return not self._same_values(weight)

    def is_other(self, weight: Tensor) -> bool:
        """Whether `weight` is another tensor than the one remembered."""
        return self._weight is not None and self._weight() is not weight

    def _same_values(self, weight: Tensor) -> bool:
        """Whether another tensor holds what the remembered one held, as under `torch.func.functional_call`, which puts
        detached or cloned parameters in the layers' places for a call. Compared once for each tensor."""
        if self._alike is not None and self._alike[0]() is weight and self._alike[1] == weight._version:
            return True
        mine = None if self._weight is None else self._weight()
        if mine is None or mine._version != self._count or hasattr(weight, "placements"):  # FSDP's, in parts
            return False
        if mine.shape != weight.shape or mine.dtype != weight.dtype or mine.device != weight.device:
            return False
        if not torch.equal(mine, weight):
            return False
        self._alike = weakref.ref(weight), weight._version
        return True

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled; who holds a copy binds it to its own weight.
        mine = None if self._weight is None else self._weight()
        invalid = self.invalid or (self._weight is not None and (mine is None or mine._version != self._count))
        return {"invalid": invalid, "_weight": None, "_count": 0, "_alike": None}
