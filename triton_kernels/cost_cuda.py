"""The cost model of the CUDA kernels (`csrc/`): which of them runs on a device, and what it refuses."""

from __future__ import annotations

from . import cost_sm80, cost_sm90
from .phases import Estimate, Flags
from .rates import DeviceSpec

MAX_RANK = 512
MAX_ADAPTER = 64


def kernel_for(capability: tuple[int, int]) -> str:
    return "cuda sm90" if capability == (9, 0) else "cuda sm80"


def why_not(N: int, K: int, R: int, P: int, itemsize: int, flags: Flags, capability: tuple[int, int]) -> str | None:
    """The reason why the CUDA kernels refuse such a problem, or None."""
    if capability < (8, 0):
        return "compute capability 8.0 or newer is needed"
    if itemsize != 2:
        return "float16 and bfloat16 only"
    if flags.dropout:
        return "no dropout mask is regenerated"
    if N % 8 or K % 8:
        return f"N={N}, K={K}: multiples of 8 only"
    if flags.need_dx and (R % 8 or not 8 <= R <= MAX_RANK):
        return f"R={R} is not a multiple of 8 in 8 .. {MAX_RANK}"
    if P % 8 or P > MAX_ADAPTER or (P == 0 and (flags.need_dA or flags.need_dB)):
        return f"P={P} is not a multiple of 8 in 8 .. {MAX_ADAPTER}"
    return None


def estimate_cuda(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """The kernels that run on this device: Hopper's, or Ampere's on everything else."""
    if device.capability == (9, 0):
        return cost_sm90.estimate_sm90(M, N, K, R, P, flags, device)
    phases = cost_sm80.phases(M, N, K, R, P, flags, device, itemsize)
    return Estimate(kernel_for(device.capability), phases, None, *cost_sm80.occupancy(M, N, R, P, flags, device))
