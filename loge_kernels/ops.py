"""The differentiable op: argument checks, autograd and the torch.library registration.

Two operators are registered, `loge_kernels::linear` and `loge_kernels::linear_backward`, with fake implementations
for torch.compile and the autograd formula of `reference.py`. In eager mode the same functions run through one
`torch.autograd.Function`, which costs less per call than the dispatcher's Python path.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import requested, run_backward, run_forward
from .dropout import draw_seed
from .factors import Factors
from .problem import BackwardProblem

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_LIBRARY = torch.library.Library("loge_kernels", "DEF")
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? left, Tensor? right, Tensor? bias, Tensor? lora_A, Tensor? lora_B, "
    "float scaling, float dropout, Tensor? seed, float exact_fraction, str backend"
)
_LIBRARY.define(f"linear({_ARGUMENTS}) -> (Tensor y, Tensor xa)")
_LIBRARY.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor? weight, Tensor? left, Tensor? right, Tensor? lora_A, "
    "Tensor? lora_B, float scaling, float dropout, Tensor? seed, float exact_fraction, bool need_dx, "
    "bool need_dweight, bool need_dbias, bool need_dA, bool need_dB, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
)


def linear(
    x: Tensor,
    weight: Tensor,
    factors: Factors | None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    exact_fraction: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with an exact forward and a low-rank activation gradient: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides; any number of rows, none included.
        weight: [N, K], x's dtype (cast under autocast). Trainable weights get their exact dense gradient.
        factors: what stands for `weight` in dX (`factorize`), or None for the exact dense product.
        bias: [N] or None.
        lora_A, lora_B: the adapter, [P, K] and [N, P], in x's dtype or float32; both or neither.
        scaling: the adapter's factor s (PEFT's alpha / r).
        dropout: probability, in [0, 1), of zeroing an element of the adapter's input. The mask is a function of a
            seed drawn from torch's generator for x's device, so it is the same when checkpointing recomputes.
        exact_fraction: share of the rows in [0, 1], those of largest ‖dY‖, whose dX is the dense product.
        backend: a name of `backends()`, or None for the one in force (`use_backend`, LOGE_BACKEND, "auto").

    Returns:
        y [..., N] in x's dtype (autocast's, under autocast).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range; the message names it, its value and
            what would work.

    Source: Zhang et al., Applied Sciences 2025, 15(1), 82 (LoGE); formulae in `loge_kernels.reference`.
    """
    if factors is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        _warn_when_stale(factors, weight)
    device_type = x.device.type
    if _autocasts(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if lora_A is not None and lora_B is not None and lora_A.dtype != torch.float32:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    left: Tensor | None = None
    right: Tensor | None = None
    if factors is not None:
        left, right = factors.left, factors.right
        if left.dtype != x.dtype:
            left, right = left.to(x.dtype), right.to(x.dtype)
    _check(x, weight, left, right, bias, lora_A, lora_B, dropout, exact_fraction)
    seed = draw_seed(x.device) if dropout > 0.0 and lora_A is not None else None
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    call = torch.ops.loge_kernels.linear if torch.compiler.is_compiling() else _Linear.apply
    y, _ = call(
        rows,
        weight,
        left,
        right,
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


def _warn_when_stale(factors: Factors, weight: Tensor) -> None:
    if factors.newly_stale(weight):
        warnings.warn(
            f"the weight has changed since its factors of rank {factors.rank} were computed: dX follows the old one; "
            "call factors.refresh(weight)",
            stacklevel=3,
        )


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation, out of reach of autocast: its operands are cast already, and its own products are
    to run in the dtypes it chose, also when backward is called inside an autocast block."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        device_type = arguments[0].device.type
        if not _autocasts(device_type):
            return implementation(*arguments)
        with torch.autocast(device_type, enabled=False):
            return implementation(*arguments)

    return run


def _check(
    x: Tensor,
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    dropout: float,
    exact_fraction: float,
) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; supported are float32, float16, bfloat16 and float64")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected two dimensions [N, K]")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be K = {K}, as in weight [{N}, {K}]")
    _same("weight", weight, x, (N, K))
    if bias is not None:
        _same("bias", bias, x, (N,))
    if left is not None and right is not None:
        R = right.shape[0] if right.dim() == 2 else 0
        _same("factors.left", left, x, (N, R))
        _same("factors.right", right, x, (R, K))
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B go together: give both or neither")
    if lora_A is not None and lora_B is not None:
        P = lora_A.shape[0] if lora_A.dim() == 2 else 0
        float32_too = x.dtype in (torch.float16, torch.bfloat16)
        _same("lora_A", lora_A, x, (P, K), float32_too)
        _same("lora_B", lora_B, x, (N, P), float32_too)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout!r} is not a probability in [0, 1)")
    if not 0.0 <= exact_fraction <= 1.0:
        raise ValueError(f"exact_fraction={exact_fraction!r} is not a share of the rows in [0, 1]")


