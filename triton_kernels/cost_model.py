"""The cost model of the Triton kernels: the bytes, flops and steps of each form, and the time they predict.

The bytes are exact: for the one-launch kernel they equal, tensor by tensor, what the interpreter counts. A walk over N
and a walk over K have bounds of their own (`phases`), and add up. What PyTorch takes is in `library`, the CUDA kernels
are in `cost_cuda`, and exact backward passes in `dense`; all rates are in `rates`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig, padded, tile_k, uses_wgmma
from .phases import Estimate, Flags, Phase, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import (
    KERNEL_US,
    PASS,
    SHARED_BYTES,
    SM_DRAW,
    TRITON_MATRIX_SHARE,
    TRITON_STORE_K,
    TRITON_STORE_N,
    TRITON_TILE,
    TRITON_WAIT,
    WALK_US,
    DeviceSpec,
)

__all__ = [
    "Estimate",
    "Flags",
    "Traffic",
    "cdiv",
    "estimate_forward",
    "estimate_one_launch",
    "estimate_two_launch",
    "finishing",
    "k_chunk_of",
    "n_chunk_of",
    "predicted_bytes",
    "triton_flops",
    "useful_flops",
]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a kernel loads from and stores to (or adds to by atomics) one tensor, through any cache."""

    loaded: int = 0
    stored: int = 0


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


