"""Factors that follow from no weight, for benchmarks alone: of random directions, and none at all.

Random directions take as long as any others, so `bench step` measures with them. What is learnt with them, or with the
frozen path dropped, is what a chosen subspace must beat in `bench fidelity`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from loge_kernels.conversion import plan as planning
from loge_kernels.factors.factors import Factors, projection, resolve_rank

CONTROLS = ("random", "dropped")


@contextlib.contextmanager
def control(name: str) -> Iterator[None]:
    """Inside, `loge.apply(model, rank=...)` takes the factors of a control for those of a singular value decomposition:
    "random", of that rank, or "dropped", of rank 0, whatever `rank` says. Not for several threads at a time."""
    decomposed = planning.cached_factors
    planning.cached_factors = _random if name == "random" else _dropped
    try:
        yield
    finally:
        planning.cached_factors = decomposed


def _random(weight: Tensor, rank: int | float, method: str = "") -> Factors:
    N, K = weight.shape
    directions = torch.randn(K, resolve_rank(rank, N, K), device=weight.device)
    return projection(weight, torch.linalg.qr(directions).Q.t(), "random")


def _dropped(weight: Tensor, rank: int | float, method: str = "") -> Factors:
    N, K = weight.shape
    return Factors(weight.new_empty(N, 0), weight.new_empty(0, K), "dropped", 0.0).bind(weight)
