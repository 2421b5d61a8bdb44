"""Predicted time of the dense product dX = dY W, in 16 or 32 bits and in 8 bits with its quantisation.

Counted as the package takes it on a GPU: the row maxima of dY, its division by their scales, the product, and where
cuBLAS does not scale rows and columns itself, passes over its 32-bit result. Shares of the memory's rate are those that
PyTorch's kernels are known to reach; nothing here was measured for this table.
"""

from __future__ import annotations

import torch

from .devices import DeviceSpec, device_spec

TOKENS = 8192  # a training step's worth of rows; which candidate is first hardly depends on it
# Rates over that of 16 bits: float8 with full accumulation (980 of 660 TFLOP/s on an H100), int8 on Ampere.
_RATES = {"float8": 1.5, "int8": 1.8}
_PASS, _REDUCTION, _CAST = 0.85, 0.72, 0.50  # shares of the copy rate
_LAUNCH_US = 2.5  # from one kernel's end to the next one's full speed, in a queue that is never empty


def quantisation_passes(
    M: int, N: int, K: int, name: str, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[int, float]]:
    """Bytes, and the share of the copy rate that they move at, of each pass around an 8-bit product for dX [M, K], with
    dY [M, N] in `dtype`: row maxima and division; int8 also rounds and converts, and scales int32 sums by row and by
    column afterwards, as float8 does with its float32 sums where dY is not bfloat16."""
    size = dtype.itemsize
    maxima = [(size * M * N, _REDUCTION)]
    scaled = [((4 + 4) * M * K, _CAST), ((4 + size) * M * K, _CAST)]
    if name == "float8":
        return [*maxima, ((size + 1) * M * N, _CAST), *(scaled if dtype != torch.bfloat16 else [])]
    return [*maxima, ((size + 4) * M * N, _CAST), ((4 + 4) * M * N, _PASS), ((4 + 1) * M * N, _PASS), *scaled]


def dense_us(M: int, N: int, K: int, dtype: torch.dtype, device: DeviceSpec, name: str | None = None) -> float:
    """Predicted microseconds of dX [M, K] for dY [M, N] in `dtype`; `name`: "float8", "int8" or None."""
    size = dtype.itemsize
    rate = device.tflops_32 if size == 4 else device.tflops_16
    moved = (M * N + N * K + M * K) * size
    passes: list[tuple[int, float]] = []
    if name is not None:
        rate = device.tflops_16 * _RATES[name]
        moved = M * N + N * K + M * K * (2 if name == "float8" and dtype == torch.bfloat16 else 4)
        passes = quantisation_passes(M, N, K, name, dtype)
    product = max(2.0 * M * N * K / (rate * 1e6), moved / (device.hbm_gbs * _PASS * 1e3))
    rest = sum(count / (device.hbm_gbs * share * 1e3) for count, share in passes)
    small = 2 if passes else 0  # the scales
    return product + rest + (1 + len(passes) + small) * _LAUNCH_US


def faster_dtype(
    N: int, K: int, name: str, dtype: torch.dtype, device: torch.device | str | None = None
) -> tuple[str | None, str]:
    """`name` where the product with a weight [N, K] is predicted to be faster in it than in `dtype`, else None; and the
    prediction in words."""
    spec = device_spec(device)
    own, eight = (dense_us(TOKENS, N, K, dtype, spec, in_8) for in_8 in (None, name))
    reason = f"{name} predicted {own / eight:.2f}x {str(dtype).removeprefix('torch.')} on {spec.name}"
    return (name if eight < own else None), reason
