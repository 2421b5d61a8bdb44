"""How the op is differentiated: two operators for torch.library, and one autograd function.

`loge_kernels::linear` and `loge_kernels::linear_backward` have fake implementations for torch.compile; their formulae
are those of `naive`. In eager mode the same functions run through one `torch.autograd.Function`, which costs less per
call than the dispatcher's Python path. Arguments and gradients are in the order of `Operands`.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..backend.choice import run_backward, run_forward
from ..backend.problem import NO_GRADIENTS, BackwardProblem, Need, Operands
from ..factors.factors import as_buffers
from ..numerics.autocast import without_autocast

_SCHEMA_TYPES = {Tensor | None: "Tensor?", float: "float", str: "str"}
_HINTS = get_type_hints(Operands)
_OPERANDS = ", ".join(f"{_SCHEMA_TYPES[_HINTS[name]]} {name}" for name in Operands._fields)
_TENSORS = sum(_HINTS[name] == Tensor | None for name in Operands._fields)  # they come first
_DIFFERENTIABLE = ("x", "weight", "bias", "lora_A", "lora_B")  # in `Need`'s order
_NOTHING = (None,) * (len(_DIFFERENTIABLE) + 1)
_LIBRARY = torch.library.Library("loge_kernels", "DEF")
_LIBRARY.define(f"linear({_OPERANDS}) -> (Tensor y, Tensor xa)")
_LIBRARY.define(
    f"linear_backward(Tensor dy, Tensor? xa, bool[] need, {_OPERANDS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
)


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    y, xa = _run_forward(Operands(*given))
    return y, y.new_empty(0) if xa is None else xa


_run_forward = without_autocast(run_forward)


def _forward_fake(*given: Any) -> tuple[Tensor, Tensor]:
    operands = Operands(*given)
    x, lora_A = operands.x, operands.lora_A
    assert x is not None
    M = x.shape[0]
    return x.new_empty(M, operands.sizes[0]), x.new_empty(0 if lora_A is None else (M, lora_A.shape[0]))


@without_autocast
def _gradients(dy: Tensor, xa: Tensor | None, need: Need, operands: Operands) -> tuple[Tensor | None, ...]:
    if operands.spare is not None:
        operands = operands.gathered(dy.dtype)
    g = run_backward(BackwardProblem.of(dy, xa, need, operands.with_dense_copy()), operands.backend)
    return g.dx, g.dweight, g.dbias, g.dA, g.dB


def _backward(dy: Tensor, xa: Tensor | None, need: list[bool], *given: Any) -> tuple[Tensor, ...]:
    # An op's outputs may not share storage: each absent gradient is an empty tensor of its own, and those that lie in
    # one workspace are copied out of it.
    found = _gradients(dy, xa, Need(*need), Operands(*given))
    alone = (t is None or t.untyped_storage().nbytes() == t.nbytes for t in found)
    return tuple(dy.new_empty(0) if t is None else t if own else t.clone() for t, own in zip(found, alone, strict=True))


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


def save(ctx: Any, operands: Operands, need: Need, xa: Tensor | None) -> None:
    """Keep in `ctx` what `restore` gives back."""
    kept = operands.kept(need)
    ctx.need = need
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(xa if need.dB else None, *kept[:_TENSORS])
    ctx.constants = kept[_TENSORS:]


def restore(ctx: Any) -> tuple[Tensor | None, Operands]:
    """xa and the operands that backward reads."""
    xa, *tensors = ctx.saved_tensors
    return xa, Operands(*tensors, *ctx.constants)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    marks = ctx.needs_input_grad[: len(inputs)]  # torch.library appends one of its own
    save(ctx, Operands(*inputs), Operands(*marks).wanted(), output[1])


def _differentiate(ctx: Any, dy: Tensor | None, _dxa: Tensor | None) -> Operands:
    if dy is None:
        return NO_GRADIENTS
    gradients: dict[str, Any] = dict(zip(_DIFFERENTIABLE, _run(ctx, dy), strict=True))
    return NO_GRADIENTS._replace(**gradients)


def _run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients in `Need`'s order, None where none is wanted."""
    xa, operands = restore(ctx)
    if not torch.compiler.is_compiling():
        return _gradients(dy, xa, ctx.need, operands)
    results = torch.ops.loge_kernels.linear_backward(dy, xa, list(ctx.need), *operands)
    return tuple(t if wanted else None for t, wanted in zip(results, ctx.need, strict=True))


class Linear(torch.autograd.Function):
    """y [M, N] of the operands. Those that may take a gradient come first, once more and in `Need`'s order: torch looks
    at every argument of its own, and the others are none of autograd's business."""

    # forward takes ctx itself: a separate setup_context makes torch inspect the signature at every call, 50 us.
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        operands: Operands = given[-1]
        y, xa = _run_forward(operands)
        if operands.left is not None or operands.dense is not None:
            as_buffers(*operands.stand_ins)
        save(ctx, operands, Need(*ctx.needs_input_grad[:-1]), xa)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return _NOTHING
        if torch.is_grad_enabled():  # only create_graph=True runs backward so
            raise RuntimeError("loge_kernels.linear has no second derivative: call backward without create_graph=True")
        return *_run(ctx, dy), None


_LIBRARY.impl("linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("loge_kernels::linear", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("loge_kernels::linear_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("loge_kernels::linear", _differentiate, setup_context=_save, lib=_LIBRARY)
