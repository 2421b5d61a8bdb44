"""The adapter between a backward problem and the Triton kernels, which know nothing of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import triton_kernels as kernels
from ..numerics.eight_bit import FAST_ACCUMULATION, from_bits
from ..numerics.rotation import block_of
from . import reference
from .problem import BackwardProblem, Gradients, Operands, Prepared
from .reference import add_weight_gradient

_TILE = 16  # of 8-bit products on a GPU
# Kinds of problem that were found to run here. To find it out takes as long as the rest of a call on the host; a reason
# against a kind is found anew at every call.
_able: set[tuple[Any, ...]] = set()


def why_not_here() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    return kernels.why_not_here()


def why_not(p: BackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if p.need_dx and p.kind.startswith("dense"):
        return _why_not_exact(p)
    if p.kind == "mixed":
        return "exact_fraction needs dense products, which PyTorch computes"
    if p.left_scale is not None:
        return "the low-rank product is in 8 bits, which PyTorch computes"
    P, lora_dtype = _adapter(p)
    R = 0 if p.left is None else p.left.shape[1]
    kind = {"dtype": p.dy.dtype, "device": p.dy.device, "R": R, "P": P, "need_dx": p.need_dx, "lora_dtype": lora_dtype}
    return _asked_once(kernels.why_not, **kind)


def _adapter(p: BackwardProblem) -> tuple[int, torch.dtype | None]:
    """Its rank, 0 without one, and its dtype."""
    return (0, None) if p.lora_B is None else (p.lora_B.shape[1], p.lora_B.dtype)


def _asked_once(ask: Callable[..., str | None], **kind: Any) -> str | None:
    """What `ask` says of problems of this kind."""
    key = (ask, *kind.values())
    if key in _able:
        return None
    reason = ask(**kind)
    if reason is None:
        _able.add(key)
    return reason


def backward(p: BackwardProblem) -> Gradients:
    """All gradients but dW, which is a dense product of its own, from one launch or two; of an exact layer from two or
    three."""
    if p.need_dx and p.kind.startswith("dense"):
        return exact_backward(p, "fused")
    dx, dA, dB, dbias = kernels.backward(
        p.dy,
        p.x,
        p.xa,
        p.left,
        p.right,
        p.lora_A,
        p.lora_B,
        p.scaling,
        dropout=p.dropout,
        seed=p.seed,
        need_dx=p.need_dx,
        need_dA=p.need_dA,
        need_dB=p.need_dB,
        need_dbias=p.need_dbias,
        deterministic=p.deterministic,
    )
    gradients = Gradients(dx=dx, dbias=dbias, dA=dA, dB=dB)
    add_weight_gradient(gradients, p)
    return gradients


def _why_not_exact(p: BackwardProblem) -> str | None:
    if p.in_four_bits:
        return "the exact product is in 4 bits, which PyTorch computes"
    if p.dense is not None and (p.dense.shape[0] % _TILE or p.dense.shape[1] % _TILE) and p.dy.is_cuda:
        return f"N and K must be multiples of {_TILE} in 8 bits"
    if p.dy.numel() == 0:
        return "nothing to compute"
    P, lora_dtype = _adapter(p)
    eight_bits = None if p.dense is None else p.dense.dtype
    kind = {"dtype": p.dy.dtype, "device": p.dy.device, "P": P, "eight_bits": eight_bits, "lora_dtype": lora_dtype}
    return _asked_once(kernels.why_not_exact, **kind)


def exact_backward(p: BackwardProblem, form: kernels.ExactForm) -> Gradients:
    """All gradients of a dense frozen path. dY is read once for s·dY B, dB and db, and once more for 8 bits; then dX
    and dA by one kernel ("fused"), which writes dX once, or by PyTorch's products ("prepared"). Of int8 on Hopper dA is
    PyTorch's in both."""
    eight_bits = None if p.dense is None else p.dense.dtype
    adapter = p.lora_B is not None
    fused = form == "fused" and kernels.fuses(p.dy.dtype)
    takes_dA = fused and p.need_dA and kernels.takes_dA(eight_bits, p.dropout, p.dy.device)
    sums_dA = takes_dA and p.lora_A is not None and not p.deterministic
    prepared = kernels.prepare(
        p.dy,
        p.xa,
        p.lora_B,
        p.scaling,
        need_t=adapter,
        need_dB=p.need_dB,
        need_dbias=p.need_dbias,
        eight_bits=eight_bits,
        column_scale=None if p.weight_scale is None else p.weight_scale.flatten(),
        zeros=p.lora_A.numel() if sums_dA and p.lora_A is not None else 0,
        deterministic=p.deterministic,
    )
    if not fused:
        T_P = None if prepared.t is None else prepared.t.to(p.dy.dtype)
        scale = None if prepared.scale is None else prepared.scale[:, None]
        return reference.backward(p, Prepared(T_P, prepared.dB, prepared.dbias, prepared.q, scale))
    weight = p.weight if p.dense is None else p.dense
    assert weight is not None
    dx, dA = kernels.product(
        p.dy if prepared.q is None else prepared.q,
        weight,
        t=prepared.t,
        lora_A=p.lora_A,
        x=p.x if takes_dA else None,
        dy_scale=prepared.scale,
        weight_scale=p.dense_scale,
        dtype=p.dy.dtype,
        dropout=p.dropout,
        seed=p.seed,
        zeros=prepared.zeros,
        rotation=p.rotation,
        fast_accumulation=FAST_ACCUMULATION,
        deterministic=p.deterministic,
    )
    if p.need_dA and not takes_dA:
        assert prepared.t is not None
        dA = reference.adapter_gradient(p, prepared.t.to(p.dy.dtype))
    gradients = Gradients(dx=dx, dbias=prepared.dbias, dA=dA, dB=prepared.dB)
    add_weight_gradient(gradients, p)
    return gradients


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] in `dtype`, rotated where a weight in it is, and its row scales, float32 [M, 1]."""
    q, scale = kernels.quantize(x, dtype, block_of(dtype, x.shape[1]))
    return q, scale[:, None]


def why_not_eight_bits(o: Operands) -> str | None:
    """Why `forward_in_eight_bits` cannot run these operands, or None."""
    x, dense = o.x, o.dense
    assert x is not None
    assert dense is not None
    if (dense.shape[0] % _TILE or dense.shape[1] % _TILE) and x.is_cuda:
        return f"N and K must be multiples of {_TILE} in 8 bits"
    if x.numel() == 0:
        return "nothing to compute"
    if not kernels.fuses(x.dtype):
        return "float32 products are PyTorch's"
    P, lora_dtype = (0, None) if o.lora_B is None else (o.lora_B.shape[1], o.lora_B.dtype)
    kind = {"dtype": x.dtype, "device": x.device, "P": P, "eight_bits": from_bits(dense).dtype}
    return _asked_once(kernels.why_not_exact, **kind, lora_dtype=lora_dtype)


def forward_in_eight_bits(o: Operands) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and xa [M, P] (None without an adapter): one product that adds the adapter's part as it writes y."""
    assert o.x is not None
    assert o.x_bits is not None
    assert o.x_scale is not None
    assert o.dense is not None
    assert o.weight_scale is not None
    xa = None if o.lora_A is None else reference.adapter_input(o)
    y, _ = kernels.product(
        from_bits(o.x_bits),
        from_bits(o.dense).t(),
        t=None if xa is None else o.scaling * xa.float(),
        lora_A=None if o.lora_B is None else o.lora_B.t(),
        dy_scale=o.x_scale.flatten(),
        weight_scale=o.weight_scale.flatten(),
        dtype=o.x.dtype,
        fast_accumulation=FAST_ACCUMULATION,
    )
    return (y if o.bias is None else reference.add(y, o.bias)), xa