def finishing(N: int, K: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int, slabs: int) -> Phase:
    """The small kernels around ours: one zero fill and, for 16-bit adapters, a cast of each fp32 gradient; without
    atomics a sum over the slabs of each instead of the fill."""
    elements = [P * K] * flags.need_dA + [N * P] * flags.need_dB + [N] * flags.need_dbias
    read = slabs if flags.deterministic else 0
    fills = len(elements) if flags.deterministic else min(1, len(elements))
    kernels = fills + len(elements) * (itemsize == 2)
    nbytes = sum(elements) * (4 * (1 + read) + (4 + itemsize) * (itemsize == 2))
    return passes("small", device, nbytes, kernels)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """A slab's tiles in one form: rows, columns of a step, the padded ranks that it holds (0: without). kept: elements
    of T in shared memory."""

    device: DeviceSpec
    itemsize: int
    rows: int
    step: int
    rank: int
    adapter: int
    num_stages: int
    kept: int = 0

    def _products(self, rows: int, width: int, depth: int) -> float:
        return product_cycles(self.device, self.itemsize, rows, width, depth)

    def _step(
        self, wide: float, thin: float, waits: int, moved: int, operands: int, stores: float, in_flight: bool
    ) -> Step:
        """`moved` elements are loaded or staged, `operands` are read from shared memory; `in_flight`: while the wide
        product is computed."""
        rest = moved * self.itemsize / SHARED_BYTES + stores
        latency = thin + waits * TRITON_WAIT + (max(wide, rest) if in_flight else wide + rest)
        return Step(wide + thin, (moved + operands) * self.itemsize, latency)

    def over_n(self, need_db: bool, need_t_p: bool) -> Step:
        """dBᵀ, a wait, then T += dY [left | lora_B] and all else."""
        rows, step, p = self.rows, self.step, self.adapter
        wide = self._products(rows, self.rank, step) + self._products(rows, p * need_t_p, step)
        thin = self._products(step, p * need_db, rows)
        operands = rows // 64 * step * (64 + self.rank) + (rows + p) * step * need_t_p + (step + p) * rows * need_db
        in_flight = uses_wgmma(self.device.capability, self.itemsize * 8)
        return self._step(wide, thin, 1, step * (rows + self.rank + p), operands, TRITON_STORE_N, in_flight)

    def over_k(self, need_dx: bool, need_dA: bool) -> Step:
        """dAᵀ, the adapter's part of dX and T right, a wait for each, and all else; dX is staged on its way out."""
        rows, step, p = self.rows, self.step, self.adapter
        wide = self._products(rows, step, self.rank) if need_dx else 0.0
        thin = self._products(rows, step, p) if need_dx and p else 0.0
        thin += self._products(step, p * need_dA, rows)
        moved = step * (rows * need_dA + (self.rank + p) * need_dx) + 2 * rows * step * need_dx
        operands = (max(1, rows // 64) * (self.rank + p) * step + self.kept) * need_dx + (step + p) * rows * need_dA
        return self._step(wide, thin, 3, moved, operands, TRITON_STORE_K, in_flight=False)

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds at once, one or two: by the ring of stages, T, xa and the tile of dX on
        its way out, of which each block has its own."""
        ring = self.num_stages * self.step * (self.rows + self.rank + self.adapter)
        held = (ring + self.kept + self.rows * (self.adapter + self.step)) * self.itemsize + 1024
        return 2 if 2 * held <= self.device.shared_bytes else 1


def estimate_one_launch(
    M: int, N: int, K: int, R: int, P: int, config: OneLaunchConfig, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """One block a slab: a walk over N, a walk over K, and the small kernels."""
    blocks = cdiv(M, config.block_m)
    rows = blocks * config.block_m
    t = predicted_bytes(M, N, K, R, P, config, flags, itemsize)
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    rank, pad_p = (padded(R) if R and flags.need_dx else 0), (padded(P) if P else 0)

    def moved(*names: str) -> int:
        return sum(t[name].loaded + t[name].stored for name in names if name in t)

    def stored(*names: str) -> int:
        return sum(t[name].stored for name in names if name in t)

    def tiles(step: int) -> _Tiles:
        return _Tiles(device, itemsize, config.block_m, step, rank, pad_p, config.num_stages)

    added = 0 if flags.deterministic else 1
    first, second = ("dy", "left", "lora_B", "xa", "dB", "dbias"), ("right", "lora_A", "x", "dx", "dA", "seed")
    partials = stored("dB", "dbias"), stored("dA")
    ends = M * K * (flags.need_dx + flags.need_dA) + (R + P) * K * flags.need_dx
    resident = min(tiles(config.block_n).resident, tiles(config.block_k).resident)
    phases = [
        walk(
            "walk N",
            device,
            tiles(config.block_n).over_n(flags.need_dB, need_t_p),
            cdiv(N, config.block_n),
            blocks,
            hbm=(M * N + N * (R * flags.need_dx + P) + M * P * flags.need_dB) * itemsize + partials[0] * (not added),
            l2=l2_traffic(moved(*first) - partials[0], partials[0] * (not added), partials[0] * added),
            l2_bytes=moved(*first),
            flops=2 * rows * N * (rank + pad_p * need_t_p + pad_p * flags.need_dB),
            resident=resident,
        )
    ]
    if flags.need_dx or flags.need_dA:
        dx = stored("dx")
        phases.append(
            walk(
                "walk K",
                device,
                tiles(config.block_k).over_k(flags.need_dx, flags.need_dA),
                cdiv(K, config.block_k),
                blocks,
                hbm=ends * itemsize + partials[1] * (not added),
                l2=l2_traffic(moved(*second) - dx - partials[1], dx + partials[1] * (not added), partials[1] * added),
                l2_bytes=moved(*second),
                flops=2 * rows * K * ((rank + pad_p) * flags.need_dx + pad_p * flags.need_dA),
                kernels=0,
            )
        )
    phases.append(finishing(N, K, P, flags, device, itemsize, blocks))
    return Estimate("one_launch", tuple(phases), config, blocks, blocks / (device.sms * resident))


def n_chunk_of(M: int, N: int, R: int, config: TwoLaunchConfig, sms: int) -> int:
    """The columns of dY a block of `project` walks: few enough to fill the card, but at least four steps."""
    blocks = cdiv(M, config.block_m) * max(1, cdiv(R, config.project_r))
    splits = max(1, min(sms // max(blocks, 1), N // (4 * config.block_n), 16))
    return max(1, cdiv(cdiv(N, config.block_n), splits)) * config.block_n


def k_chunk_of(M: int, K: int, R: int, config: TwoLaunchConfig, flags: Flags, sms: int) -> int:
    """The columns of dX a block of the second launch writes: a tile, or what fills the card with slabs."""
    if padded(R) > config.project_r:
        return tile_k(config, flags.dropout)
    splits = max(1, min(sms // max(cdiv(M, config.block_m), 1), K // (2 * config.block_k)))
    return max(1, cdiv(cdiv(K, config.block_k), splits)) * config.block_k


def estimate_two_launch(
    M: int, N: int, K: int, R: int, P: int, config: TwoLaunchConfig, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """`project` and an `expand` one after the other, T between them; where N is split, its fp32 parts and their sum."""
    rows = cdiv(M, config.block_m)
    rank = R if flags.need_dx else 0
    rank_tiles = max(1, cdiv(rank, config.project_r))
    n_chunk = n_chunk_of(M, N, rank, config, device.sms)
    splits = cdiv(N, n_chunk)
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    columns = rank + P * need_t_p
    padded_m = rows * config.block_m
    tile_r = min(config.project_r, padded(rank)) if rank else 0
    pad_p = padded(P) if P else 0
    t = padded_m * (rank_tiles * tile_r + pad_p * need_t_p)  # elements, whole tiles
    t_stored = t * itemsize if splits == 1 else t * splits * 4

    sums = rows * N * (P * flags.need_dB + flags.need_dbias) * 4
    added = (sums + t_stored * (splits > 1)) * (not flags.deterministic)
    stored = sums + t_stored - added
    loaded = M * N * rank_tiles * itemsize + rows * N * columns * itemsize + M * P * itemsize * flags.need_dB * splits
    tiles = _Tiles(device, itemsize, config.block_m, config.block_n, tile_r, pad_p, config.num_stages)
    blocks = rows * rank_tiles * splits
    phases = [
        walk(
            "project",
            device,
            tiles.over_n(flags.need_dB, need_t_p),
            cdiv(n_chunk, config.block_n),
            blocks,
            hbm=(M * N + N * columns) * itemsize + t_stored // (1 if flags.deterministic else splits),
            l2=l2_traffic(loaded, stored, added),
            l2_bytes=loaded + stored + added,
            flops=2 * padded_m * N * (rank_tiles * tile_r + pad_p * need_t_p + pad_p * flags.need_dB),
            resident=tiles.resident,
        )
    ]
    layers = 0 if splits == 1 else splits if flags.deterministic else 1
    if t and layers == 1:
        phases.append(passes("fill", device, t * 4))
    if t and layers and padded(R) > config.project_r:  # summed and rounded by PyTorch
        nbytes = t * (4 + itemsize) * (itemsize == 2) + t * 4 * (layers + 1) * (layers > 1)
        phases.append(passes("sum T", device, nbytes, (itemsize == 2) + (layers > 1)))
        layers = 0
    if flags.need_dx or flags.need_dA:
        phases.append(_expand(M, K, R, P, config, flags, device, itemsize, layers))
    phases.append(finishing(N, K, P, flags, device, itemsize, rows))
    return Estimate("two_launch", tuple(phases), config, blocks, blocks / (device.sms * tiles.resident))


def _expand(
    M: int,
    K: int,
    R: int,
    P: int,
    config: TwoLaunchConfig,
    flags: Flags,
    device: DeviceSpec,
    itemsize: int,
    layers: int,
) -> Phase:
    """The second launch: slabs that keep T on chip for a chunk of K, or tiles that read it anew for every tile of K.
    `layers` of fp32 parts, which a slab sums, writes and reads again before it walks."""
    rows, k_chunk = cdiv(M, config.block_m), k_chunk_of(M, K, R, config, flags, device.sms)
    slab = padded(R) <= config.project_r
    k_blocks = cdiv(K, k_chunk)
    blocks = rows * k_blocks
    rank, pad_p = (R if flags.need_dx else 0), (padded(P) if P else 0)
    pad_r = cdiv(rank, config.tile_r) * config.tile_r if not slab else padded(rank) if rank else 0
    t = config.block_m * (pad_r + pad_p)  # elements of a slab
    if slab:
        tiles = _Tiles(device, itemsize, config.block_m, config.block_k, pad_r, pad_p, config.slab_stages, t)
        step, steps, resident = (
            tiles.over_k(flags.need_dx, flags.need_dA),
            cdiv(k_chunk, config.block_k),
            tiles.resident,
        )
    else:  # a tile starts while others multiply
        step, steps = _tile(k_chunk, rank, pad_p, config, flags, device, itemsize), 1
        resident = cdiv(blocks, device.sms)
    ends, seeds = M * K * itemsize, blocks * 16 * flags.dropout
    loaded = blocks * t * itemsize + ends * flags.need_dA + rows * K * (R + P) * itemsize * flags.need_dx + seeds
    sums = rows * P * K * 4 * flags.need_dA
    written = ends * flags.need_dx + sums * flags.deterministic
    added = sums * (not flags.deterministic)
    summed = t * (4 * layers + itemsize * (layers > 0))  # bytes of a block, at its own rate
    return walk(
        "expand",
        device,
        step,
        steps,
        blocks,
        hbm=rows * t * itemsize + ends * (flags.need_dx + flags.need_dA) + (rank + P) * K * itemsize + sums - added,
        l2=l2_traffic(loaded, written, added),
        l2_bytes=loaded + written + added + blocks * summed,
        flops=2 * rows * config.block_m * K * ((pad_r + pad_p) * flags.need_dx + pad_p * flags.need_dA),
        resident=resident,
        start_us=WALK_US + summed * device.sms / (device.l2_gbs * 1e3 * SM_DRAW),
    )


def _tile(
    columns: int, rank: int, pad_p: int, config: TwoLaunchConfig, flags: Flags, device: DeviceSpec, itemsize: int
) -> Step:
    """A whole tile of `expand_tiles`: nothing in its loop over the rank waits, all around it does."""
    rows, steps = config.block_m, cdiv(rank, config.tile_r)
    tiles = _Tiles(device, itemsize, rows, config.tile_r, columns, pad_p, config.num_stages)
    tensor = steps * product_cycles(device, itemsize, rows, columns, config.tile_r)
    tensor += product_cycles(device, itemsize, rows, columns, pad_p) if flags.need_dx else 0.0
    tensor += product_cycles(device, itemsize, columns, pad_p * flags.need_dA, rows)
    moved = rows * columns * itemsize * (2 * flags.need_dx + flags.need_dA)
    operands = (max(1, rows // 64) * (64 + columns) + rows + columns) * steps * config.tile_r * itemsize
    return Step(tensor, moved + operands, (tensor + moved / SHARED_BYTES + TRITON_TILE) / tiles.resident)


def triton_flops(device: DeviceSpec, itemsize: int, times: float = 1.0) -> float:
    """Flops a cycle of a multiprocessor in a pipelined Triton product; `times` the 16-bit rate for 8 bits."""
    tflops = device.tflops_32 if itemsize == 4 else device.tflops_16_sustained * times
    return tflops * TRITON_MATRIX_SHARE * 1e3 / (device.sms * device.clock_ghz)


def estimate_forward(
    M: int, N: int, K: int, P: int, config: ForwardConfig, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """`fused_forward`: tiles of x and W from L2, the adapter's columns recomputed in every column of tiles."""
    rows, columns = cdiv(M, config.block_m), cdiv(N, config.block_n)
    hbm = (M * K + N * K + M * N + (N + K + M) * P) * itemsize
    loaded = (columns * M * K + rows * N * K + columns * P * K * rows) * itemsize
    flops = 2 * rows * config.block_m * (N * K + columns * padded(P) * K + N * padded(P))
    blocks = rows * columns
    tile = config.block_m * config.block_n, config.block_m * padded(P)
    cycles = sum(2 * size * config.block_k for size in tile) / triton_flops(device, itemsize)
    return Estimate(
        "forward",
        (
            walk(
                "product",
                device,
                Step(cycles, 0.0),
                cdiv(K, config.block_k),
                blocks,
                hbm=hbm,
                l2=l2_traffic(loaded, M * N * itemsize, 0),
                l2_bytes=loaded + M * N * itemsize,
                flops=flops,
                share=PASS,
                start_us=KERNEL_US,
            ),
        ),
        config,
        blocks,
        blocks / device.sms,
    )
