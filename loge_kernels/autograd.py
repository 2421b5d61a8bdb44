"""How the op is differentiated: two operators for torch.library, and one autograd function.

`loge_kernels::linear` and `loge_kernels::linear_backward` have fake implementations for torch.compile; their formulae
are those of `naive`. In eager mode the same functions run through one `torch.autograd.Function`, which costs less per
call than the dispatcher's Python path. Arguments and gradients are in the order of `Operands`.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from .autocast import without_autocast
from .backends import run_backward, run_forward
from .factors import as_buffers
from .problem import NO_GRADIENTS, BackwardProblem, Need, Operands

_SCHEMA_TYPES = {Tensor | None: "Tensor?", float: "float", str: "str"}
_HINTS = get_type_hints(Operands)
_OPERANDS = ", ".join(f"{_SCHEMA_TYPES[_HINTS[name]]} {name}" for name in Operands._fields)
_TENSORS = sum(_HINTS[name] == Tensor | None for name in Operands._fields)  # they come first
_LIBRARY = torch.library.Library("loge_kernels", "DEF")
_LIBRARY.define(f"linear({_OPERANDS}) -> (Tensor y, Tensor xa)")
_LIBRARY.define(
    f"linear_backward(Tensor dy, Tensor? xa, bool[] need, {_OPERANDS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
)


@without_autocast
def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(*given)
    y, xa = run_forward(operands)
    return y, y.new_empty(0) if xa is None else xa


def _forward_fake(*given: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(*given)
    x, weight, lora_A = operands.x, operands.weight, operands.lora_A
    assert x is not None
    assert weight is not None
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(0 if lora_A is None else (M, lora_A.shape[0]))


@without_autocast
def _backward(dy: Tensor, xa: Tensor | None, need: list[bool], *given: Any) -> tuple[Tensor, ...]:
    operands = Operands(*given)
    g = run_backward(BackwardProblem.of(dy, xa, need, operands), operands.backend)
    # An op's outputs may not share storage, so each absent gradient is an empty tensor of its own.
    return tuple(dy.new_empty(0) if t is None else t for t in (g.dx, g.dweight, g.dbias, g.dA, g.dB))


def _backward_fake(dy: Tensor, xa: Tensor | None, need: list[bool], *given: Any) -> tuple[Tensor, ...]:
    o, wanted = Operands(*given), Need(*need)
    M, N = dy.shape
    K = next(t for t in (o.right, o.weight, o.dense, o.x, o.lora_A, dy) if t is not None).shape[1]
    return (
        dy.new_empty((M, K) if wanted.dx else 0),
        dy.new_empty((N, K) if wanted.dweight else 0),
        dy.new_empty(N if wanted.dbias else 0),
        o.lora_A.new_empty(o.lora_A.shape) if wanted.dA and o.lora_A is not None else dy.new_empty(0),
        o.lora_B.new_empty(o.lora_B.shape) if wanted.dB and o.lora_B is not None else dy.new_empty(0),
    )


def save(ctx: Any, operands: Operands, need: Operands, xa: Tensor | None) -> None:
    """Keep in `ctx` what `restore` gives back; `need` marks the operands that take a gradient."""
    kept = operands.kept(need)
    ctx.need = Need.of(need)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(xa if ctx.need.dB else None, *kept[:_TENSORS])
    ctx.constants = kept[_TENSORS:]


def restore(ctx: Any) -> tuple[Tensor | None, Operands]:
    """xa and the operands that backward reads."""
    xa, *tensors = ctx.saved_tensors
    return xa, Operands(*tensors, *ctx.constants)


def named(results: Any, need: Need) -> Operands:
    """A gradient, or None, for each operand."""
    dx, dweight, dbias, dA, dB = (t if wanted else None for t, wanted in zip(results, need, strict=True))
    return NO_GRADIENTS._replace(x=dx, weight=dweight, bias=dbias, lora_A=dA, lora_B=dB)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    need = ctx.needs_input_grad[: len(inputs)]  # torch.library appends one of its own
    save(ctx, Operands(*inputs), Operands(*need), output[1])


def _differentiate(ctx: Any, dy: Tensor | None, _dxa: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return NO_GRADIENTS
    xa, operands = restore(ctx)
    call: Any = torch.ops.loge_kernels.linear_backward if torch.compiler.is_compiling() else _backward
    return named(call(dy, xa, list(ctx.need), *operands), ctx.need)


class Linear(torch.autograd.Function):
    """y [M, N] and xa [M, P] of the operands, in their order; backward runs once."""

    # forward takes ctx itself: a separate setup_context makes torch inspect the signature at every call, 50 us.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        as_buffers(*Operands(*inputs).stand_ins)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dxa: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # only create_graph=True runs backward so
            raise RuntimeError("loge_kernels.linear has no second derivative: call backward without create_graph=True")
        return _differentiate(ctx, dy, dxa)


_LIBRARY.impl("linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("loge_kernels::linear", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("loge_kernels::linear_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("loge_kernels::linear", _differentiate, setup_context=_save, lib=_LIBRARY)
