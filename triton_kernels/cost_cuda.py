"""The cost model of the CUDA kernels (`csrc/`): the counts of their plans, and the time they predict.

Constants are those of `csrc/sm80_tiles.h`; Hopper's kernels are in `cost_sm90`.
"""

from __future__ import annotations

from . import cost_sm90
from .cost_model import finishing
from .cost_sm90 import adapter_tile, rank_tile
from .phases import Estimate, Flags, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import DeviceSpec

MAX_RANK = 256  # of Ampere's kernel
MAX_ADAPTER = 64
_STEP = 64  # columns of dY, x and dX per step


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
    most = cost_sm90.MAX_RANK if capability == (9, 0) else MAX_RANK
    if flags.need_dx and (R % 8 or not 8 <= R <= most):
        return f"R={R} is not a multiple of 8 in 8 .. {most}"
    if P % 8 or P > MAX_ADAPTER or (P == 0 and (flags.need_dA or flags.need_dB)):
        return f"P={P} is not a multiple of 8 in 8 .. {MAX_ADAPTER}"
    return None


def estimate_cuda(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """The kernels that run on this device: Hopper's, or Ampere's on everything else."""
    if device.capability == (9, 0):
        return cost_sm90.estimate_sm90(M, N, K, R, P, flags, device)
    slabs = cdiv(M, 64)
    rank, adapter = rank_tile(R if flags.need_dx else 0), adapter_tile(P)
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    resident = 1 if rank + adapter > 144 else 2
    rounds = cdiv(slabs, device.sms)
    over_n, over_k = _sm80_steps(device, rank, adapter, flags, need_t_p)

    real_r = R if flags.need_dx else 0
    dB, dA = slabs * N * P * 4 * flags.need_dB, slabs * K * P * 4 * flags.need_dA
    loaded = (M * N + slabs * N * (real_r + P * need_t_p) + M * P * flags.need_dB) * itemsize
    added = not flags.deterministic
    phases = [
        walk(
            "walk N",
            device,
            over_n,
            cdiv(N, _STEP),
            slabs,
            hbm=(M * N + N * (real_r + P) + M * P) * itemsize + dB * (not added),
            l2=l2_traffic(loaded, dB * (not added), dB * added),
            l2_bytes=loaded + dB,
            flops=2 * slabs * 64 * N * (rank + adapter * (need_t_p + flags.need_dB)),
            resident=resident,
            rounds=rounds,
        )
    ]
    if flags.need_dx or flags.need_dA:
        dX = M * K * itemsize * flags.need_dx
        loaded = (M * K * flags.need_dA + slabs * K * (real_r + P) * flags.need_dx) * itemsize
        phases.append(
            walk(
                "walk K",
                device,
                over_k,
                cdiv(K, _STEP),
                slabs,
                hbm=dX + (M * K * flags.need_dA + (real_r + P) * K) * itemsize + dA * (not added),
                l2=l2_traffic(loaded, dX + dA * (not added), dA * added),
                l2_bytes=loaded + dX + dA,
                flops=2 * slabs * 64 * K * ((rank + adapter) * flags.need_dx + adapter * flags.need_dA),
                rounds=rounds,
                kernels=0,
            )
        )
    without_bias = Flags(flags.need_dx, flags.need_dA, flags.need_dB, False, False, flags.deterministic)
    phases.append(finishing(N, K, P, without_bias, device, itemsize, slabs))
    if flags.need_dbias:
        phases.append(passes("db", device, M * N * itemsize))
    return Estimate("cuda sm80", tuple(phases), None, slabs, slabs / (device.sms * resident))


def _sm80_steps(device: DeviceSpec, rank: int, adapter: int, flags: Flags, need_t_p: bool) -> tuple[Step, Step]:
    """A step of 64 columns of a slab of 64 rows: eight warps, 2 by 4, so that the tile of dY is read by four of them
    and the factors' by two; over K, T and the factors the same way, and dX staged."""
    skinny = product_cycles(device, 2, 64, adapter, _STEP)
    tensor_n = product_cycles(device, 2, 64, rank, _STEP) + skinny * (need_t_p + flags.need_dB)
    shared_n = 2 * _STEP * ((64 + rank + adapter) + 4 * 64 + 2 * rank + 2 * (64 + adapter))
    tensor_k = (product_cycles(device, 2, 64, _STEP, rank) + skinny) * flags.need_dx + skinny * flags.need_dA
    t_reads = 4 * 64 // (2 if rank + adapter > 144 else 1)  # its tiles of dX are 128 columns wide there
    shared_k = 2 * ((rank + adapter) * (_STEP + t_reads + 2 * _STEP) * flags.need_dx + 3 * 64 * _STEP)
    return Step(tensor_n, shared_n), Step(tensor_k, shared_k)
