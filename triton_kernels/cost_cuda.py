"""The cost model of the CUDA kernels (`csrc/`): the counts of their plans, and the time they predict.

Constants and cuts are those of `csrc/sm90_tiles.h` and `sm90_plan.h`; Ampere's are in `cost_sm80`. `tests/kernels`
compares the plans with the extension's own where it is built.
"""

from __future__ import annotations

from . import cost_sm80
from .cost_model import finishing
from .phases import Estimate, Flags, Phase, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import CLUSTER_BYTES, EXCHANGE_US, SHARED_BYTES, WGMMA_LEAST, DeviceSpec

MAX_RANK = 256  # of Hopper's kernel
MAX_ADAPTER = 64
_STEP = 64  # columns of dY, x and dX per step
_MAX_CLUSTER = 8
_EXCHANGE_STEPS = 4  # what the plan takes an exchange for


def rank_tile(R: int) -> int:
    """Columns of left that a kernel is compiled for; R up to them costs the same on chip."""
    return 0 if R == 0 else 64 if R <= 64 else 128 if R <= 128 else 256


def adapter_tile(P: int) -> int:
    return 0 if P == 0 else 16 if P <= 16 else 64


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
    most = MAX_RANK if capability == (9, 0) else cost_sm80.MAX_RANK
    if flags.need_dx and (R % 8 or not 8 <= R <= most):
        return f"R={R} is not a multiple of 8 in 8 .. {most}"
    if P % 8 or P > MAX_ADAPTER or (P == 0 and (flags.need_dA or flags.need_dB)):
        return f"P={P} is not a multiple of 8 in 8 .. {MAX_ADAPTER}"
    return None