def eight_bits_win(o: Operands) -> bool:
    """Whether the cost model predicts that forward to beat PyTorch's product with the adapter's beside it."""
    assert o.x is not None
    (N, K), M, dtype = o.sizes, o.x.shape[0], o.x.dtype
    P = 0 if o.lora_B is None else o.lora_B.shape[1]
    assert o.dense is not None
    flags = kernels.Flags(need_dx=True, need_dA=False, need_dB=False)
    eight_bits = from_bits(o.dense).dtype
    # What quantises is not part of it: it is the same for both.
    return kernels.choose_exact(M, K, N, P, dtype, eight_bits, o.x.device, flags, FAST_ACCUMULATION) == "fused"


def exact_form(p: BackwardProblem) -> kernels.ExactForm:
    """What the cost model predicts to be fastest for this problem, whose frozen path is dense: "torch" for PyTorch's
    composition."""
    M, N = p.dy.shape
    weight = p.weight if p.dense is None else p.dense
    assert weight is not None
    P, _ = _adapter(p)
    flags = kernels.Flags(p.need_dx, p.need_dA, p.need_dB, p.need_dbias, p.dropout > 0.0, p.deterministic)
    eight_bits = None if p.dense is None else p.dense.dtype
    return kernels.choose_exact(M, N, weight.shape[1], P, p.dy.dtype, eight_bits, p.dy.device, flags, FAST_ACCUMULATION)


def why_not_forward(operands: Operands) -> str | None:
    """Why the fused forward cannot run these operands, or None."""
    x, lora_A = operands.x, operands.lora_A
    if x is None or lora_A is None:
        return "without an adapter the forward is one dense product"
    if x.numel() == 0:
        return "nothing to compute"
    kind = {"dtype": x.dtype, "device": x.device, "R": 0, "P": lora_A.shape[0], "need_dx": False}
    return _asked_once(kernels.why_not, **kind, lora_dtype=lora_A.dtype)


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """y [M, N] and xa [M, P] in one launch that reads x once."""
    o = operands
    y, xa = kernels.forward(o.x, o.weight, o.bias, o.lora_A, o.lora_B, o.scaling, dropout=o.dropout, seed=o.seed)
    return y, xa


def forward_wins(operands: Operands) -> bool:
    """Whether the cost model predicts the fused forward to beat cuBLAS's three products."""
    x, weight, lora_A = operands.x, operands.weight, operands.lora_A
    assert x is not None
    assert weight is not None
    assert lora_A is not None
    N, K = weight.shape
    return kernels.forward_wins(x.shape[0], N, K, lora_A.shape[0], x.dtype, x.device, operands.dropout > 0.0)
