"""The correctness gate: no figure is printed for a candidate whose results are wrong.

Every result is compared with its formula in float64 on the same operands, by the rule of `check.accuracy`. The
yardstick is the same formula in plain PyTorch at the candidate's precision, product by product with each intermediate
rounded to the dtype (16-bit products accumulate in float32). dA and dB are compared in full; y and dX on as many rows,
spread evenly with the first and last among them, as `_FLOPS` allows, and every element of them must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loge_kernels.check.accuracy import Verdict, judge
from loge_kernels.numerics import eight_bit

from .operands import Operands

# Float64 work per checked result: about a second of it on two CPU cores, a fraction of one on a data-centre GPU.
_FLOPS = {"cpu": 2e10, "cuda": 2e13}
_BLOCK = 1 << 24  # elements of one operand held in float64 at a time


class Gate:
    """The expected results for one set of operands, each computed when first asked for."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._expected: dict[tuple[str, int | None, str | None], tuple[Tensor, Tensor, Tensor | None]] = {}

    def check(
        self, results: dict[str, Tensor], rank: int | None, adapter: bool = True, eight_bits: str | None = None
    ) -> dict[str, Verdict]:
        """A verdict per result ("y", "dx", "dA", "dB"); `rank` None: the exact formula; no `adapter`: x Wᵀ, dY W;
        `eight_bits`: dY W of operands that are rounded to these."""
        return {name: self._verdict(name, value, rank, adapter, eight_bits) for name, value in results.items()}

    @torch.no_grad()
    def _verdict(self, name: str, value: Tensor, rank: int | None, adapter: bool, eight_bits: str | None) -> Verdict:
        own = (rank, eight_bits) if name == "dx" else (None, None)
        key = (f"{name}, product alone" if not adapter else name, *own)
        if key not in self._expected:
            self._expected[key] = self._expect(name, rank, adapter, eight_bits)
        exact, yardstick, rows = self._expected[key]
        if tuple(value.shape) != self._operands.shape_of(name) or not torch.isfinite(value).all():
            return Verdict(False, float("inf"))
        return judge(value if rows is None else value[rows], yardstick, exact)

    def _expect(
        self, name: str, rank: int | None, adapter: bool, eight_bits: str | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        o = self._operands
        if name == "dA":
            return _product64(o.dy, o.lora_B, o.x) * o.scaling, _rounded(_rounded(o.dy, o.scaled_B).t(), o.x), None
        if name == "dB":
            # (dYᵀ x) Aᵀ would be dense: (x Aᵀ)ᵀ dY, transposed.
            exact = (_product64(o.x, o.lora_A.t(), o.dy) * o.scaling).t()
            xa = _rounded(o.x, o.lora_A.t())
            return exact, (_rounded(o.dy.t(), xa) * o.scaling).to(o.dtype), None
        M = o.dy.shape[0]
        width = o.weight.numel() if name == "y" or rank is None else rank * sum(o.weight.shape)
        count = max(2, min(M, int(_FLOPS[o.dy.device.type] / (2 * width))))
        rows = torch.linspace(0, M - 1, count, device=o.dy.device).round().long().unique()
        if name == "y":
            x = o.x[rows]
            exact, yardstick = x.double() @ o.weight.double().t(), _rounded(x, o.weight.t())
            if adapter:
                exact += o.scaling * (x.double() @ o.lora_A.double().t()) @ o.lora_B.double().t()
                yardstick = yardstick + _rounded(_rounded(x, o.lora_A.t()), o.scaled_B.t())
            return exact, yardstick, rows
        dy = o.dy[rows]
        if eight_bits is not None:
            exact, yardstick = _in_eight_bits(dy, o.weight, eight_bit.DTYPES[eight_bits])
        elif rank is None:
            exact, yardstick = dy.double() @ o.weight.double(), _rounded(dy, o.weight)
        else:
            left, right = o.factors[rank].left, o.factors[rank].right
            exact = (dy.double() @ left.double()) @ right.double()
            yardstick = _rounded(_rounded(dy, left), right)
        if adapter:
            exact += o.scaling * (dy.double() @ o.lora_B.double()) @ o.lora_A.double()
            yardstick = yardstick + _rounded(_rounded(dy, o.scaled_B), o.lora_A)
        return exact, yardstick, rows


def _product64(streamed: Tensor, small: Tensor, second: Tensor) -> Tensor:
    """(streamed @ small)ᵀ @ second in float64, over blocks of the rows that streamed [M, ·] and second [M, ·] share."""
    small = small.double()
    total = torch.zeros(small.shape[1], second.shape[1], dtype=torch.float64, device=second.device)
    step = max(1, _BLOCK // max(streamed.shape[1], second.shape[1]))
    for row in range(0, streamed.shape[0], step):
        block = streamed[row : row + step].double() @ small
        total += block.t() @ second[row : row + step].double()
    return total


def _in_eight_bits(dy: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dY W of operands rounded to 8 bits, in float64 and, summed in float32, in dY's dtype."""
    (q, scale), (copy, scales) = eight_bit.quantize_rows(dy, dtype), eight_bit.quantize_columns(weight, dtype)
    exact = (q.double() * scale) @ (copy.double() * scales)
    return exact, (((q.float() @ copy.float()) * scale) * scales).to(dy.dtype)


def _rounded(a: Tensor, b: Tensor) -> Tensor:
    """a @ b rounded to a's dtype; 16-bit operands are multiplied in float32, as matrix instructions accumulate."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return (a.float() @ b.to(a.dtype).float()).to(a.dtype)
    return a @ b.to(a.dtype)
