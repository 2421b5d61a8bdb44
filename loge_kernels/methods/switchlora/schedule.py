"""How many vectors of a layer are switched at which step."""

from __future__ import annotations

import math

# What is left of the switching frequency after the first `ratio` of the training.
_LEFT = 0.3


def interval(step: int, start: float, ratio: float, total_steps: int) -> float:
    """Steps between two switches of the same slot, at optimizer step `step` from 0: `start`, growing exponentially.

    Source: arXiv 2406.06564 and the authors' code.
    """
    exponent = -(step + 1) / (ratio * total_steps) * math.log(_LEFT)
    return math.inf if exponent > 700.0 else start * math.exp(exponent)


def count(expected: float, uniform: float) -> int:
    """`expected` as an integer: rounded up with the probability of its fraction, `uniform` being drawn from [0, 1)."""
    return math.floor(expected + uniform)
