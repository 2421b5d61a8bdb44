"""What each layer gains: from the trace of deviations, one for every latent space, to one gain for every layer.

With d_0 the deviation of the embedding's output and d_l that of layer l's, l = 1 … N:

    marginal     g_l = d_{l-1} − d_l
    power law    g_l = (d_{l-1} − d_l) − (f(l-1) − f(l))     f(l) = a (l+1)^{-α} + c fitted to the trace

The source derives its gain from a scaling law, and does not say how; both readings are this package's. The second asks
for more than the drop that the law promises at that depth, where all layers have a like share in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Gain = Callable[[Sequence[float]], Sequence[float]]

_EXPONENTS = 4000  # tried, evenly spaced in their logarithm from 0.01 to 10


def marginal(trace: Sequence[float]) -> list[float]:
    """d_{l-1} − d_l for every layer."""
    return [before - after for before, after in pairwise(trace)]


def power_law(trace: Sequence[float]) -> list[float]:
    """The drop of every layer beyond that of the fitted power law."""
    law = fitted_power_law(trace)
    return [drop - promised for drop, promised in zip(marginal(trace), marginal(law), strict=True)]


def fitted_power_law(trace: Sequence[float]) -> list[float]:
    """a (l+1)^{-α} + c at every l, of least squared distance to the trace, a ≥ 0 and α in [0.01, 10]."""
    d = torch.tensor(list(trace), dtype=torch.float64)
    depth = torch.arange(1, len(d) + 1, dtype=torch.float64)
    exponents = torch.logspace(-2, 1, _EXPONENTS, dtype=torch.float64)
    falling = depth.pow(-exponents[:, None])  # [exponents, N + 1]
    falling -= falling.mean(dim=1, keepdim=True)
    slopes = ((falling @ d) / falling.square().sum(dim=1)).clamp_min(0.0)  # none that falls: a flat law
    laws = slopes[:, None] * falling + d.mean()
    best = (laws - d).square().sum(dim=1).argmin()
    return [float(value) for value in laws[best]]


GAINS: dict[str, Gain] = {"marginal": marginal, "power_law": power_law}
