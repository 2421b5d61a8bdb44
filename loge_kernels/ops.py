"""The differentiable op: autograd and the torch.library registration.

Two operators are registered, `loge_kernels::linear` and `loge_kernels::linear_backward`, with fake implementations
for torch.compile and the autograd formula of `reference.py`. In eager mode the same functions run through one
`torch.autograd.Function`, which costs less per call than the dispatcher's Python path.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import check
from .autocast import autocast_dtype, without_autocast
from .backends import requested, run_backward, run_forward
from .dropout import draw_seed
from .eight_bit import EightBitWeight, announce, as_bits, from_bits, why_not
from .factors import Factors, as_buffers
from .problem import BackwardProblem

_LIBRARY = torch.library.Library("loge_kernels", "DEF")
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? left, Tensor? right, Tensor? rows, Tensor? residual, Tensor? dense, "
    "Tensor? dense_scale, Tensor? left_scale, Tensor? right_scale, Tensor? bias, Tensor? lora_A, Tensor? lora_B, "
    "float scaling, float dropout, Tensor? seed, float exact_fraction, str backend"
)
_LIBRARY.define(f"linear({_ARGUMENTS}) -> (Tensor y, Tensor xa)")
_LIBRARY.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor? weight, Tensor? left, Tensor? right, Tensor? rows, "
    "Tensor? residual, Tensor? dense, Tensor? dense_scale, Tensor? left_scale, Tensor? right_scale, Tensor? lora_A, "
    "Tensor? lora_B, float scaling, float dropout, Tensor? seed, float exact_fraction, bool need_dx, "
    "bool need_dweight, bool need_dbias, bool need_dA, bool need_dB, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
)


def linear(
    x: Tensor,
    weight: Tensor,
    factors: Factors | None,
    *,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    exact_fraction: float = 0.0,
    backend: str | None = None,
    exact_dtype: str | EightBitWeight | None = None,
) -> Tensor:
    """A linear layer with an exact forward and a low-rank activation gradient: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides; any number of rows, none included.
        weight: [N, K], x's dtype (cast under autocast). Trainable weights get their exact dense gradient.
        factors: what stands for `weight` in dX (`factorize`), or None for the exact dense product. Their
            `low_rank_dtype` ("float8", "int8" or None) is what their products are taken in, where that can run.
        bias: [N] or None.
        lora_A, lora_B: the adapter, [P, K] and [N, P], in x's dtype or float32; both or neither.
        scaling: the adapter's factor s (PEFT's alpha / r).
        dropout: probability, in [0, 1), of zeroing an element of the adapter's input. The mask is a function of a
            seed drawn from torch's generator for x's device, so it is the same when checkpointing recomputes.
        exact_fraction: share of the rows in [0, 1], those of largest ‖dY‖, whose dX is the dense product; at 1 no
            factors are used.
        backend: a name of `backends()`, or None for the one in force (`use_backend`, LOGE_BACKEND, "auto").
        exact_dtype: None, or "float8" or "int8" to take the dense products of the frozen path in 8 bits, where
            there are any (no factors, or exact_fraction > 0). A name quantises the weight at each call; an
            `EightBitWeight` keeps the copy from call to call. Where the device or the shape does not allow it, the
            product is taken in x's dtype and the logger says so once.

    Under `torch.export`, `torch.jit.trace` and the transforms of `torch.func` the call is plain PyTorch: the same
    forward, the exact gradient.

    Returns:
        y [..., N] in x's dtype (autocast's, under autocast).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range; the message names it, its value and
            what would work; exact_dtype or low_rank_dtype with float64.
        RuntimeError: factors inside a transform of `torch.func`, which would give another gradient than theirs.

    Source: Zhang et al., Applied Sciences 2025, 15(1), 82 (LoGE); formulae in `loge_kernels.reference`.
    """
    if exact_fraction == 1.0:
        factors = None
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return _plain(x, weight, bias, lora_A, lora_B, scaling, dropout)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            if factors is not None and torch.is_grad_enabled():
                raise RuntimeError(
                    "a layer with low-rank factors is inside a transform of torch.func, which cannot take their "
                    "gradient: call loge_kernels.remove(model), or apply without rank="
                )
            return _plain(x, weight, bias, lora_A, lora_B, scaling, dropout)
        if factors is not None and torch.is_grad_enabled():
            _warn_when_stale(factors, weight)
    given = weight
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if lora_A is not None and lora_B is not None and lora_A.dtype != torch.float32:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    left: Tensor | None = None
    right: Tensor | None = None
    rows: Tensor | None = None
    residual: Tensor | None = None
    dense: Tensor | None = None
    dense_scale: Tensor | None = None
    left_scale: Tensor | None = None
    right_scale: Tensor | None = None
    if factors is not None:
        if factors.gather is not None and factors.left.dtype != x.dtype:
            factors.gather()
        left, right, rows, residual = factors.left, factors.right, factors.rows, factors.residual
        if left.dtype != x.dtype:
            left, right = left.to(x.dtype), right.to(x.dtype)
            residual = None if residual is None else residual.to(x.dtype)
    check(x, weight, left, right, rows, residual, bias, lora_A, lora_B, dropout, exact_fraction)
    if exact_dtype is not None:
        reads_dense = left is None or exact_fraction > 0.0
        dense, dense_scale = _eight_bit(exact_dtype, x, given, reads_dense)
    if factors is not None and factors.low_rank_dtype is not None:
        copies = factors.in_eight_bits(x)
        if copies is not None:
            (left, left_scale), (right, right_scale) = ((as_bits(tensor), scale) for tensor, scale in copies)
    seed = draw_seed(x.device) if dropout > 0.0 and lora_A is not None else None
    call = torch.ops.loge_kernels.linear if torch.compiler.is_compiling() else _Linear.apply
    y, _ = call(
        x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x,
        weight,
        left,
        right,
        rows,
        residual,
        dense,
        dense_scale,
        left_scale,
        right_scale,
        bias,
        lora_A,
        lora_B,
        float(scaling),
        float(dropout) if seed is not None else 0.0,
        seed,
        float(exact_fraction) if left is not None else 0.0,
        requested(backend),
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """The layer in PyTorch's own operations."""
    y = F.linear(x, weight, bias)
    if lora_A is None or lora_B is None:
        return y
    xa = F.linear(F.dropout(x, dropout).to(lora_A.dtype), lora_A)
    return y + (F.linear(xa, lora_B) * scaling).to(y.dtype)


