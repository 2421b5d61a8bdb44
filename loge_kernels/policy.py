"""What the frozen path's backward costs, and how many steps may be exact within a budget.

Costs are multiplications of the activation gradients, over those of the dense products of the same layers in 16 or 32
bits; a product in 8 bits counts half, as on GPUs that have them. With p the share of exact steps, l and e the cost of a
cheap and of an exact step,

    cost = p (e + l) + (1 - p) l = p e + l          with bias correction: an exact step runs the cheap pass too
    cost = p e + (1 - p) l                          without

averaged over many steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .eight_bit import why_not
from .factors import Factors

EIGHT_BIT_COST = 0.5
PREFERRED_DTYPES = ("float8", "int8")


@dataclass(frozen=True, slots=True)
class Policy:
    """When the frozen path is exact, as `apply` set it up.

    exact_every: one step in so many is exact (1: all, None: none).   exact_dtype: what exact products run in.
    correction: decay of the running mean of exact minus cheap gradient, or None.   cost: the average, as above.
    low_rank_dtype: what the products of factors run in.
    """

    exact_every: float | None
    exact_dtype: str | None
    correction: float | None
    cost: float
    low_rank_dtype: str | None = None

    def __str__(self) -> str:
        cheap = "" if self.low_rank_dtype is None else f"; low-rank products in {self.low_rank_dtype}"
        return self._exact_steps() + cheap

    def _exact_steps(self) -> str:
        inside = f" in {self.exact_dtype}" if self.exact_dtype is not None else ""
        if self.exact_every is None:
            return f"no exact steps; dense products{inside}" if inside else "no exact steps"
        if self.exact_every == 1.0:
            return f"every step exact{inside}"
        corrected = ", the steps between corrected by its running difference" if self.correction is not None else ""
        return f"one step in {self.exact_every:.3g} exact{inside}{corrected}"


def preferred_exact_dtype(weight: Tensor) -> str | None:
    """The 8-bit dtype for exact products with weights like this one on its device: float8 on GPUs that multiply it,
    int8 on other GPUs and on CPUs, None where neither runs (float64)."""
    if weight.dtype == torch.float64:
        return None
    N, K = weight.shape
    names = PREFERRED_DTYPES if weight.is_cuda else PREFERRED_DTYPES[::-1]
    return next((name for name in names if why_not(name, weight.device, N, K) is None), None)


def dense_cost(weight: Tensor, dtype: str | None) -> float:
    """Cost of the dense product with this weight: 1, or 1/2 where it runs in 8 bits."""
    if dtype is None or why_not(dtype, weight.device, *weight.shape) is not None:
        return 1.0
    return EIGHT_BIT_COST


def low_rank_cost(factors: Factors) -> float:
    """Cost of dX through these factors: `Factors.cost`, its products with left and right half where they run in 8 bits;
    those with residual rows never do."""
    if factors.low_rank_dtype is None or factors.eight_bit_obstacle() is not None:
        return factors.cost
    (N, R), K = factors.left.shape, factors.right.shape[1]
    return factors.cost - (1.0 - EIGHT_BIT_COST) * R * (N + K) / (N * K)


def average_cost(cheap: float, exact: float, exact_every: float | None, corrected: bool) -> float:
    """The formula of the module's docstring."""
    if exact_every is None:
        return cheap
    share = 1.0 / exact_every
    return exact if share == 1.0 else share * exact + (1.0 if corrected else 1.0 - share) * cheap


def exact_every_within(budget: float, cheap: float, exact: float, corrected: bool) -> float | None:
    """The most frequent exact steps whose average cost is at most `budget`: 1 when every step can be exact, None when
    none can. Raises ValueError when even the cheap steps cost more than `budget`."""
    if exact <= budget:
        return 1.0
    if cheap > budget:
        raise ValueError(
            f"budget={budget:g} is less than a step through the factors costs ({cheap:.3f} of the dense flops); give a "
            "smaller rank, or no rank and no subspace: the frozen path is dropped in cheap steps then"
        )
    share = (budget - cheap) / (exact if corrected else exact - cheap)
    # One exact step in a thousand teaches nothing and would cost a branch.
    return 1.0 / share if share > 1e-3 else None
