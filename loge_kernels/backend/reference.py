"""The backend that runs everywhere: forward and backward of the low-rank-gradient linear layer in PyTorch.

`naive` has the same formulae and nothing else; here are the orders, dtypes and copies that make them fast.

Convention of `torch.nn.Linear`, with a LoRA adapter as in PEFT:

    xa = drop(x) Aᵀ                                                         x  [M, K], A [P, K] -> xa [M, P]
    y  = x Wᵀ + b + s · xa Bᵀ                                               W  [N, K], B [N, P] -> y  [M, N]

The forward is exact. The backward sends the activation gradient of the frozen weight through `W ≈ left · right`
(left [N, R], right [R, K]); the adapter's own path and every parameter gradient stay exact:

    T  = dY [left | s·B]                                                    [M, R + P]: dY is read once for both
    dX = T [right ; A]                                                      = dY·left·right + s·(dY B) A
    dA = (s · dY B)ᵀ drop(x)
    dB = s · dYᵀ xa
    dW = dYᵀ x,   db = Σ_m dY

With dropout the adapter's part of dX passes through the mask, `dX = T_R right + drop(T_P A)`. Without factors the
frozen part is the dense `dY W`; with `exact_fraction` it is dense for the rows of largest ‖dY‖ and low-rank for the
others. Exact products take the adapter beside the weight or merged into it, whichever is cheaper (`merging`). Dense
products run in 8 bits or 4 where the problem carries such a copy of W (`eight_bit`, `four_bit`); where W is kept in 8
bits alone, the forward does too. Those with left and right run in 8 bits where these come so, apart from the adapter's,
and T is in dY's dtype between them. Factors with a residual on rows J of W add `dY[:, J] · residual` (`add_residual`).

Source: LoGE, Zhang et al., Applied Sciences 2025, 15(1), 82, section 4; LoRA, arXiv 2106.09685; the residual rows,
CE-LoRA, arXiv 2502.01378.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import eight_bit, four_bit
from ..numerics.dropout import drop
from ..numerics.eight_bit import from_bits
from ..numerics.matmul import add, add_matmul, matmul
from ..numerics.merging import merged, merging_pays
from ..numerics.rotation import block_of, rotate
from .problem import BackwardProblem, Gradients, Operands, Prepared

_NOTHING = Prepared()


def forward(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and xa [M, P] (None without an adapter), both in x's dtype; shapes as in the module's docstring."""
    o = operands
    x, weight, A, B = o.x, o.weight, o.lora_A, o.lora_B
    assert x is not None
    if weight is None:
        y = _forward_in_eight_bits(o)
        if o.bias is not None:
            y = add(y, o.bias)
        return (y, None) if A is None else add_adapter(y, o)
    if A is not None and B is not None and o.dropout == 0.0 and merging_pays(x.shape[0], x.shape[1], x.dtype):
        A = A.to(x.dtype)
        y = matmul(x, merged(weight, A, (o.scaling * B).to(x.dtype)).t())
        return y if o.bias is None else add(y, o.bias), matmul(x, A.t())
    y = matmul(x, weight.t())
    if o.bias is not None:
        y = add(y, o.bias)
    return (y, None) if A is None else add_adapter(y, o)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] in `dtype`, rotated where a weight in it is, and its row scales, float32 [M, 1]."""
    return eight_bit.quantize_rows(rotate(x, block_of(dtype, x.shape[1])), dtype)


def _forward_in_eight_bits(o: Operands) -> Tensor:
    """x Wᵀ [M, N] from both in 8 bits."""
    assert o.x is not None
    assert o.x_bits is not None
    assert o.x_scale is not None
    assert o.dense is not None
    assert o.weight_scale is not None
    q, weight = from_bits(o.x_bits), from_bits(o.dense)
    return eight_bit.multiply_quantized(q, o.x_scale, weight.t(), o.weight_scale.flatten(), o.x.dtype)


def add_adapter(y: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """y + s · xa Bᵀ [M, N] and xa [M, P]; y is used up. The products are taken in x's dtype; y may have another."""
    o = operands
    assert o.x is not None
    assert o.lora_B is not None
    dtype = o.x.dtype
    xa = adapter_input(o)
    scaled_B = _cast(o.scaling * o.lora_B, dtype).t()
    if y.dtype == dtype:
        return add_matmul(y, xa, scaled_B), xa
    return add(y, matmul(xa, scaled_B)), xa


def adapter_input(operands: Operands) -> Tensor:
    """xa = drop(x) Aᵀ [M, P] in x's dtype."""
    o = operands
    assert o.x is not None
    assert o.lora_A is not None
    return matmul(drop(o.x, o.seed, o.dropout), _cast(o.lora_A, o.x.dtype).t())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs 3 us where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def backward(problem: BackwardProblem, prepared: Prepared | None = None) -> Gradients:
    """The gradients that `problem` asks for, from what is `prepared` of them already; the formulae are in the module's
    docstring."""
    p, given = problem, prepared or _NOTHING
    gradients = Gradients(dB=given.dB, dbias=given.dbias)
    scaled_B = None if p.lora_B is None else _cast(p.scaling * p.lora_B, p.dy.dtype)
    lora_A = None if p.lora_A is None else _cast(p.lora_A, p.dy.dtype)

    low_rank = p.left is not None and p.need_dx
    projections = [p.left] if p.left is not None and low_rank and p.left_scale is None else []
    rank = sum(left.shape[1] for left in projections)
    merge = prepared is None and _merges(p)
    if scaled_B is not None and given.T_P is None and ((p.need_dx and not merge) or p.need_dA):
        projections.append(scaled_B)
    beside = projections[0] if len(projections) == 1 else torch.cat(projections, dim=1) if projections else None
    T = given.T_P if beside is None else matmul(p.dy, beside)  # [M, R + P]
    T_P = T if T is None or rank == 0 else T[:, rank:]  # [M, P]

    if p.need_dx and merge:
        assert p.weight is not None
        assert lora_A is not None
        assert scaled_B is not None
        gradients.dx = matmul(p.dy, merged(p.weight, lora_A, scaled_B))
    elif p.need_dx:
        gradients.dx = _input_gradient(p, T, T_P, lora_A, given)
    if p.need_dA:
        assert T_P is not None
        gradients.dA = adapter_gradient(p, T_P)
    if p.need_dB and gradients.dB is None:
        assert p.xa is not None
        assert p.lora_B is not None
        gradients.dB = matmul(p.dy.t(), p.xa, p.lora_B.dtype).mul_(p.scaling)
    add_weight_gradient(gradients, p)
    if p.need_dbias and gradients.dbias is None:
        gradients.dbias = p.dy.sum(0)
    return gradients


