"""The cost model of the CUDA kernels (`csrc/`): the counts of their plans, and the time they predict.

Constants and cuts are those of `csrc/sm90_tiles.h`, `sm90_plan.h` and `sm80_tiles.h`; `tests/kernels` compares the
plans with the extension's own where it is built.
"""

from __future__ import annotations

from dataclasses import replace

from .cost_model import finishing
from .phases import Estimate, Flags, Phase, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import CLUSTER_BYTES, EXCHANGE_US, ROUND_BYTES, SHARED_BYTES, WGMMA_LEAST, DeviceSpec

MAX_RANK = 256
MAX_ADAPTER = 64
_STEP = 64  # columns of dY, x and dX per step
_MAX_CLUSTER = 8


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
    if flags.need_dx and (R % 8 or not 8 <= R <= MAX_RANK):
        return f"R={R} is not a multiple of 8 in 8 .. {MAX_RANK}"
    if P % 8 or P > MAX_ADAPTER or (P == 0 and (flags.need_dA or flags.need_dB)):
        return f"P={P} is not a multiple of 8 in 8 .. {MAX_ADAPTER}"
    return None


def sm90_max_log_splits(rank: int, adapter: int) -> int:
    """The most splits of N, as a power of two, whose shares of T have room in shared memory."""
    return 2 if rank == 256 else 3


def sm90_cut(M: int, N: int, K: int, rank: int, adapter: int, sms: int, second_walk: bool = True) -> tuple[int, int]:
    """Slabs of 128 rows that share a cluster and the factors' loads, and splits of N and K: what `sm90_plan.h` takes
    for a device that cannot be asked. Its costs are cycles, for comparing."""
    width = rank + adapter

    def cost(rows: int, log_splits: int) -> int:
        splits = 1 << log_splits
        on_chip = 128 + width + 2 * (_STEP + rank) + 4 * (_STEP + adapter)
        step = max(on_chip, 128 * (128 + width // rows) // 27)
        steps = cdiv(cdiv(N, _STEP), splits) + (cdiv(cdiv(K, _STEP), splits) if second_walk else 0)
        exchange = 1000 + (48 * width * (splits - 1) >> log_splits) if splits > 1 and second_walk else 0
        return sm90_rounds(M, rows, splits, sms) * (steps * step + exchange)

    cuts = [
        (rows, log_splits)
        for rows in (1, 2)
        for log_splits in range(sm90_max_log_splits(rank, adapter) + 1)
        if rows << log_splits <= min(sms, _MAX_CLUSTER) and rows <= max(1, cdiv(M, 128))
    ]
    rows, log_splits = min(cuts, key=lambda cut: cost(*cut))
    return rows, 1 << log_splits


def sm90_rounds(M: int, rows: int, splits: int, sms: int) -> int:
    """Clusters that the same multiprocessors take in turn. A cluster lies within a GPC, of 16 or 18 of them."""
    cluster = rows * splits
    in_full_gpcs = sms // 16 * 16 if sms >= 16 and cluster > 2 else sms
    return cdiv(cdiv(cdiv(M, 128), rows), max(1, in_full_gpcs // cluster))


def estimate_cuda(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """The kernel that runs on this device: Hopper's, or Ampere's on everything else."""
    hopper = device.capability == (9, 0)
    rows = 128 if hopper else 64
    slabs = cdiv(M, rows)
    rank, adapter = rank_tile(R if flags.need_dx else 0), adapter_tile(P)
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    second = flags.need_dx or flags.need_dA
    shared, splits = sm90_cut(M, N, K, rank, adapter, device.sms, second) if hopper else (1, 1)
    rounds = sm90_rounds(M, shared, splits, device.sms) if hopper else cdiv(slabs, device.sms)
    blocks = cdiv(slabs, shared) * shared * splits
    asked = cdiv(slabs, shared)  # times that a factor is read from L2
    resident = 1 if hopper or rank + adapter > 144 else 2
    over_n, over_k = (_sm90_steps if hopper else _sm80_steps)(device, rank, adapter, flags, need_t_p)

    real_r = R if flags.need_dx else 0
    dB, dA = slabs * N * P * 4 * flags.need_dB, slabs * K * P * 4 * flags.need_dA
    loaded = (M * N + asked * N * (real_r + P * need_t_p) + M * P * flags.need_dB) * itemsize
    added = not flags.deterministic
    phases = [
        walk(
            "walk N",
            device,
            over_n,
            cdiv(cdiv(N, _STEP), splits),
            blocks,
            hbm=(M * N + N * (real_r + P) + M * P) * itemsize + dB * (not added),
            l2=l2_traffic(loaded, dB * (not added), dB * added),
            l2_bytes=loaded + dB,
            flops=2 * slabs * rows * N * (rank + adapter * (need_t_p + flags.need_dB)),
            resident=resident,
            rounds=rounds,
        )
    ]
    if second:
        if splits > 1:
            phases.append(_exchange(slabs, splits, rounds, real_r + P, rank + adapter, device))
        dX = M * K * itemsize * flags.need_dx
        loaded = (M * K * flags.need_dA + asked * K * (real_r + P) * flags.need_dx) * itemsize
        phases.append(
            walk(
                "walk K",
                device,
                over_k,
                cdiv(cdiv(K, _STEP), splits),
                blocks,
                hbm=dX + (M * K * flags.need_dA + (real_r + P) * K) * itemsize + dA * (not added),
                l2=l2_traffic(loaded, dX + dA * (not added), dA * added),
                l2_bytes=loaded + dX + dA,
                flops=2 * slabs * rows * K * ((rank + adapter) * flags.need_dx + adapter * flags.need_dA),
                rounds=rounds,
                kernels=0,
            )
        )
    without_bias = Flags(flags.need_dx, flags.need_dA, flags.need_dB, False, False, flags.deterministic)
    if flags.deterministic:
        phases.append(finishing(N, K, P, without_bias, device, itemsize, slabs))
    else:
        phases.append(_small(N * P * flags.need_dB + K * P * flags.need_dA, splits, device))
    if flags.need_dbias:
        phases.append(passes("db", device, M * N * itemsize))
    waves = slabs * splits / (device.sms * resident)
    return Estimate(kernel_for(device.capability), tuple(phases), None, blocks, waves)


def _small(sums: int, splits: int, device: DeviceSpec) -> Phase:
    """One fill of the workspace, and the rounding of the sums to 16 bits at the kernel's end, by one multiprocessor for
    each split of N and K. (Adapters in fp32 have none of it, and PyTorch casts them before.)"""
    fill = passes("small", device, 4 * sums)
    rounding = 6 * sums / splits / (ROUND_BYTES * device.clock_ghz * 1e3)
    return replace(fill, launch_us=fill.launch_us + rounding)


def _exchange(slabs: int, splits: int, rounds: int, columns: int, tile: int, device: DeviceSpec) -> Phase:
    """The splits of a slab add up T [128, R + P]: of each value 4 bytes go to its owner from each other split, and 2
    come back. Its own a split keeps in registers; what comes lands in shared memory and is read there once."""
    remote = 6 * (splits - 1) * 128 * tile / splits
    cycles = remote / CLUSTER_BYTES + remote / SHARED_BYTES
    us = rounds * (EXCHANGE_US + cycles / (device.clock_ghz * 1e3))
    return Phase("exchange", latency_us=us, l2_bytes=slabs * (splits - 1) * 128 * columns * 6)


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
