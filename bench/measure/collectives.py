"""What collectives a block of code sends: counted as torch dispatches them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(NamedTuple):
    """One collective: torch's operator, the bytes of its whole tensor, whether autograd's backward called it."""

    name: str
    nbytes: int
    backward: bool


class Collectives(TorchDispatchMode):
    """Counts the collectives that run in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in args if isinstance(t, Tensor)] + [t for a in args if isinstance(a, list) for t in a]
            largest = max((t.nbytes for t in tensors if isinstance(t, Tensor)), default=0)
            in_backward = torch._C._current_graph_task_id() != -1
            self.sent.append(Sent(func.overloadpacket.__name__, largest, in_backward))
        return func(*args, **(kwargs or {}))

    def total(self, name: str, backward: bool) -> int:
        """Bytes of the collectives whose operator has `name` in it."""
        return sum(s.nbytes for s in self.sent if name in s.name and s.backward == backward)
