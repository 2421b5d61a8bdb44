"""The second moment of a stream of rows, whole or sketched, with memory that does not grow with the stream.

    C = Σ zᵀ z      [n, n], over rows z [n]; whole up to `WHOLE_UP_TO`: 4 n² bytes, at most 64 MiB
    Y = C Ω         [n, WIDTH] above it, with Ω [n, WIDTH] Gaussian: 4 n WIDTH bytes (32 MiB for n = 8192)

A sketch gives back C's leading part: the Nyström approximation Y (Ωᵀ Y)⁻¹ Yᵀ, shifted to keep it positive definite.

Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data", NeurIPS 2017, algorithm 3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..numerics.decompositions import symmetric_root

WHOLE_UP_TO = 4096
WIDTH = 1024


class SecondMoment:
    """The second moment of the rows [., size] that were added, in float32.

    `matrix` is C [size, size] or its sketch [size, WIDTH], on `device`; two moments of one size may be added up.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", whole: bool | None = None) -> None:
        self.size = size
        self.whole = size <= WHOLE_UP_TO if whole is None else whole
        self.matrix = torch.zeros(size, size if self.whole else min(WIDTH, size), device=device)

    def add(self, rows: Tensor) -> None:
        """C += rowsᵀ rows for rows [., size] of any floating dtype, on any device."""
        z = rows.float()
        part = z.t() @ (z if self.whole else z @ self._test_matrix(z.device))
        self.matrix += part.to(self.matrix.device)

    def root(self) -> Tensor:
        """F [q, size] with C ≈ Fᵀ F, float32; q is the size, or the sketch's width."""
        if self.whole:
            return symmetric_root(self.matrix)
        Y, omega = self.matrix.double(), self._test_matrix(self.matrix.device).double()
        shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(Y)
        Y = Y + shift * omega
        core = omega.t() @ Y
        lower = torch.linalg.cholesky((core + core.t()) / 2)
        return torch.linalg.solve_triangular(lower, Y.t(), upper=False).float()

    def _test_matrix(self, device: torch.device) -> Tensor:
        return _gaussian(self.size, self.matrix.shape[1], device)


@functools.lru_cache(maxsize=2)  # layers of one width follow one another
def _gaussian(size: int, width: int, device: torch.device) -> Tensor:
    """Ω [size, width], the same wherever it is made: drawn on the CPU."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(size)).to(device)