def _warn_when_stale(factors: Factors, weight: Tensor) -> None:
    if factors.newly_stale(weight):
        warnings.warn(
            f"the weight has changed since its factors of rank {factors.rank} were computed: dX follows the old one; "
            "call factors.refresh(weight)",
            stacklevel=3,
        )


def _eight_bit(
    exact_dtype: str | EightBitWeight, x: Tensor, weight: Tensor, reads_dense: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The weight's 8-bit copy and its scales; None and None where dX reads no dense product, or it cannot run."""
    copy = exact_dtype if isinstance(exact_dtype, EightBitWeight) else EightBitWeight(exact_dtype)
    if x.dtype == torch.float64:
        raise TypeError(
            f"exact_dtype={copy.dtype!r} with x in torch.float64; 8 bits are for float32, float16 and bfloat16"
        )
    if not (reads_dense and x.requires_grad and torch.is_grad_enabled()):
        return None, None
    reason = why_not(copy.dtype, x.device, *weight.shape)
    if reason is None:
        tensor, scale = copy.current(weight)
        return as_bits(tensor), scale
    if not torch.compiler.is_compiling():
        announce("exact_dtype", copy.dtype, reason, x.dtype)
    return None, None


@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    dense: Tensor | None,
    dense_scale: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    exact_fraction: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y, xa = run_forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, backend)
    return y, x.new_empty(0) if xa is None else xa


def _forward_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    M, lora_A = x.shape[0], rest[9]
    xa = x.new_empty(0) if lora_A is None else x.new_empty(M, lora_A.shape[0])
    return x.new_empty(M, weight.shape[0]), xa


