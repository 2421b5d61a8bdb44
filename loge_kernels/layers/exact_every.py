"""`ExactEvery`: one training forward of a model in n has an exact backward.

The kind of a backward is that of its own forward. Forwards are counted by a hook on the model itself, on the innermost
module that all converted layers lie in, so it does not matter through which wrapper a loop calls it, how often it
calls backward, or which optimizers there are. A forward counts where autograd records it in training mode; a
recomputation inside backward (activation checkpointing) does not, and has the kind of the forward that it repeats.

There is nothing to save: a resumed, copied or unpickled model begins with an exact forward.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .sharded import in_backward

# A compiled graph can do nothing to Python objects but through an operator, and an operator takes tensors and numbers:
# so it names the object by a number.
_LIBRARY = torch.library.Library("loge_kernels", "FRAGMENT")
_LIBRARY.define("count_forward(Tensor(a!) number) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
_numbers = itertools.count()
_counters: weakref.WeakValueDictionary[int, ExactEvery] = weakref.WeakValueDictionary()
_REMEMBERED = 64  # forwards whose backward may still come


class ExactEvery:
    """A forward pre-hook that counts the training forwards of the module it is registered on.

    every: one forward in so many is exact, the first among them.   exact: whether the forward under way, or the next
    one, is.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.exact = True
        self._begun = 0  # forwards counted
        self._ran = False  # whether `exact` belongs to a forward that has begun, not to the next one
        self._kinds: deque[tuple[int, bool]] = deque(maxlen=_REMEMBERED)  # (autograd's number at its start, kind)
        number = next(_numbers)
        _counters[number] = self
        # An input of compiled graphs, and no constant in them.
        self._number = torch.tensor(number)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Count a forward of `module`."""
        if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_exporting():
            return
        if torch.compiler.is_compiling():
            # The graph was chosen by `exact` before it runs, so it prepares the next forward.
            torch.ops.loge_kernels.count_forward(self._number)
        elif not in_backward():
            if self._ran:
                self.advance()
            self._ran = True
            self._kinds.append((torch._C._autograd._get_sequence_nr(), self.exact))

    def advance(self) -> None:
        """Turn to the next forward."""
        self._begun += 1
        self.exact = self._begun % self.every == 0
        self._ran = False

    def is_exact(self) -> bool:
        """The kind of the forward under way; inside backward, of the one that is computed again."""
        if torch.compiler.is_compiling() or not in_backward():
            return self.exact
        # Autograd numbers its nodes as they are made: the node that asks for the recomputation tells its forward.
        node: Any = torch._C._current_autograd_node()
        number = node._sequence_nr()
        return next((exact for start, exact in reversed(self._kinds) if start <= number), self.exact)

    def __reduce__(self) -> tuple[type[ExactEvery], tuple[int]]:
        return ExactEvery, (self.every,)


def attach(model: nn.Module, every: int, layers: Iterable[str]) -> ExactEvery:
    """Count the forwards of `model`, whose converted layers have these names."""
    counter = ExactEvery(every)
    _common(model, list(layers)).register_forward_pre_hook(counter)
    return counter


def detach(model: nn.Module) -> None:
    """Take the counters of `model` and of everything in it away."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, ExactEvery):
                del module._forward_pre_hooks[key]


def _common(model: nn.Module, names: list[str]) -> nn.Module:
    """The innermost module with a forward that all of these lie in, above any list of blocks: a block may be called by
    a checkpoint, in whose first pass autograd records nothing."""
    parts = [name.split(".") for name in names]
    shared = [same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))]
    found, module = model, model
    for part in shared:
        module = module.get_submodule(part)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            break
        if type(module).forward is not nn.Module.forward:
            found = module
    return found


def _count_forward(number: Tensor) -> None:
    counter = _counters.get(int(number))
    if counter is not None:
        counter.advance()


_LIBRARY.impl("count_forward", _count_forward, "CompositeExplicitAutograd")
torch.library.register_fake("loge_kernels::count_forward", lambda number: None, lib=_LIBRARY)
