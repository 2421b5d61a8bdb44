"""Low-rank factors of a frozen weight: what stands for W in the activation gradient, and how it is computed.

    left [N, R], right [R, K],   W ≈ left · right
    and, on request, rows [Q], residual [Q, K]:   W[rows] = left[rows] · right + residual

"svd" is the truncated singular value decomposition, left = U_r and right = S_r V_rᵀ (Zhang et al., Applied Sciences
2025, 15(1), 82, section 4.1): full for small weights, randomised subspace iteration for large ones (Halko, Martinsson
and Tropp, SIAM Review 2011, algorithm 4.4). "gradient" projects onto the subspace that keeps most of E‖dY W‖² for a
given C = E[dYᵀ dY]. The residual makes the rows that the factors miss most exact (CE-LoRA, arXiv 2502.01378).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..numerics.autocast import without_autocast
from ..numerics.decompositions import gradient_directions, share, symmetric_root, truncated_svd
from ..numerics.eight_bit import EightBitWeight, announce, refuse_float64, why_not
from ..numerics.version import WeightVersion

# left = W rightᵀ with orthonormal rows of right, which calibration chose: a changed weight needs a new left alone.
PROJECTIONS = ("gradient", "salience")
SUBSPACES = ("svd", *PROJECTIONS)
METHODS = SUBSPACES[:2]  # of `factorize`

RANK_STEP = 16  # tensor-core tiles: ranks given as a fraction are rounded to a multiple of this


class Factors:
    """A rank-R stand-in `left @ right` for a weight [N, K].

    No module and no parameters: `left` [N, R] and `right` [R, K] follow from the weight, so no optimizer, state dict or
    broadcast holds them. The layer that holds the factors moves them with itself. `rank` is R; `method` says how they
    were computed; `energy` is the captured share ‖left·right‖² / ‖W‖² in [0, 1] (for "gradient", of E‖dY W‖²). `rows`
    int64 [Q], ascending, and `residual` [Q, K] are None without a residual (`with_residual`). `low_rank_dtype`: what
    the products with left and right run in, "float8", "int8" (`eight_bit`) or None for x's own dtype; the 8-bit copies
    take half as much memory again, are made at their first use and anew whenever left and right have changed.
    """

    gathered_apart = False  # by FSDP, for the backwards alone that do not have the weight
    gather: Callable[[], None] | None = None  # brings sharded factors to a forward that casts them

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        method: str = "given",
        energy: float = math.nan,
        rows: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(
                f"left has shape {tuple(left.shape)} and right {tuple(right.shape)}; expected [N, R] and [R, K]"
            )
        _check_residual(left, right, rows, residual)
        self.left, self.right = left.detach(), right.detach()
        self.rows = rows
        self.residual = None if residual is None else residual.detach()
        self.importance: Tensor | None = None  # [N], by which the rows were chosen
        self.left_copy: EightBitWeight | None = None
        self.right_copy: EightBitWeight | None = None
        self.method = method
        self.energy = energy
        self.made_of = WeightVersion()
        self._warned = False

    @classmethod
    def to_come(cls, weight: Tensor, rank: int, rows: int = 0) -> Factors:
        """Factors "svd" of a weight [N, K] on the meta device, as Accelerate's `cpu_ram_efficient_loading` leaves it on
        all ranks but one: `refresh` gives them values once the weight has some."""
        (N, K), like = weight.shape, weight.detach()
        kept = (like.new_empty(rows, dtype=torch.int64), like.new_empty(rows, K)) if rows else (None, None)
        return cls(like.new_empty(N, rank), like.new_empty(rank, K), "svd", math.nan, *kept)

    @property
    def without_values(self) -> bool:
        """Whether they are on the meta device: `to_come`, or moved there with their layer."""
        return self.left.is_meta

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """left, right, and the residual if there is one."""
        return [self.left, self.right] + ([] if self.residual is None else [self.residual])

    @property
    def low_rank_dtype(self) -> str | None:
        return None if self.left_copy is None else self.left_copy.dtype

    @low_rank_dtype.setter
    def low_rank_dtype(self, name: str | None) -> None:
        if name != self.low_rank_dtype:
            self.left_copy = None if name is None else EightBitWeight(name, "low_rank_dtype")
            self.right_copy = None if name is None else EightBitWeight(name, "low_rank_dtype")

    def why_not_eight_bits(self) -> str | None:
        """Why the products cannot run in `low_rank_dtype`, or None; without one there are none."""
        for name in ("left", "right"):
            factor = getattr(self, name)
            reason = None if self.low_rank_dtype is None else why_not(self.low_rank_dtype, factor.device, *factor.shape)
            if reason is not None:
                return f"of {name}, {reason}"
        return None

    def in_eight_bits(self, x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """The 8-bit copies of left and of right with their scales, for the backward of a product with `x`; None where
        they are not to be read, or cannot run, which the logger says once. Raises TypeError for x in float64."""
        if self.left_copy is None or self.right_copy is None:
            return None
        refuse_float64("low_rank_dtype", self.left_copy.dtype, x.dtype)
        if self.rank == 0 or not (x.requires_grad and torch.is_grad_enabled()):
            return None
        reason = self.why_not_eight_bits()
        if reason is None:
            return [self.left_copy.current(self.left), self.right_copy.current(self.right)]
        if not torch.compiler.is_compiling():
            announce("low_rank_dtype", self.left_copy.dtype, reason, x.dtype)
        return None

    @property
    def cost(self) -> float:
        """Multiplications of dX through these factors, over those of the dense product."""
        (N, R), K = self.left.shape, self.right.shape[1]
        return (R * (N + K) + (0 if self.rows is None else self.rows.shape[0] * K)) / (N * K)

    def __repr__(self) -> str:
        rows = "" if self.rows is None else f"{self.rows.shape[0]} exact rows, "
        size = f"{self.left.shape[0]}x{self.right.shape[1]}, rank={self.rank}"
        return f"Factors({size}, {rows}{self.method}, energy={self.energy:.3f})"

    @torch.no_grad()
    @without_autocast
    def with_residual(self, weight: Tensor, count: int, importance: Tensor | None = None) -> Factors:
        """Factors with the same `left` and `right` that stand for `count` rows of `weight` [N, K] exactly.

        Chosen are the rows with the largest importance[n] · ‖W[n] - left[n] right‖², where `importance` [N] is E dY_n²
        from calibration (None: ones). `energy` grows by the share of the missing part, so weighted, that these rows
        carry. The new factors are bound to `weight`, and choose again whenever they are computed anew.

        Raises ValueError for a count outside 1..N and for another shape of weight or importance.

        Source: CE-LoRA, arXiv 2502.01378.
        """
        N, K = self.left.shape[0], self.right.shape[1]
        if weight.shape != (N, K):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {(N, K)}, as the factors")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= N:
            raise ValueError(f"count={count!r} is no number of rows of a weight [{N}, {K}]; give 1 to {N}")
        if importance is not None and importance.shape != (N,):
            raise ValueError(f"importance has shape {tuple(importance.shape)}; expected ({N},), one number a row")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        missing = torch.addmm(weight.detach().to(dtype), self.left.to(dtype), self.right.to(dtype), alpha=-1.0)
        scores = missing.square().sum(1)
        if importance is not None:
            scores *= importance.to(scores)
        rows = torch.topk(scores, count).indices.sort().values
        total = scores.sum()
        carried = torch.where(total > 0, scores[rows].sum() / total, 0.0).clamp_max(1.0).item()
        energy = 1.0 - (1.0 - self.energy) * (1.0 - carried)
        residual = missing[rows].to(self.left.dtype)
        made = Factors(self.left, self.right, self.method, energy, rows, residual)
        made.importance = importance
        made.low_rank_dtype = self.low_rank_dtype
        return made.bind(weight)

    def bind(self, weight: Tensor) -> Factors:
        """Remember that these factors are of `weight` as it is now."""
        self.made_of.bind(weight)
        self._warned = False
        return self

    def newly_stale(self, weight: Tensor) -> bool:
        """True at the first call that finds `weight` changed in place, or declared changed.

        Another tensor than the one these factors were computed from (a cast, a copy) is taken at the caller's word.
        """
        if self._warned or self.made_of.is_other(weight) or not self.made_of.changed(weight):
            return False
        self._warned = True
        return True

    def refresh(self, weight: Tensor, covariance: Tensor | None = None) -> None:
        """Recompute the factors from `weight` [N, K] with the same method and rank, in place.

        `covariance` as in `factorize`, for "gradient"; its diagonal then is the importance of the residual's rows.
        Without it a subspace that came from gradients stays what it is, and the weight is projected onto it anew.
        Raises ValueError for factors that were given by hand.
        """
        if not self.follows_from_weight:
            raise ValueError("these factors were given by hand: make new ones from the weight as it is now")
        if self.method in PROJECTIONS and covariance is None:
            fresh = projection(weight, self.right, self.method, self.energy)
        else:
            fresh = factorize(weight, self.rank, self.method, covariance)
        if self.rows is not None and covariance is not None:
            fresh = fresh.with_residual(weight, self.rows.shape[0], covariance.diagonal())
        self.take_values(fresh, weight)

    def take_values(self, fresh: Factors, weight: Tensor) -> None:
        """Take over the values of `fresh`, factors of `weight`. Where these factors have a residual and `fresh` has
        none, as many rows are chosen for it by the same importance."""
        if self.rows is not None and fresh.rows is None:
            fresh = fresh.with_residual(weight, self.rows.shape[0], self.importance)
        self.left, self.right = fresh.left, fresh.right
        self.rows, self.residual = fresh.rows, fresh.residual
        self.importance, self.energy = fresh.importance, fresh.energy
        self.bind(weight)

    @property
    def follows_from_weight(self) -> bool:
        """Whether the weight is enough to recompute these factors: not for those given by hand."""
        return self.method in SUBSPACES

    def apply_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor as `torch.nn.Module._apply` changes parameters: a move, a cast, shared memory."""
        if self.without_values:
            return
        self.left, self.right = fn(self.left), fn(self.right)
        self.rows = None if self.rows is None else fn(self.rows)
        self.residual = None if self.residual is None else fn(self.residual)