@without_autocast
def _backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    dense: Tensor | None,
    dense_scale: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    exact_fraction: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dA: bool,
    need_dB: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    left, right, dense = (None if t is None else from_bits(t) for t in (left, right, dense))
    problem = BackwardProblem(
        dy=dy,
        x=x,
        xa=xa,
        weight=weight,
        left=left,
        right=right,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        dropout=dropout,
        seed=seed,
        exact_fraction=exact_fraction,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        need_dA=need_dA,
        need_dB=need_dB,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rows=rows,
        residual=residual,
        dense=dense,
        dense_scale=dense_scale,
        left_scale=left_scale,
        right_scale=right_scale,
    )
    g = run_backward(problem, backend)
    # An op's outputs may not share storage, so each absent gradient is an empty tensor of its own.
    dx, dweight, dbias, dA, dB = (dy.new_empty(0) if t is None else t for t in (g.dx, g.dweight, g.dbias, g.dA, g.dB))
    return dx, dweight, dbias, dA, dB


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    dense: Tensor | None,
    dense_scale: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    exact_fraction: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dA: bool,
    need_dB: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    M, N = dy.shape
    width = next(t for t in (right, weight, dense, x, lora_A, dy) if t is not None).shape[1]
    return (
        dy.new_empty((M, width) if need_dx else 0),
        dy.new_empty((N, width) if need_dweight else 0),
        dy.new_empty(N if need_dbias else 0),
        lora_A.new_empty(lora_A.shape) if need_dA and lora_A is not None else dy.new_empty(0),
        lora_B.new_empty(lora_B.shape) if need_dB and lora_B is not None else dy.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward reads and nothing else: x and xa where a gradient needs them, never a frozen weight that
    factors stand for."""
    x, weight, left, right, rows, residual, dense, dense_scale, left_scale, right_scale, _, lora_A, lora_B = inputs[:13]
    scaling, dropout, seed, exact_fraction, backend = inputs[13:]
    need = ctx.needs_input_grad
    need_dx, need_dweight, need_dA, need_dB = need[0], need[1], need[11], need[12]
    ctx.need = need_dx, need_dweight, need[10], need_dA, need_dB
    ctx.set_materialize_grads(False)
    reads_dense = need_dx and (left is None or exact_fraction > 0.0)
    ctx.save_for_backward(
        x if need_dweight or need_dA else None,
        output[1] if need_dB else None,
        weight if reads_dense and dense is None else None,
        left if need_dx else None,
        right if need_dx else None,
        rows if need_dx else None,
        residual if need_dx else None,
        dense if reads_dense else None,
        dense_scale if reads_dense else None,
        left_scale if need_dx else None,
        right_scale if need_dx else None,
        lora_A if need_dx or need_dA else None,
        lora_B if need_dx or need_dA or need_dB else None,
        seed,
    )
    ctx.constants = scaling, dropout, exact_fraction, backend


def _differentiate(ctx: Any, dy: Tensor | None, _dxa: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 18
    *tensors, seed = ctx.saved_tensors
    scaling, dropout, exact_fraction, backend = ctx.constants
    call: Any = torch.ops.loge_kernels.linear_backward if torch.compiler.is_compiling() else _backward
    results = call(dy, *tensors, scaling, dropout, seed, exact_fraction, *ctx.need, backend)
    dx, dweight, dbias, dA, dB = (t if need else None for t, need in zip(results, ctx.need, strict=True))
    return dx, dweight, *(None,) * 8, dbias, dA, dB, *(None,) * 5


class _Linear(torch.autograd.Function):
    # forward takes ctx itself: a separate setup_context makes torch inspect the signature at every call, 50 us.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        as_buffers(*inputs[2:10])
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dxa: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only create_graph=True runs backward so
            raise RuntimeError("loge_kernels.linear has no second derivative: call backward without create_graph=True")
        return _differentiate(ctx, dy, dxa)


_LIBRARY.impl("linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("loge_kernels::linear", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("loge_kernels::linear_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("loge_kernels::linear", _differentiate, setup_context=_save, lib=_LIBRARY)
