"""What a case's results are by `naive`, in float64 and in the case's own dtype.

Products in 8 bits are those of the rounded operands; where T = dY left is rounded again, dY and left are such that its
sums are exact in any order, so that what it is rounded to is the same for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import naive
from ..backend.reference import heaviest_rows
from ..numerics import eight_bit
from .cases import DROPOUT, EXACT_ROWS, LOW_RANK_DTYPE, SCALING, Case


def by_naive(case: Case, inputs: dict[str, Tensor], original: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the wanted gradients by `naive`, in the dtype of `inputs`; the heaviest rows, and what is rounded to 8
    bits, are those of the `original` operands, so that both precisions agree on them."""
    x, W, dy = inputs["x"], inputs["weight"], inputs["dy"]
    A, B = inputs.get("lora_A", x.new_empty(0, case.K)), inputs.get("lora_B", x.new_empty(case.N, 0))

    def drop(tensor: Tensor) -> Tensor:
        return torch.where(original["keep"], tensor / (1.0 - DROPOUT), 0.0) if case.dropout else tensor

    if case.mode in eight_bit.DTYPES or case.mode in LOW_RANK_DTYPE:
        frozen = _in_eight_bits(case, original, x.dtype)
    elif case.mode == "exact":
        frozen = dy @ W
    else:
        frozen = naive.low_rank(dy, inputs["left"], inputs["right"], inputs.get("rows"), inputs.get("residual"))
    if case.mode == "exact rows":
        heavy = heaviest_rows(original["dy"], EXACT_ROWS)
        frozen[heavy] = dy[heavy] @ W
    y = naive.forward(x, W, inputs.get("bias", x.new_zeros(1)), A, B, SCALING, drop)
    gradients = naive.backward(dy, x, frozen, A, B, SCALING, drop)
    return {"y": y, **{name: gradients[name] for name in case.wanted}}


def _in_eight_bits(case: Case, original: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The frozen path's part of x's gradient from rounded operands, multiplied in `dtype`."""
    name = LOW_RANK_DTYPE.get(case.mode, case.mode)

    def product(dy: Tensor, weight: Tensor) -> Tensor:
        return _rounded(dy, name, 1, dtype) @ _rounded(weight, name, 0, dtype)

    if case.mode not in LOW_RANK_DTYPE:
        return product(original["dy"], original["weight"])
    T = product(original["dy"], original["left"]).to(original["dy"].dtype)
    return product(T, original["right"])


def _rounded(matrix: Tensor, mode: str, dim: int, dtype: torch.dtype) -> Tensor:
    """`matrix` with every slice along `dim` rounded to 8 bits of its own scale, in `dtype`."""
    limit = 448.0 if mode == "float8" else 127.0
    scale = (matrix.float().abs().amax(dim, keepdim=True) * (1 / limit)).clamp_min(torch.finfo(torch.float32).tiny)
    steps = matrix.float() / scale
    steps = steps.to(torch.float8_e4m3fn) if mode == "float8" else steps.round()
    return steps.to(dtype) * scale.to(dtype)
