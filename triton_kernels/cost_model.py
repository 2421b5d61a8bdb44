"""The cost model: bytes, flops and waves of each way to compute a backward pass, and the time they predict.

The bytes are exact: for the one-launch kernel they equal, tensor by tensor, what the interpreter counts. The times
rest on three bounds, HBM, L2 and the matrix units, each scaled by how much of the card the grid keeps busy; they are
meant for choosing between forms and are corrected by measured tables where those exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from .configs import Config, ForwardConfig, OneLaunchConfig, TwoLaunchConfig, padded
from .devices import DeviceSpec

# What a Triton loop reaches of a matrix rate that cuBLAS attains; not measured, see the status table of the README.
TRITON_MATRIX_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Flags:
    """Which gradients a call computes, and how."""

    need_dx: bool = True
    need_dA: bool = True
    need_dB: bool = True
    need_dbias: bool = False
    dropout: bool = False
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a kernel loads from and stores to (or adds to by atomics) one tensor, through any cache."""

    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one candidate costs: unique bytes (HBM), all bytes (L2), flops with padding, and the predicted time."""

    form: str
    config: Config | None
    hbm_bytes: int
    l2_bytes: int
    flops: int
    blocks: int
    waves: float
    predicted_us: float


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def predicted_bytes(
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    config: OneLaunchConfig,
    flags: Flags,
    itemsize: int = 2,
    lora_itemsize: int | None = None,
) -> dict[str, Traffic]:
    """Bytes per tensor of one `one_launch_backward`; tensors that are not touched are left out.

    dA, dB and dbias are the fp32 buffers: the common one, to which every block adds, or all blocks' own ones.
    """
    lora = lora_itemsize or itemsize
    blocks = cdiv(M, config.block_m)
    need_t_r = flags.need_dx and R > 0
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    traffic = {
        "dy": Traffic(loaded=M * N * itemsize),
        "left": Traffic(loaded=blocks * N * R * itemsize if need_t_r else 0),
        "lora_B": Traffic(loaded=blocks * N * P * lora if need_t_p else 0),
        "xa": Traffic(loaded=M * P * itemsize if flags.need_dB else 0),
        "right": Traffic(loaded=blocks * R * K * itemsize if flags.need_dx else 0),
        "lora_A": Traffic(loaded=blocks * P * K * lora if flags.need_dx else 0),
        "x": Traffic(loaded=M * K * itemsize if flags.need_dA else 0),
        "seed": Traffic(loaded=blocks * 16 if flags.dropout and (flags.need_dx or flags.need_dA) else 0),
        "dx": Traffic(stored=M * K * itemsize if flags.need_dx else 0),
        "dA": Traffic(stored=blocks * P * K * 4 if flags.need_dA else 0),
        "dB": Traffic(stored=blocks * N * P * 4 if flags.need_dB else 0),
        "dbias": Traffic(stored=blocks * N * 4 if flags.need_dbias else 0),
    }
    return {name: bytes_ for name, bytes_ in traffic.items() if bytes_ != Traffic()}


def unique_bytes(M: int, N: int, K: int, R: int, P: int, flags: Flags, itemsize: int = 2) -> int:
    """What any implementation must move at least: each operand once, each result once."""
    total = M * N
    total += (N * R + R * K + P * K + M * K) * flags.need_dx
    total += N * P * (flags.need_dx or flags.need_dA)
    total += (M * K + P * K) * flags.need_dA
    total += (M * P + N * P) * flags.need_dB
    total += N * flags.need_dbias
    return total * itemsize


def useful_flops(M: int, N: int, K: int, R: int, P: int, flags: Flags) -> int:
    """Multiplications and additions of the formula, without padding."""
    need_t_p = flags.need_dx or flags.need_dA
    return (
        2
        * M
        * (
            (N + K) * R * flags.need_dx
            + N * P * need_t_p
            + K * P * flags.need_dx
            + K * P * flags.need_dA
            + N * P * flags.need_dB
        )
    )


def estimate_one_launch(
    M: int, N: int, K: int, R: int, P: int, config: OneLaunchConfig, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """One wave is one block per SM: a slab's tiles take most of an SM's shared memory or registers."""
    blocks = cdiv(M, config.block_m)
    traffic = predicted_bytes(M, N, K, R, P, config, flags, itemsize)
    l2 = sum(t.loaded + t.stored for t in traffic.values())
    hbm = unique_bytes(M, N, K, R, P, flags, itemsize)
    if flags.deterministic:
        hbm += 2 * sum(traffic[name].stored for name in ("dA", "dB", "dbias") if name in traffic)
    flops = useful_flops(blocks * config.block_m, N, K, padded(R) if R else 0, padded(P) if P else 0, flags)
    time = _kernel_time(blocks, hbm, l2, flops, device, itemsize) + device.launch_us
    launches = 3 if flags.deterministic else 1  # zeroing the accumulators, or summing them
    time += launches * device.launch_us * (flags.need_dA or flags.need_dB)
    return Estimate("one_launch", config, hbm, l2, flops, blocks, blocks / device.sms, time)


def n_chunk_of(M: int, N: int, R: int, config: TwoLaunchConfig, sms: int) -> int:
    """The columns of dY a block of `project` walks: few enough to fill the card, but at least four steps."""
    blocks = cdiv(M, config.block_m) * max(1, cdiv(R, config.project_r))
    splits = max(1, min(sms // max(blocks, 1), N // (4 * config.block_n), 16))
    return max(1, cdiv(cdiv(N, config.block_n), splits)) * config.block_n


def k_chunk_of(M: int, K: int, R: int, config: TwoLaunchConfig, sms: int) -> int:
    """The columns of dX a block of the second launch writes: a tile, or what fills the card with slabs."""
    if padded(R) > config.project_r:
        return config.tile_k
    splits = max(1, min(sms // max(cdiv(M, config.block_m), 1), K // (2 * config.block_k)))
    return max(1, cdiv(cdiv(K, config.block_k), splits)) * config.block_k


def estimate_two_launch(
    M: int, N: int, K: int, R: int, P: int, config: TwoLaunchConfig, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """`project` and an `expand` one after the other, T in fp32 between them."""
    rows = cdiv(M, config.block_m)
    rank = R if flags.need_dx else 0
    rank_tiles = max(1, cdiv(rank, config.project_r))
    splits = cdiv(N, n_chunk_of(M, N, rank, config, device.sms))
    k_blocks = cdiv(K, k_chunk_of(M, K, R, config, device.sms))
    need_t_p = flags.need_dx or flags.need_dA
    columns = rank + P * need_t_p
    t_bytes = M * columns * 4 * splits
    padded_m = rows * config.block_m
    pad_r = 0 if rank == 0 else rank_tiles * min(config.project_r, padded(rank))
    pad_p = padded(P) if P else 0

    project_l2 = M * N * rank_tiles * itemsize + rows * N * (columns * itemsize + P * 4 * flags.need_dB) + t_bytes
    project_hbm = (M * N + N * (R + P)) * itemsize + t_bytes
    project_flops = 2 * padded_m * N * (pad_r + pad_p * need_t_p + pad_p * flags.need_dB)
    blocks = rows * rank_tiles * splits
    time = _kernel_time(blocks, project_hbm, project_l2, project_flops, device, itemsize) + device.launch_us
    time += (3 if flags.deterministic else 1) * device.launch_us  # zeroing the accumulators, or summing them

    expand_l2 = expand_hbm = expand_flops = 0
    if flags.need_dx or flags.need_dA:
        ends = M * K * itemsize * (flags.need_dx + flags.need_dA)
        layers = splits if flags.deterministic else 1
        expand_hbm = M * columns * 4 * layers + ends + columns * K * itemsize
        expand_l2 = k_blocks * M * columns * 4 * layers + ends + rows * P * K * 4 * flags.need_dA
        expand_l2 += rows * K * (R + P) * itemsize * flags.need_dx
        expand_flops = 2 * padded_m * K * ((pad_r + pad_p) * flags.need_dx + pad_p * flags.need_dA)
        time += _kernel_time(rows * k_blocks, expand_hbm, expand_l2, expand_flops, device, itemsize) + device.launch_us
    return Estimate(
        "two_launch",
        config,
        project_hbm + expand_hbm,
        project_l2 + expand_l2,
        project_flops + expand_flops,
        blocks,
        blocks / device.sms,
        time,
    )


def estimate_torch(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """The formula as PyTorch composes it: T = dY [left | s B], dX = T [right ; A], dA = T_Bᵀ x, dB = s dYᵀ xa, each a
    cuBLAS call; dropout adds passes over x and over the adapter's part of dX."""
    need_t_p = flags.need_dx or flags.need_dA
    width = R * flags.need_dx + P * need_t_p
    products = [(M, width, N)] if width else []
    if flags.need_dx:
        products += [(M, K, R), (M, K, P)] if flags.dropout else [(M, K, R + P)]
    products += [(P, K, M)] * flags.need_dA + [(N, P, M)] * flags.need_dB
    matrix = (device.tflops_16 if itemsize == 2 else device.tflops_32) * 1e6
    time, total, flops = 0.0, 0, 0
    for m, n, k in products:
        moved = (m * k + k * n + m * n) * itemsize
        time += max(moved / (device.hbm_gbs * 1e3), 2 * m * n * k / matrix) + device.launch_us
        total += moved
        flops += 2 * m * n * k
    # Concatenating the factors and scaling B: small copies; the mask: x read and written, dX read and written.
    passes = [(N + K) * width * 2] * flags.need_dx + [N * P * 2] * need_t_p + [M * N] * flags.need_dbias
    passes += [3 * M * K] * (2 * flags.dropout)
    for elements in passes:
        time += elements * itemsize / (device.hbm_gbs * 1e3) + device.launch_us
        total += elements * itemsize
    return Estimate("torch", None, total, total, flops, 0, 0.0, time)


