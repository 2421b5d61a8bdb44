"""The operands that every candidate of a case shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loge_kernels.factors.factors import Factors


@dataclass(frozen=True, slots=True)
class Operands:
    """x [M, K], dy [M, N], weight [N, K], lora_A [P, K], lora_B [N, P] and the factors by rank, on one device.

    `x`, `lora_A` and `lora_B` require gradients. The values are Gaussian and the factors are not those of the weight:
    neither changes the time, and the correctness gate computes with the factors as they are.
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    factors: dict[int, Factors]

    @property
    def dtype(self) -> torch.dtype:
        return self.dy.dtype

    @property
    def scaled_B(self) -> Tensor:
        return (self.scaling * self.lora_B.detach()).to(self.dtype)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K, P."""
        return (*self.dy.shape, self.x.shape[1], self.lora_A.shape[0])

    def shape_of(self, result: str) -> tuple[int, ...]:
        """The shape of a result by its name: "y", "dx", "dA" or "dB"."""
        like = {"y": self.dy, "dx": self.x, "dA": self.lora_A, "dB": self.lora_B}[result]
        return tuple(like.shape)


def make_operands(
    M: int,
    N: int,
    K: int,
    ranks: Iterable[int],
    P: int,
    dtype: torch.dtype,
    device: torch.device,
    adapter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Operands:
    """Gaussian operands, scaled so that y, dX and the factors' product have entries of about 1; alpha = 2P.

    `adapter_dtype`: the dtype of lora_A and lora_B, `dtype` when None.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) * scale).to(of)

    adapter = adapter_dtype or dtype
    return Operands(
        x=normal(M, K).requires_grad_(),
        dy=normal(M, N),
        weight=normal(N, K, K**-0.5),
        lora_A=normal(P, K, K**-0.5, adapter).requires_grad_(),
        lora_B=normal(N, P, N**-0.5, adapter).requires_grad_(),
        scaling=2.0,
        factors={R: Factors(normal(N, R, N**-0.5), normal(R, K)) for R in dict.fromkeys(ranks)},
    )
