"""What an exact dX can be taken in beside the weight's own dtype: 8 bits, or 4, by name."""

from __future__ import annotations

import torch

from . import eight_bit, four_bit
from .eight_bit import EightBitWeight
from .four_bit import FourBitWeight

EXACT_DTYPES = (*eight_bit.DTYPES, *four_bit.FORMATS)


def weight_copy(name: str) -> EightBitWeight:
    """What keeps a copy of a weight in `name`. Raises ValueError for what is none of `EXACT_DTYPES`."""
    if not isinstance(name, str) or name not in EXACT_DTYPES:
        known = ", ".join(map(repr, EXACT_DTYPES))
        raise ValueError(f"exact_dtype={name!r} is unknown; choose one of {known}, or None")
    return FourBitWeight(name) if name in four_bit.FORMATS else EightBitWeight(name)


def why_not(name: str, device: torch.device, N: int, K: int) -> str | None:
    """Why products with a weight [N, K] in `name`, one of `EXACT_DTYPES`, cannot run on `device`, or None."""
    return (four_bit if name in four_bit.FORMATS else eight_bit).why_not(name, device, N, K)