def adapter_gradient(p: BackwardProblem, T_P: Tensor) -> Tensor:
    """dA = T_Pᵀ drop(x) [P, K] in lora_A's dtype, with T_P = s · dY B [M, P]."""
    assert p.x is not None
    assert p.lora_A is not None
    return matmul(T_P.t(), drop(p.x, p.seed, p.dropout), p.lora_A.dtype)


def add_weight_gradient(gradients: Gradients, p: BackwardProblem) -> None:
    """dW = dYᵀ x [N, K], where it is wanted: a dense product of its own, whoever computes the rest."""
    if p.need_dweight:
        assert p.x is not None
        gradients.dweight = matmul(p.dy.t(), p.x)


def _merges(p: BackwardProblem) -> bool:
    """Whether an exact dX is cheaper through W + s B A (`merging`)."""
    if p.kind != "dense" or not p.need_dx or p.lora_A is None or p.lora_B is None:
        return False
    return p.dropout == 0.0 and merging_pays(p.dy.shape[0], p.dy.shape[1], p.dy.dtype)


def _input_gradient(
    p: BackwardProblem, T: Tensor | None, T_P: Tensor | None, lora_A: Tensor | None, given: Prepared
) -> Tensor:
    """dX [M, K]; T is dY [left | s·B] [M, R + P], without left where that is in 8 bits, and T_P its last P columns."""
    if p.kind == "dense" and lora_A is not None:
        assert T_P is not None
        assert p.weight is not None
        # The adapter's part first: it is written once, and the large product, which adds to it, hides that it is read.
        return add_matmul(drop(matmul(T_P, lora_A), p.seed, p.dropout), p.dy, p.weight)
    if given.q is not None:
        assert given.scale is not None
        assert p.dense is not None
        dx = eight_bit.multiply_quantized(given.q, given.scale, p.dense, p.dense_scale, p.dy.dtype)
        dx = rotate(dx, p.rotation).to(dx.dtype)
    elif p.right is None:
        dx = _dense(p, p.dy)
    elif p.left_scale is not None:
        dx = _low_rank_in_eight_bits(p)
    else:
        assert T is not None
        if lora_A is not None and p.dropout == 0.0 and p.kind == "low-rank":
            return matmul(T, torch.cat([p.right, lora_A]))
        dx = matmul(T[:, : p.right.shape[0]], p.right)
    if p.kind == "mixed":
        heaviest = heaviest_rows(p.dy, p.exact_fraction)
        dx[heaviest] = _dense(p, p.dy[heaviest])
    if lora_A is None:
        return dx
    assert T_P is not None
    if p.dropout > 0.0:
        dx += drop(matmul(T_P, lora_A), p.seed, p.dropout)
        return dx
    return add_matmul(dx, T_P, lora_A)


def _low_rank_in_eight_bits(p: BackwardProblem) -> Tensor:
    """dY · left · right [M, K], each product with both operands in 8 bits."""
    assert p.left is not None
    assert p.right is not None
    assert p.left_scale is not None
    assert p.right_scale is not None
    return eight_bit.multiply(eight_bit.multiply(p.dy, p.left, p.left_scale), p.right, p.right_scale)


def _dense(p: BackwardProblem, dy: Tensor) -> Tensor:
    """dY · W [., K] for some or all rows of the problem's dY [., N]."""
    if p.in_four_bits:
        assert p.dense is not None
        assert p.dense_scale is not None
        return four_bit.multiply(dy, p.dense, p.dense_scale, p.dense_whole)
    if p.dense is not None:
        dx = eight_bit.multiply(dy, p.dense, p.dense_scale, p.weight_scale)
        return rotate(dx, p.rotation).to(dx.dtype)
    assert p.weight is not None
    return matmul(dy, p.weight)


def add_residual(dx: Tensor, p: BackwardProblem) -> Tensor:
    """dX + dY[:, rows] · residual [M, K]; dX is used up, and its rows that are exact already stay as they are."""
    assert p.rows is not None
    assert p.residual is not None
    selected = p.dy.index_select(1, p.rows)  # [M, Q]
    if p.kind == "mixed":
        selected.index_fill_(0, heaviest_rows(p.dy, p.exact_fraction), 0.0)
    return add_matmul(dx, selected, p.residual)


def heaviest_rows(dy: Tensor, fraction: float) -> Tensor:
    """Indices [ceil(fraction · M)] of the rows of `dy` [M, N] with the largest norm, unsorted."""
    count = min(dy.shape[0], math.ceil(fraction * dy.shape[0]))
    norms = torch.linalg.vector_norm(dy, dim=1, dtype=torch.promote_types(dy.dtype, torch.float32))
    return torch.topk(norms, count, sorted=False).indices
