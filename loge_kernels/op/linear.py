"""`linear`, the differentiable op as users call it; `autograd` differentiates it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend.choice import requested
from ..backend.problem import Operands
from ..factors.factors import Factors
from ..numerics.autocast import autocast_dtype
from ..numerics.dropout import draw_seed
from ..numerics.eight_bit import EightBitWeight, announce, as_bits, dequantize, from_bits, refuse_float64
from ..numerics.exact_dtypes import weight_copy, why_not
from ..numerics.matmul import slow_on_cpu
from .arguments import check, check_factors
from .autograd import Linear
from .shared_input import with_quantized_input

# M · N · K up to which a layer's time is the host's. An H200 took 26.5 ms for a step of 28 layers, 2048 wide, with M =
# 1024 by PEFT's operations, and 32.1 through this package's autograd function (bench/results/h200/step-2048.json). On a
# CPU it is a text that is generated token by token.
_SMALL_ON_GPU = 1 << 34
_SMALL_ON_CPU = 1 << 24


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
    weight_scale: Tensor | None = None,
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
            product is taken in x's dtype and the logger says so once. "nvfp4" and "mxfp4" take it in 4 bits, with dY
            rounded by torch's generator for its device (`numerics.four_bit`): experimental.
        weight_scale: float32 [N, 1], the row scales of a frozen `weight` in float8_e4m3fn (or its bits as uint8) or
            int8: forward and dX both take their frozen product in 8 bits (`numerics.eight_bit`).

    Under `torch.export`, `torch.jit.trace` and the transforms of `torch.func` the call is plain PyTorch: the same
    forward, the exact gradient. A weight in 8 bits is there what it stands for in x's dtype.

    Returns:
        y [..., N] in x's dtype (autocast's, under autocast).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range; the message names it, its value and
            what would work; exact_dtype or low_rank_dtype with float64.
        RuntimeError: factors inside a transform of `torch.func`, which would give another gradient than theirs.

    Source: Zhang et al., Applied Sciences 2025, 15(1), 82 (LoGE); formulae in `loge_kernels.backend.naive`.
    """
    if exact_fraction == 1.0:
        factors = None
    if weight_scale is not None:
        if weight.requires_grad:
            raise ValueError("weight is in 8 bits (weight_scale is given) and trains: it must be frozen")
        weight = from_bits(weight)
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return _plain(x, weight, weight_scale, bias, lora_A, lora_B, scaling, dropout)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            if factors is not None and torch.is_grad_enabled():
                raise RuntimeError(
                    "a layer with low-rank factors is inside a transform of torch.func, which cannot take their "
                    "gradient: call loge_kernels.remove(model), or apply without rank="
                )
            return _plain(x, weight, weight_scale, bias, lora_A, lora_B, scaling, dropout)
        if factors is not None and torch.is_grad_enabled():
            _warn_when_stale(factors, weight)
    stored = weight  # the 8-bit copy is kept for this one: a cast weight is another at every call
    given, dtype = x, autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        weight = weight.to(dtype) if weight_scale is None else weight
        bias = None if bias is None else bias.to(dtype)
        if lora_A is not None and lora_B is not None and lora_A.dtype != torch.float32:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    check(x, weight, weight_scale, bias, lora_A, lora_B, dropout, exact_fraction)
    name = requested(backend)
    # A checkpoint may compute the layer again where this is decided otherwise, and must have the same dropout there.
    small = weight_scale is None and (dropout == 0.0 or lora_A is None) and waits_for_host(x, weight, name)
    if small and factors is None and exact_dtype is None:
        return _small(x, weight, bias, lora_A, lora_B, float(scaling))
    operands = Operands(
        x=x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x,
        weight=weight if weight_scale is None else None,
        dense=None if weight_scale is None else as_bits(weight),
        weight_scale=weight_scale,
        bias=bias,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=float(scaling),
        exact_fraction=float(exact_fraction) if factors is not None else 0.0,
        backend=name,
        spare=as_bits(stored) if factors is not None and factors.gathered_apart else None,
        **stand_ins(factors, x.dtype),
    )
    if factors is not None:
        check_factors(x, weight, operands)
    if weight_scale is not None:
        operands = with_quantized_input(operands, given)
    elif exact_dtype is not None:
        operands = _with_dense_copy(operands, exact_dtype, stored)
    if factors is not None and factors.low_rank_dtype is not None:
        operands = operands._replace(**factors_in_eight_bits(factors, x))
    if dropout > 0.0 and lora_A is not None:
        operands = operands._replace(dropout=float(dropout), seed=draw_seed(x.device))
    if torch.compiler.is_compiling():
        y, _ = torch.ops.loge_kernels.linear(*operands)
    elif small and not torch.is_grad_enabled():  # no backward reads what stands for the weight
        return _small(x, weight, bias, lora_A, lora_B, float(scaling))
    else:
        o = operands
        y = Linear.apply(o.x, o.weight, o.bias, o.lora_A, o.lora_B, o)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def waits_for_host(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether an exact layer [N, K] of x [..., K], computed by `backend`, is so small that its products take less time
    than the Python around them. PyTorch's own operations cost the host less than an autograd function does, and what
    that saves in the products does not count then."""
    if backend != "auto" or torch.compiler.is_compiling():
        return False
    if x.is_cuda:
        return x.numel() * weight.shape[0] <= _SMALL_ON_GPU
    if slow_on_cpu(x.dtype) and (x.numel() != weight.shape[1] or torch.is_grad_enabled()):
        return False  # y of one row is fast in every dtype, and nothing else
    return x.numel() * weight.shape[0] <= _SMALL_ON_CPU


def _small(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float
) -> Tensor:
    """The layer in as few of PyTorch's own operations as there can be, all in x's dtype, so that x alone is saved."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    if lora_A is not None and lora_B is not None:
        xa = F.linear(rows, lora_A.to(x.dtype))
        y = torch.addmm(y, xa, lora_B.to(x.dtype).t(), alpha=scaling)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def stand_ins(factors: Factors | None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The operands that stand for the weight in dX, by name, with floating ones in `dtype` (None: as they are)."""
    if factors is None:
        return {}
    cast = dtype is not None and factors.left.dtype != dtype
    if cast and factors.gather is not None:
        factors.gather()
    left, right, residual = factors.left, factors.right, factors.residual
    if cast:
        left, right = left.to(dtype), right.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    return {"left": left, "right": right, "rows": factors.rows, "residual": residual}


def factors_in_eight_bits(factors: Factors | None, x: Tensor) -> dict[str, Any]:
    """The 8-bit copies of left and right with their scales, by the operands' names; none where they cannot run."""
    copies = None if factors is None else factors.in_eight_bits(x)
    if copies is None:
        return {}
    (left, left_scale), (right, right_scale) = copies
    return {
        "left": as_bits(left),
        "left_scale": left_scale,
        "right": as_bits(right),
        "right_scale": right_scale,
    }


def _plain(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """The layer in PyTorch's own operations."""
    y = F.linear(x, weight if weight_scale is None else dequantize(weight, weight_scale, x.dtype), bias)
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


def _with_dense_copy(operands: Operands, exact_dtype: str | EightBitWeight, weight: Tensor) -> Operands:
    """The operands with a copy of `weight` in 8 bits or 4 where dX reads a dense product that can run so."""
    copy = exact_dtype if isinstance(exact_dtype, EightBitWeight) else weight_copy(exact_dtype)
    x = operands.x
    assert x is not None
    refuse_float64("exact_dtype", copy.dtype, x.dtype)
    if operands.kind == "low-rank" or not (x.requires_grad and torch.is_grad_enabled()):
        return operands
    reason = why_not(copy.dtype, x.device, *weight.shape)
    if reason is None:
        if copy.made_in_backward(weight):
            return operands._replace(quantize=copy.dtype)
        if copy.gathered_apart:
            operands = operands._replace(spare=weight, quantize=copy.dtype)
        return operands._replace(**copy.operands(weight))
    if not torch.compiler.is_compiling():
        announce("exact_dtype", copy.dtype, reason, x.dtype)
    return operands
