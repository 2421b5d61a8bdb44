"""The order of the exact products: the adapter beside the frozen weight, or merged into it for one product.

    beside    y = x Wᵀ + s (x Aᵀ) Bᵀ       dX = dY W + (s dY B) A
    merged    y = x (W + s B A)ᵀ           dX = dY (W + s B A)

Backward needs xa = x Aᵀ and dY B for dB and dA in either order. What is left differs: beside, a product of depth P is
added to y (2MNP flops, MN elements read and written) or to dX (2MKP, MK); merged, one is added to a copy of W (2NKP,
NK). Per element the work is the same, so the cost model is a comparison of sizes: merged is cheaper where M > K for y
and where M > N for dX, whatever P and whatever the machine. It saves at most (P + c)/K of the product, c what moving an
element costs: on an AMD EPYC in float32, 1 to 14 % where M is 4096 and K 256 to 576, nothing sure where M = 2K = 2048.

Never in 16 bits: rounding W + s B A to them loses updates smaller than the weight's last bit. Nor where dropout gives
the adapter another input than W. Of the adapter's own gradients one order always wins: dA = (s dY B)ᵀ x and
dB = s dYᵀ xa cost 2MPK and 2MPN with what is there already; through dYᵀ x they would cost 2MNK first.

Source: RunLoRA, arXiv 2312.03415.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_LEAST = 2  # times: below it the saving drowns in the noise


def merging_pays(rows: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether one product of `rows` rows summed over `depth` is cheaper with the adapter merged into the weight."""
    return dtype in (torch.float32, torch.float64) and rows >= _AT_LEAST * depth


def merged(weight: Tensor, lora_A: Tensor, scaled_B: Tensor) -> Tensor:
    """W + s B A [N, K] in W's dtype, as a new tensor."""
    return torch.addmm(weight, scaled_B, lora_A)
