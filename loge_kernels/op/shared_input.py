"""A layer's input in 8 bits, quantised once where several layers share it: q, k and v of attention, gate and up.

The last one is kept while its input lives, for the next call with the same tensor, unchanged. Only of a tensor that
autograd has made: what a user made may be written to without torch counting it (`.data`, a replayed graph). A compiled
graph shares by itself what is computed twice.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..backend import reference
from ..backend.choice import quantize_input
from ..backend.problem import Operands
from ..numerics.eight_bit import as_bits, from_bits

_last: tuple[Any, ...] | None = None  # what it is of, a weak reference to the input, and the two tensors


def with_quantized_input(operands: Operands, x: Tensor) -> Operands:
    """The operands with `x_bits` and `x_scale`; `x` is the tensor that the caller gave."""
    global _last
    assert operands.x is not None
    assert operands.dense is not None
    if torch.compiler.is_compiling():
        bits, scale = reference.quantize(operands.x.detach(), from_bits(operands.dense).dtype)
        return operands._replace(x_bits=as_bits(bits), x_scale=scale)
    key = None
    if x.grad_fn is not None:
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        key = x._version, operands.x.dtype, operands.dense.dtype, operands.backend, stream
        if _last is not None and _last[0] == key and _last[1]() is x:
            return operands._replace(x_bits=_last[2], x_scale=_last[3])
    with torch.no_grad(), _disable_current_modes():  # a selective checkpoint would miss it in the recomputation
        bits, scale = quantize_input(operands)
    bits = as_bits(bits)
    _last = None if key is None else (key, weakref.ref(x, _forget), bits, scale)
    return operands._replace(x_bits=bits, x_scale=scale)


def _forget(dead: weakref.ref[Tensor]) -> None:
    global _last
    if _last is not None and _last[1] is dead:
        _last = None