def as_buffers(*tensors: Tensor | None) -> None:
    """Mark tensors that a layer owns as `torch.nn.Buffer` does: what moves saved activations elsewhere, such as the
    `OffloadActivations` of TRL and torchtune, leaves buffers where they are."""
    for tensor in tensors:
        if tensor is not None:
            tensor._is_buffer = True  # type: ignore[attr-defined]


def resolve_rank(rank: int | float, N: int, K: int, argument: str = "rank") -> int:
    """The rank for a weight [N, K]: an int as it is, a float in (0, 1] as that share of min(N, K), rounded to a
    multiple of 16, at least 16 and at most min(N, K); 1.0 is min(N, K) itself. Raises TypeError or
    ValueError naming `argument`."""
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"{argument}={rank!r} is a {type(rank).__name__}; give an int, or a float in (0, 1]")
    limit = min(N, K)
    if isinstance(rank, float):
        if not 0.0 < rank <= 1.0:
            raise ValueError(f"{argument}={rank!r} as a float is a share of min(N, K) and must lie in (0, 1]")
        if rank == 1.0:
            return limit
        return min(max(RANK_STEP, RANK_STEP * round(rank * limit / RANK_STEP)), limit)
    if not 1 <= rank <= limit:
        raise ValueError(f"{argument}={rank} does not fit a weight [{N}, {K}]; give 1 to {limit}, or a share in (0, 1]")
    return rank