def sm90_cluster(M: int, N: int, K: int, sms: int, second_walk: bool = True) -> tuple[int, int]:
    """Blocks that share a slab of 128 rows, and the slabs that one cluster's multiprocessors take in turn."""
    slabs = cdiv(M, 128)

    def waves(cluster: int) -> int:
        in_full_gpcs = sms // 16 * 16 if sms >= 16 and cluster > 2 else sms
        return cdiv(slabs, max(1, in_full_gpcs // cluster))

    def cost(cluster: int) -> int:
        steps = cdiv(cdiv(N, _STEP), cluster) + (cdiv(cdiv(K, _STEP), cluster) if second_walk else 0)
        return waves(cluster) * (steps + (_EXCHANGE_STEPS if cluster > 1 and second_walk else 0))

    chosen = 1
    for cluster in (2, 4, _MAX_CLUSTER):
        if cluster <= sms and cost(cluster) < cost(chosen):
            chosen = cluster
    return chosen, waves(chosen)


def estimate_cuda(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """The kernels that run on this device: Hopper's, or Ampere's on everything else."""
    if device.capability != (9, 0):
        ampere = cost_sm80.phases(M, N, K, R, P, flags, device, itemsize)
        return Estimate(kernel_for(device.capability), ampere, None, *cost_sm80.occupancy(M, N, R, P, flags, device))
    slabs = cdiv(M, 128)
    rank, adapter = rank_tile(R if flags.need_dx else 0), adapter_tile(P)
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    second = flags.need_dx or flags.need_dA
    cluster, rounds = sm90_cluster(M, N, K, device.sms, second)
    blocks = slabs * cluster
    over_n, over_k = _sm90_steps(device, rank, adapter, flags, need_t_p)

    real_r = R if flags.need_dx else 0
    dB, dA = slabs * N * P * 4 * flags.need_dB, slabs * K * P * 4 * flags.need_dA
    loaded = (M * N + slabs * N * (real_r + P * need_t_p) + M * P * flags.need_dB) * itemsize
    added = not flags.deterministic
    phases = [
        walk(
            "walk N",
            device,
            over_n,
            cdiv(cdiv(N, _STEP), cluster),
            blocks,
            hbm=(M * N + N * (real_r + P) + M * P) * itemsize + dB * (not added),
            l2=l2_traffic(loaded, dB * (not added), dB * added),
            l2_bytes=loaded + dB,
            flops=2 * slabs * 128 * N * (rank + adapter * (need_t_p + flags.need_dB)),
            rounds=rounds,
        )
    ]
    if second:
        if cluster > 1:
            phases.append(_exchange(slabs, cluster, rounds, real_r + P, rank + adapter, device))
        dX = M * K * itemsize * flags.need_dx
        loaded = (M * K * flags.need_dA + slabs * K * (real_r + P) * flags.need_dx) * itemsize
        phases.append(
            walk(
                "walk K",
                device,
                over_k,
                cdiv(cdiv(K, _STEP), cluster),
                blocks,
                hbm=dX + (M * K * flags.need_dA + (real_r + P) * K) * itemsize + dA * (not added),
                l2=l2_traffic(loaded, dX + dA * (not added), dA * added),
                l2_bytes=loaded + dX + dA,
                flops=2 * slabs * 128 * K * ((rank + adapter) * flags.need_dx + adapter * flags.need_dA),
                rounds=rounds,
                kernels=0,
            )
        )
    without_bias = Flags(flags.need_dx, flags.need_dA, flags.need_dB, False, False, flags.deterministic)
    phases.append(finishing(N, K, P, without_bias, device, itemsize, slabs))
    if flags.need_dbias:
        phases.append(passes("db", device, M * N * itemsize))
    waves = slabs / (device.sms / cluster)
    return Estimate(kernel_for(device.capability), tuple(phases), None, blocks, waves)


def _exchange(slabs: int, cluster: int, rounds: int, columns: int, tile: int, device: DeviceSpec) -> Phase:
    """The blocks of a cluster add up T [128, R + P] in shared memory: an owner reads 4 bytes of each other block's
    granule and writes 2 back; each block has its own through shared memory once in and once out."""
    remote = 6 * (cluster - 1) * 128 * tile / cluster
    cycles = remote / CLUSTER_BYTES + 8 * 128 * tile / SHARED_BYTES
    us = rounds * (EXCHANGE_US + cycles / (device.clock_ghz * 1e3))
    return Phase("exchange", latency_us=us, l2_bytes=slabs * (cluster - 1) * 128 * columns * 6)


def _sm90_steps(device: DeviceSpec, rank: int, adapter: int, flags: Flags, need_t_p: bool) -> tuple[Step, Step]:
    """A step of 64 columns of a slab of 128 rows: two warpgroups, each of 64 rows, multiply what TMA has loaded. The
    skinny products have one tile of 64 rows a step and [64, 16]-operands of 128 rows. Over K the first operand, T,
    lies in registers."""
    skinny = 8 * max(adapter / 2, WGMMA_LEAST)
    tensor_n = product_cycles(device, 2, 128, rank, _STEP)
    tensor_n += product_cycles(device, 2, 128, adapter * need_t_p, _STEP) + skinny * flags.need_dB
    left = 2 * (_STEP + rank) * 64 * (rank > 0)
    right = 2 * (_STEP + adapter) * 64 * need_t_p
    fill_n = _STEP * (128 + rank + adapter)
    shared_n = 2 * (fill_n + left + right + (_STEP + adapter) * 128 * flags.need_dB)
    tensor_k = product_cycles(device, 2, 128, _STEP, rank + adapter) * flags.need_dx if rank + adapter else 0.0
    tensor_k += skinny * flags.need_dA
    fill_k = _STEP * (128 * flags.need_dA + (rank + adapter) * flags.need_dx)
    staged = 2 * 128 * _STEP * flags.need_dx
    operands = 2 * (rank + adapter) * _STEP * flags.need_dx + (_STEP + adapter) * 128 * flags.need_dA
    return Step(tensor_n, shared_n), Step(tensor_k, 2 * (fill_k + staged + operands))
