"""A layer's dY, shown to who asks for it: in eager mode by a hook, inside a compiled graph by an operator.

torch.compile does not guard on hooks: one that comes after compilation is never called. A layer's `watcher` is an
attribute, on which it does guard, and the operator needs no break in the graph. So the graph with the watcher and the
one without are each compiled once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("loge_kernels", "FRAGMENT")
_LIBRARY.define("watched(Tensor y, Tensor number) -> Tensor")
# A replayed CUDA graph would call nobody.
_LIBRARY.define("seen(Tensor dy, Tensor number) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))

_numbers = itertools.count()
_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()


class Watcher:
    """The identity on a tensor y, whose gradient dY is given to `keep` in every backward pass."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self.keep = keep
        number = next(_numbers)
        _watchers[number] = self
        # An input of compiled graphs, and no constant in them: layers of one shape share a graph.
        self._number = torch.tensor(number)

    def __call__(self, y: Tensor) -> Tensor:
        if y.requires_grad and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                return torch.ops.loge_kernels.watched(y, self._number)
            y.register_hook(self.keep)
        return y


def _seen(dy: Tensor, number: Tensor) -> Tensor:
    watcher = _watchers.get(int(number))
    if watcher is not None:
        watcher.keep(dy)
    return dy.clone()  # an operator's output may not be its input


_LIBRARY.impl("watched", lambda y, number: y.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("seen", _seen, "CompositeExplicitAutograd")
torch.library.register_fake("loge_kernels::watched", lambda y, number: y.clone(), lib=_LIBRARY)
torch.library.register_fake("loge_kernels::seen", lambda dy, number: dy.clone(), lib=_LIBRARY)
torch.library.register_autograd(
    "loge_kernels::watched",
    lambda ctx, dy: (torch.ops.loge_kernels.seen(dy, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    lib=_LIBRARY,
)