def estimate_forward(
    M: int, N: int, K: int, P: int, config: ForwardConfig, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """`fused_forward`: tiles of x and W from L2, the adapter's columns recomputed in every column of tiles."""
    rows, columns = cdiv(M, config.block_m), cdiv(N, config.block_n)
    hbm = (M * K + N * K + M * N + (N + K + M) * P) * itemsize
    l2 = (columns * M * K + rows * N * K + columns * P * K * rows + M * N) * itemsize
    flops = 2 * rows * config.block_m * (N * K + columns * padded(P) * K + N * padded(P))
    blocks = rows * columns
    time = _kernel_time(blocks, hbm, l2, flops, device, itemsize) + device.launch_us
    return Estimate("forward", config, hbm, l2, flops, blocks, blocks / device.sms, time)


def estimate_torch_forward(
    M: int, N: int, K: int, P: int, device: DeviceSpec, dropout: bool, itemsize: int = 2
) -> Estimate:
    """`x Wᵀ`, `x Aᵀ` and the product with Bᵀ that adds to y, as cuBLAS calls; dropout reads and writes x."""
    matrix = (device.tflops_16 if itemsize == 2 else device.tflops_32) * 1e6
    steps = [(M * K + N * K + M * N, M * N * K), (M * K + P * K + M * P, M * P * K), (2 * M * N + M * P, M * N * P)]
    steps += [(2 * M * K, 0)] * dropout
    time = sum(
        max(moved * itemsize / (device.hbm_gbs * 1e3), 2 * multiplied / matrix) + device.launch_us
        for moved, multiplied in steps
    )
    total = sum(moved for moved, _ in steps) * itemsize
    return Estimate("torch", None, total, total, 2 * sum(multiplied for _, multiplied in steps), 0, 0.0, time)


def _kernel_time(blocks: int, hbm: int, l2: int, flops: int, device: DeviceSpec, itemsize: int) -> float:
    """Microseconds of one grid: the slowest of its three bounds. Few blocks cannot draw all of a card's bandwidth:
    an SM has its share of the matrix rate, and can draw about twice its share of HBM and of L2."""
    if blocks == 0:
        return 0.0
    busy = blocks / (cdiv(blocks, device.sms) * device.sms)
    drawn = 1e3 * min(1.0, 2 * busy)
    matrix = (device.tflops_16 if itemsize == 2 else device.tflops_32) * 1e6 * TRITON_MATRIX_SHARE * busy
    return max(hbm / (device.hbm_gbs * drawn), l2 / (device.l2_gbs * drawn), flops / matrix)
