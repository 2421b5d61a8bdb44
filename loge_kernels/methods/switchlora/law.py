"""What SwitchLoRA's vectors start as, reproducibly: uniform, with deviations that balance the two matrices.

Source: Zhou, Wang and Xu, arXiv 2406.06564, and the authors' code.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GAIN = 1.0 / math.sqrt(3.0)


def deviations(N: int, K: int, r: int) -> tuple[float, float]:
    """Standard deviations of A [r, K] and of B [N, r], and of the candidates for each, for a weight [N, K]."""
    std_A = (math.sqrt(N) * r / K**1.5) ** 0.25 * math.sqrt(_GAIN)
    std_B = (r / math.sqrt(N * K)) ** 0.25 * math.sqrt(_GAIN)
    return std_A, std_B


def fill_(tensor: Tensor, deviation: float, seed: int, name: str) -> None:
    """Uniform values of this standard deviation, the same on every device and rank for the same seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = math.sqrt(3.0) * deviation
    with torch.no_grad():
        tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
