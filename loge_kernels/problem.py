"""The value objects that travel between the op and a backend: one backward problem in, its gradients out.

Names are those of `reference.py` and of the kernels: M tokens, N out features, K in features, R factor rank, P adapter
rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)  # not frozen: one is made at every call, and freezing costs 3 us of it
class BackwardProblem:
    """Everything a backend needs for one backward pass of `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`.

    All tensors are 2-D (biases, scales and indices excepted) on one device, with any strides. `dy`, `x`, `xa`,
    `weight`, `left`, `right` and `residual` share one dtype; `lora_A` and `lora_B` have that dtype or float32, and
    their gradients come back in theirs. `left` and `right` are both in 8 bits where they have scales. A tensor that
    the needed gradients do not read may be None.
    """

    dy: Tensor  # [M, N]
    x: Tensor | None  # [M, K]
    xa: Tensor | None  # [M, P], x Aᵀ as the forward left it (after dropout)
    weight: Tensor | None  # [N, K], only for the exact products, and not where dense stands for it
    left: Tensor | None  # [N, R]; None: the frozen path is the dense product with weight
    right: Tensor | None  # [R, K]
    lora_A: Tensor | None  # [P, K]
    lora_B: Tensor | None  # [N, P]
    scaling: float
    dropout: float  # probability of the adapter's input dropout; 0: none
    seed: Tensor | None  # int64 [2] (seed, offset) on dy's device; with dropout only
    exact_fraction: float  # share of the rows, heaviest first, whose frozen path is dense
    need_dx: bool
    need_dweight: bool
    need_dbias: bool
    need_dA: bool
    need_dB: bool
    deterministic: bool  # no atomics: the same bits from run to run
    rows: Tensor | None = None  # int64 [Q], unique: rows of the weight that the factors' residual corrects
    residual: Tensor | None = None  # [Q, K]; `backends.run_backward` adds its part to every backend's dX
    dense: Tensor | None = None  # [N, K] in 8 bits: the weight's copy for the exact products
    dense_scale: Tensor | None = None  # float32 [K], with dense
    left_scale: Tensor | None = None  # float32 [R], with left in 8 bits
    right_scale: Tensor | None = None  # float32 [K], with right in 8 bits


@dataclass(slots=True)
class Gradients:
    """What a backend returns; None where the problem did not ask."""

    dx: Tensor | None = None  # [M, K]
    dweight: Tensor | None = None  # [N, K]
    dbias: Tensor | None = None  # [N]
    dA: Tensor | None = None  # [P, K]
    dB: Tensor | None = None  # [N, P]
