"""Predicted time of the dense product dX = dY W, in 16 or 32 bits and in 8 bits with its quantisation.

Counted as `numerics.eight_bit` takes it on a GPU: the row maxima of dY, its division by their scales, the product, and
where cuBLAS does not scale rows and columns itself, passes over its 32-bit result. The whole exact backward, and our
kernels for it, are in `cost_exact`. Sums of float8 for 16-bit dY are accumulated fast there.
"""

from __future__ import annotations

import torch

from .cost_exact import FAST, FORMS, estimate_exact, quantisation, rate_of
from .devices import device_spec
from .library import dense_product
from .phases import Flags, passes
from .rates import DeviceSpec

# A training step's worth of rows, and an adapter's rank; which candidate is first hardly depends on them.
TOKENS, ADAPTER = 8192, 16


def dense_us(
    M: int, N: int, K: int, dtype: torch.dtype, device: DeviceSpec, name: str | None = None, kernels: bool = False
) -> float:
    """Predicted microseconds of dX [M, K] for dY [M, N] in `dtype`; `name`: "float8", "int8" or None. `kernels`: of the
    whole backward with an adapter, by our kernels where they are faster."""
    precision = FAST if name == "float8" and dtype.itemsize == 2 else name
    if kernels:
        given = precision, M, N, K, ADAPTER, Flags(), device, dtype.itemsize, dtype == torch.bfloat16
        return min(estimate_exact(form, *given).predicted_us for form in FORMS)
    if name is None or precision is None:
        return dense_product("product", device, M, N, K, dtype.itemsize).us
    before, after = quantisation(M, N, K, name, dtype.itemsize, dtype == torch.bfloat16)
    out_size = 4 if after else dtype.itemsize
    product = dense_product("product", device, M, N, K, 1, times=rate_of(device, precision), out_size=out_size)
    scales = passes("quantise", device, 0, kernels=2).us
    return product.us + scales + sum(passes("pass", device, nbytes, 1, share).us for nbytes, share in before + after)


def faster_dtype(
    N: int, K: int, name: str, dtype: torch.dtype, device: torch.device | str | None = None, kernels: bool = False
) -> tuple[str | None, str]:
    """`name` where the product with a weight [N, K] is predicted to be faster in it than in `dtype`, else None; and the
    prediction in words. `kernels`: ours may run."""
    spec = device_spec(device)
    own, eight = (dense_us(TOKENS, N, K, dtype, spec, in_8, kernels) for in_8 in (None, name))
    reason = f"{name} predicted {own / eight:.2f}x {str(dtype).removeprefix('torch.')} on {spec.name}"
    return (name if eight < own else None), reason