def _same(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], float32_too: bool = False) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.dtype != x.dtype and not (float32_too and tensor.dtype == torch.float32):
        also = " or torch.float32" if float32_too else ""
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {x.dtype}{also}, for x is {x.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")


@_without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
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


def _forward_fake(
    x: Tensor, weight: Tensor, left: Any, right: Any, bias: Any, lora_A: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    xa = x.new_empty(0) if lora_A is None else x.new_empty(rows, lora_A.shape[0])
    return x.new_empty(rows, weight.shape[0]), xa


@_without_autocast
def _backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
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
    rows, N = dy.shape
    width = next(t for t in (right, weight, x, lora_A, dy) if t is not None).shape[1]
    return (
        dy.new_empty((rows, width) if need_dx else 0),
        dy.new_empty((N, width) if need_dweight else 0),
        dy.new_empty(N if need_dbias else 0),
        lora_A.new_empty(lora_A.shape) if need_dA and lora_A is not None else dy.new_empty(0),
        lora_B.new_empty(lora_B.shape) if need_dB and lora_B is not None else dy.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward reads and nothing else: x and xa where a gradient needs them, never a frozen weight that
    factors stand for."""
    x, weight, left, right, _, lora_A, lora_B, scaling, dropout, seed, exact_fraction, backend = inputs
    need = ctx.needs_input_grad
    need_dx, need_dweight, need_dA, need_dB = need[0], need[1], need[5], need[6]
    ctx.need = need_dx, need_dweight, need[4], need_dA, need_dB
    ctx.set_materialize_grads(False)
    reads_weight = need_dx and (left is None or exact_fraction > 0.0)
    ctx.save_for_backward(
        x if need_dweight or need_dA else None,
        output[1] if need_dB else None,
        weight if reads_weight else None,
        left if need_dx else None,
        right if need_dx else None,
        lora_A if need_dx or need_dA else None,
        lora_B if need_dx or need_dA or need_dB else None,
        seed,
    )
    ctx.constants = scaling, dropout, exact_fraction, backend


def _differentiate(ctx: Any, dy: Tensor | None, _dxa: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, xa, weight, left, right, lora_A, lora_B, seed = ctx.saved_tensors
    scaling, dropout, exact_fraction, backend = ctx.constants
    call: Any = torch.ops.loge_kernels.linear_backward if torch.compiler.is_compiling() else _backward
    results = call(
        dy, x, xa, weight, left, right, lora_A, lora_B, scaling, dropout, seed, exact_fraction, *ctx.need, backend
    )
    dx, dweight, dbias, dA, dB = (t if need else None for t, need in zip(results, ctx.need, strict=True))
    return dx, dweight, None, None, dbias, dA, dB, None, None, None, None, None


class _Linear(torch.autograd.Function):
    # forward takes ctx itself: a separate setup_context makes torch inspect the signature at every call, 50 us.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
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
