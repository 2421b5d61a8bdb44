"""The adapter between a backward problem and the Triton kernels, which know nothing of this package."""

from __future__ import annotations

from torch import Tensor

from .. import triton_kernels as kernels
from .problem import BackwardProblem, Gradients, Operands
from .reference import add_weight_gradient


def why_not_here() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    return kernels.why_not_here()


def why_not(p: BackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if p.kind == "mixed":
        return "exact_fraction needs dense products, which PyTorch computes"
    if p.left_scale is not None:
        return "the low-rank product is in 8 bits, which PyTorch computes"
    return kernels.why_not(
        dtype=p.dy.dtype,
        device=p.dy.device,
        R=0 if p.left is None else p.left.shape[1],
        P=0 if p.lora_B is None else p.lora_B.shape[1],
        need_dx=p.need_dx,
        lora_dtype=None if p.lora_B is None else p.lora_B.dtype,
    )


def backward(p: BackwardProblem) -> Gradients:
    """All gradients but dW, which is a dense product of its own, from one launch or two."""
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


def why_not_auto(p: BackwardProblem) -> str | None:
    """The cost model's reason to prefer the PyTorch composition for this problem, or None."""
    if p.left is None or p.right is None:
        return "without factors dX is a dense product"
    if p.right.shape[0] == 0:
        return "the frozen path is dropped: rank 0"
    if not p.need_dx:
        return "without dX there is no chain to fuse"
    M, N = p.dy.shape
    R, K = p.right.shape
    P = 0 if p.lora_B is None else p.lora_B.shape[1]
    flags = kernels.Flags(p.need_dx, p.need_dA, p.need_dB, p.need_dbias, p.dropout > 0.0, p.deterministic)
    choice = kernels.explain(M, N, K, R, P, p.dy.dtype, p.dy.device, flags).choice
    return "PyTorch's products are predicted to be faster" if choice == "torch" else None


def why_not_forward(operands: Operands) -> str | None:
    """Why the fused forward cannot run these operands, or None."""
    x, lora_A = operands.x, operands.lora_A
    if x is None or lora_A is None:
        return "without an adapter the forward is one dense product"
    if x.numel() == 0:
        return "nothing to compute"
    return kernels.why_not(
        dtype=x.dtype, device=x.device, R=0, P=lora_A.shape[0], need_dx=False, lora_dtype=lora_A.dtype
    )


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
