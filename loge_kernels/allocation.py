"""Where a budget of activation-gradient flops is spent among the layers: arithmetic alone.

A rank of `None` is the exact product. Costs are shares of the dense products' multiplications, weighted by the layers'
sizes; the exact product of a layer may count less than 1 (8 bits).

For "energy" the directions of all layers up to their break-even rank are there at once, on the weights' devices and
only while `apply` runs: 4 · min(N, K, N K / (N + K)) · K bytes a layer, 32 MiB for a 4096² layer, 50 MiB for one of
14336 x 4096 and 174 MiB for one of 4096 x 14336; otherwise 4 R K bytes.

    "depth"    one share of min(N, K) for every layer, the one asked for or the largest that fits; what is left makes
               layers exact from the output downwards, as an error near the output reaches every layer below it
    "energy"   16 directions at a time, to the layer where they add the largest share of its E‖dX‖² per flop, times its
               depth (1 at the output, 1/L at the input)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .factors import RANK_STEP, resolve_rank

ALLOCATIONS = ("depth", "energy")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layer, in the model's order: weight [N, K], what its exact product costs (of 1), and for "energy" the worth
    of its directions (float64 [q], descending shares). `low_rank`: what a multiplication through its factors costs."""

    N: int
    K: int
    exact: float
    worth: Tensor | None = None
    low_rank: float = 1.0

    def cost(self, rank: int | None) -> float:
        """Share of this layer's dense multiplications."""
        return self.exact if rank is None else self.low_rank * rank * (self.N + self.K) / (self.N * self.K)


def average(candidates: Sequence[Candidate], ranks: Sequence[int | None]) -> float:
    """The cost of all layers, weighted by their sizes."""
    sizes = [c.N * c.K for c in candidates]
    return sum(s * c.cost(r) for s, c, r in zip(sizes, candidates, ranks, strict=True)) / sum(sizes)


def allocate(candidates: Sequence[Candidate], budget: float, allocation: str, share: float = 1 / 8) -> list[int | None]:
    """The rank of every layer, None for exact, with `average(...) <= budget`; `share` of min(N, K) is for "depth".

    Raises ValueError when not even 16 directions a layer fit.
    """
    least = [min(RANK_STEP, c.N, c.K) for c in candidates]
    ranks: list[int | None] = [_cheaper(c, r) for c, r in zip(candidates, least, strict=True)]
    smallest = average(candidates, ranks)
    if smallest > budget:
        raise ValueError(
            f"budget={budget:g}: rank {RANK_STEP} everywhere costs {smallest:.3f} of the dense flops already; give a "
            "larger one, or subspace='dropped', which costs nothing"
        )
    return _by_depth(candidates, budget, share) if allocation == "depth" else _by_energy(candidates, ranks, budget)


def _cheaper(candidate: Candidate, rank: int) -> int | None:
    return rank if candidate.cost(rank) < candidate.exact else None


def _by_depth(candidates: Sequence[Candidate], budget: float, share: float) -> list[int | None]:
    ranks: list[int | None] = []
    while True:
        ranks = [_cheaper(c, resolve_rank(share, c.N, c.K)) for c in candidates]
        if average(candidates, ranks) <= budget:
            break
        share *= 0.9  # ends: at a small share every rank is the least one
    total = sum(c.N * c.K for c in candidates)
    left = (budget - average(candidates, ranks)) * total
    for index in reversed(range(len(candidates))):
        candidate, rank = candidates[index], ranks[index]
        if rank is None:
            continue
        more = (candidate.exact - candidate.cost(rank)) * candidate.N * candidate.K
        if more > left:
            break
        ranks[index], left = None, left - more
    return ranks


def _by_energy(candidates: Sequence[Candidate], ranks: list[int | None], budget: float) -> list[int | None]:
    total = sum(c.N * c.K for c in candidates)
    left = (budget - average(candidates, ranks)) * total
    queue: list[tuple[float, int, int | None, float]] = []  # (-gain per flop, layer, its next rank, flops)

    def offer(index: int) -> None:
        candidate, rank = candidates[index], ranks[index]
        if rank is None:
            return
        assert candidate.worth is not None
        following: int | None = rank + RANK_STEP
        gained = candidate.worth[rank : rank + RANK_STEP].sum().item()
        if following is None or following > len(candidate.worth) or candidate.cost(following) >= candidate.exact:
            following, gained = None, candidate.worth[rank:].sum().item()
        flops = (candidate.cost(following) - candidate.cost(rank)) * candidate.N * candidate.K
        if flops > 0:
            depth = (index + 1) / len(candidates)
            heapq.heappush(queue, (-gained * depth / flops, index, following, flops))

    for index in range(len(candidates)):
        offer(index)
    while queue:
        _, index, rank, flops = heapq.heappop(queue)
        if flops <= left:
            ranks[index], left = rank, left - flops
            offer(index)
    return ranks
