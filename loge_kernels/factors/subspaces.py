"""Which directions of K-space a layer's factors keep, most worthy first: by calibration, for "gradient" and "salience".

"gradient": the principal directions of dX = dY W, eigenvectors of E[dXᵀ dX] = Wᵀ E[dYᵀ dY] W; their worth is their
share of E‖dX‖². No projection of the same rank loses less of dX.

"salience": right singular vectors v_j of W, ordered by an index I_j of what the weight's direction j is worth to the
loss (Zhang et al., Applied Sciences 2025, 15(1), 82, section 4.2, which names gradient scores and weight salience and
gives no formula; these are readings of it). With g_j = u_jᵀ (∂L/∂W) v_j of a sample and E over samples:

    "taylor"     E |σ_j g_j|      first-order change of the loss when direction j is removed, sample by sample
    "signed"     |σ_j E g_j|      the same of the mean loss
    "fisher"     σ_j² E g_j²      second-order, with the empirical Fisher information
    "gradient"   E |g_j|          without the weight's part

Of a layer that no token reached (an expert of a mixture, to which none was routed) calibration knows nothing: it gets
the leading right singular vectors of its weight, the subspace of "svd", as directions that are worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.autocast import without_autocast
from ..numerics.decompositions import gradient_directions, leading_triplets, share
from .factors import Factors, projection
from .statistics import LayerStatistics

# The index of each reading, of σ and of E g, E |g| and E g² of every direction.
READINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "taylor": lambda sigma, signed, absolute, square: sigma * absolute,
    "signed": lambda sigma, signed, absolute, square: sigma * signed.abs(),
    "fisher": lambda sigma, signed, absolute, square: sigma.square() * square,
    "gradient": lambda sigma, signed, absolute, square: absolute,
}


@dataclass(frozen=True, slots=True)
class Subspace:
    """`right` [q, K], orthonormal rows, the most worthy first."""

    method: str
    right: Tensor
    importance: Tensor  # float32 [N], E dY_n² up to a factor
    energies: Tensor  # float64 [q]: share of E‖dY W‖² ("gradient") or of ‖W‖² ("salience") along each row

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """The factors of `weight` [N, K] on the `rank` most worthy directions."""
        energy = min(1.0, self.energies[:rank].sum().item())
        return projection(weight, self.right[:rank], self.method, energy)


@torch.no_grad()
@without_autocast
def subspace(weight: Tensor, statistics: LayerStatistics, method: str, limit: int, reading: str = "taylor") -> Subspace:
    """Up to `limit` directions for `weight` [N, K], chosen by `method`, one of PROJECTIONS.

    Raises ValueError for statistics of another shape, of a layer that saw tokens and no gradient, or without the scores
    that "salience" needs.
    """
    if statistics.shape != tuple(weight.shape):
        raise ValueError(f"calibration is of a weight {list(statistics.shape)}, and this one is {list(weight.shape)}")
    if statistics.unseen:
        _, S, Vt = leading_triplets(weight, limit)
        energies = S.double().square() / S.double().square().sum() * share(S, weight.detach().float())
        return Subspace(method, Vt, torch.ones_like(statistics.importance), energies)
    if not statistics.importance.any():
        raise ValueError(
            "calibration saw no gradient at this layer: that of all its tokens was zero; calibrate with other batches, "
            "or leave it out of targets"
        )
    if method == "gradient":
        root = statistics.moment.root().to(weight.device)
        W = weight.detach().float()
        right, energies = gradient_directions(root if statistics.of_dx else root @ W, limit)
        return Subspace(method, right, statistics.importance, energies)
    if statistics.scores is None:
        raise ValueError("calibration has no gradient scores: calibrate(..., scores=True), for subspace='salience'")
    signed, absolute, square = statistics.scores.to(weight.device).double()
    _, S, Vt = leading_triplets(weight, len(signed))
    sigma = S.double()
    index = READINGS[reading](sigma, signed, absolute, square)
    order = index.argsort(descending=True)[:limit]
    whole = share(S, weight.detach().float())
    energies = sigma.square() / sigma.square().sum() * whole
    return Subspace(method, Vt[order], statistics.importance, energies[order])