@torch.no_grad()
@without_autocast
def factorize(weight: Tensor, rank: int | float, method: str = "svd", covariance: Tensor | None = None) -> Factors:
    """Rank-R factors of `weight` for the backward pass of `linear`.

    Args:
        weight: [N, K], a floating dtype, finite.
        rank: an int in 1..min(N, K), or a float in (0, 1] of min(N, K), rounded to a multiple of 16.
        method: "svd" (closest to the weight) or "gradient" (closest for the dY that `covariance` describes).
        covariance: [N, N], C = E[dYᵀ dY]; for "gradient" only.

    Returns:
        Factors in the weight's dtype and on its device, with the captured energy. The decomposition itself runs in
        float32 (float64 for a float64 weight).

    Raises:
        ValueError, TypeError: with the argument, its value and what would work; a weight that is not finite too.
    """
    _check(weight, method, covariance)
    N, K = weight.shape
    R = resolve_rank(rank, N, K)
    W = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if method == "svd":
        left, right, energy = truncated_svd(W, R)
        factors = Factors(left.to(weight.dtype).contiguous(), right.to(weight.dtype).contiguous(), method, energy)
        return factors.bind(weight)
    assert covariance is not None
    right, shares = gradient_directions(symmetric_root(covariance.to(W)) @ W, R)
    return projection(weight, right, method, min(1.0, shares.sum().item()))


@torch.no_grad()
@without_autocast
def projection(weight: Tensor, right: Tensor, method: str, energy: float | None = None) -> Factors:
    """The factors W rightᵀ · right of `weight` [N, K] for orthonormal rows `right` [R, K], in the weight's dtype and
    bound to it. `energy` None: the captured share of ‖W‖²."""
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    right = right.to(W)
    left = W @ right.t()
    if energy is None:
        energy = share(left, W)
    factors = Factors(left.to(weight.dtype), right.to(weight.dtype).contiguous(), method, energy)
    return factors.bind(weight)


def _check(weight: Tensor, method: str, covariance: Tensor | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(map(repr, METHODS))}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected a non-empty matrix [N, K]")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight has dtype {weight.dtype}; expected a floating dtype (dequantise it first)")
    if not torch.isfinite(weight).all():
        raise ValueError("weight contains NaN or inf; it has no factors")
    if (covariance is not None) != (method == "gradient"):
        raise ValueError(
            f"covariance is {'given' if covariance is not None else 'missing'} with method={method!r}; "
            "it goes with method='gradient', and only there"
        )
    if covariance is not None:
        N = weight.shape[0]
        if covariance.shape != (N, N):
            raise ValueError(f"covariance has shape {tuple(covariance.shape)}; expected ({N}, {N}) for this weight")
        if not torch.isfinite(covariance).all():
            raise ValueError("covariance contains NaN or inf")


def _check_residual(left: Tensor, right: Tensor, rows: Tensor | None, residual: Tensor | None) -> None:
    if rows is None and residual is None:
        return
    if rows is None or residual is None:
        raise ValueError("rows and residual go together: give both or neither")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; expected torch.int64 [Q]")
    if residual.shape != (rows.shape[0], right.shape[1]):
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(rows.shape[0], right.shape[1])}")
    N = left.shape[0]
    if rows.numel() and not rows.is_meta and (rows[0] < 0 or rows[-1] >= N or (rows.diff() <= 0).any()):
        raise ValueError(f"rows must ascend, without repeats, within 0..{N - 1}")
