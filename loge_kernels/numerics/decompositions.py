"""Decompositions behind the factors: truncated SVD, full or randomised, and the gradient-optimal subspace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Up to this many rows or columns (the smaller), LAPACK's full decomposition takes under two seconds on two cores.
_FULL_UP_TO = 1024
_OVERSAMPLING = 1 / 8  # of the rank, beyond it, in the randomised decomposition
_MAX_ITERATIONS = 8
_CONVERGED = 5e-3  # relative change of the residual energy at which subspace iteration stops
_LEAST_EXTRA = 16


def share(part: Tensor, whole: Tensor) -> float:
    """‖part‖² / ‖whole‖², 1 for a zero whole."""
    total = _energy(whole)
    return min(1.0, _energy(part) / total) if total > 0 else 1.0


def _energy(matrix: Tensor) -> float:
    """‖matrix‖², summed in float64: what a subspace leaves out can be a millionth of the whole."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()


def truncated_svd(W: Tensor, R: int) -> tuple[Tensor, Tensor, float]:
    """U_r [N, R], S_r V_rᵀ [R, K] and the captured share of ‖W‖²."""
    U, S, Vt = leading_triplets(W, R)
    return U, S[:, None] * Vt, share(S, W)


def leading_triplets(W: Tensor, R: int) -> tuple[Tensor, Tensor, Tensor]:
    """The R leading singular triplets of W [N, K], in float32 or W's float64: U_r [N, R], S_r [R], V_rᵀ [R, K]."""
    W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    width = R + max(_LEAST_EXTRA, math.ceil(R * _OVERSAMPLING))
    if min(W.shape) <= _FULL_UP_TO or 2 * width > min(W.shape):
        with one_thread():
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    elif W.shape[0] < W.shape[1]:
        V, S, Ut = _subspace_iteration(W.t(), width)
        U, Vt = Ut.t(), V.t()
    else:
        U, S, Vt = _subspace_iteration(W, width)
    return U[:, :R], S[:R], Vt[:R]


def _subspace_iteration(W: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `width` singular triplets of a tall W [N, K]: U [N, width], S [width], Vᵀ [width, K].

    Iterates until the energy left outside the subspace stops falling. All but the products with W happens on the short
    side, K. It starts from a fixed seed: the same weight gives the same factors.
    """
    generator = torch.Generator(device=W.device).manual_seed(0)
    V = torch.randn(W.shape[1], width, dtype=W.dtype, device=W.device, generator=generator)  # [K, width]
    Y = W @ V  # [N, width]
    total = _energy(W)
    residual = math.inf
    for _ in range(_MAX_ITERATIONS):
        Z = W.t() @ Y  # [K, width]
        with one_thread():
            V = torch.linalg.qr(Z).Q
        Y = W @ V
        previous, residual = residual, max(total - _energy(Y), 0.0)
        if previous - residual <= _CONVERGED * residual:
            break
    # Y = U S Xᵀ from its small Gram matrix, in float64 because squaring halves the digits.
    Y64 = Y.double()
    gram = Y64.t() @ Y64
    with one_thread():
        squares, X = torch.linalg.eigh(gram)
    squares, X = squares.flip(0).clamp_min(0), X.flip(1).to(W.dtype)
    S = squares.sqrt().to(W.dtype)
    U = (Y @ X) * torch.where(S.gt(torch.finfo(W.dtype).eps * S[0]), 1 / S, 0.0)
    return U, S, (V @ X).t()


@contextmanager
def one_thread() -> Iterator[None]:
    """Small decompositions on one core: they gain little from more, and on a busy machine LAPACK's threads wait for
    each other (a 576 x 576 eigh on two busy cores: 9 s on two threads, 0.09 s on one)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gradient_directions(weighted: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """The R leading right singular vectors Vᵀ [R, K] of `weighted` = F W [q, K], where Fᵀ F = E[dYᵀ dY], and the share
    [R] of E‖dY W‖² = ‖F W‖² along each: W V Vᵀ is the rank-R matrix that minimises E‖dY (W - .)‖²."""
    _, S, Vt = leading_triplets(weighted, R)
    total = _energy(weighted)
    shares = S.double().square() / total if total > 0 else torch.zeros_like(S, dtype=torch.float64)
    return torch.nn.functional.normalize(Vt, dim=1), shares


def symmetric_root(C: Tensor) -> Tensor:
    """F with C = Fᵀ F for a positive semi-definite C, which rounding may have made slightly indefinite."""
    if len(C) > _FULL_UP_TO:
        values, vectors = torch.linalg.eigh(C)
    else:
        with one_thread():
            values, vectors = torch.linalg.eigh(C)
    return values.clamp_min(0).sqrt()[:, None] * vectors.t()
