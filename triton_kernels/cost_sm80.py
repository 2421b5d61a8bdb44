"""The cost model of the Ampere kernels, two launches of persistent blocks: cuts and counts of `csrc/sm80_plan.h`."""

from __future__ import annotations

from typing import NamedTuple

from .phases import Flags, Phase, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import COLUMN_WALK, L2_KEPT, DeviceSpec

_ROWS = 128  # of a slab of the second launch
_PARTS_IN_L2 = 40 << 20  # bytes of parts of dB, beyond which slabs are twice as high
_WARPS = 8
_FRAGMENT = 512  # bytes that one ldmatrix reads
_DRAW = 40  # bytes a cycle that a multiprocessor draws from L2 while few do
_IN_FLIGHT = 8  # parts of dB that a thread has on their way
_L2_US = 0.5  # a read of L2 while all multiprocessors read


class Cut(NamedTuple):
    """How a problem is cut: tiles [rows, columns] of T, `across` side by side, walked in steps of N; tiles [128, width]
    of dX; and the blocks of either launch."""

    rows: int
    columns: int
    across: int
    adapter: int
    step: int
    steps: int
    slabs: int
    project_blocks: int
    width: int
    tiles: int
    expand_blocks: int


def plan(M: int, N: int, K: int, R: int, P: int, flags: Flags, sms: int, shared_bytes: int = 166912) -> Cut:
    rank, adapter = R if flags.need_dx else 0, 0 if P == 0 else 16 if P <= 16 else 64
    columns = 0 if rank == 0 else 64 if rank <= 64 else 128 if rank <= 128 or 256 < rank <= 384 else 256

    def step_of(columns: int) -> int:
        return 32 if columns + adapter > 288 else 64

    def project_stages(rows: int, columns: int) -> int:
        return (shared_bytes - 2 * rows * adapter) // (2 * step_of(columns) * (rows + columns + adapter))

    while columns > 64 and project_stages(128, columns) < 2:
        columns //= 2
    much = flags.need_dB and cdiv(M, 128) * N * P * 4 > _PARTS_IN_L2
    rows = 256 if much and columns <= 128 and adapter == 16 and project_stages(256, columns) >= 2 else 128
    steps, slabs = cdiv(N, step_of(columns)), cdiv(M, rows)
    across = cdiv(rank, columns) if columns else 1
    fewest = 1
    while 2 * fewest * fewest < 3 * steps:
        fewest += 1
    depth = rank + P if rank else 0

    def expand_stages(width: int) -> int:
        fixed = 256 * (width * (adapter > 0) + adapter) + cdiv(depth, 16) * 32 * width
        return (shared_bytes - fixed) // (256 * (32 if width + adapter > 160 else 64))

    width = 128 if expand_stages(128) >= 2 else 64
    tiles = cdiv(K, width) * cdiv(M, _ROWS) if flags.need_dx or flags.need_dA else 0
    sums = cdiv(steps * step_of(columns) * P, 1024) * flags.need_dB
    first = min(sms, max(slabs * across, slabs * across * steps // fewest))
    second = max(1, min(sms, max(tiles, sums)))
    return Cut(rows, columns, across, adapter, step_of(columns), steps, slabs, first, width, tiles, second)


def occupancy(M: int, N: int, R: int, P: int, flags: Flags, device: DeviceSpec) -> tuple[int, float]:
    """Blocks of the first launch, over multiprocessors."""
    blocks = plan(M, N, 64, R, P, flags, device.sms).project_blocks
    return blocks, blocks / device.sms


def phases(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int
) -> tuple[Phase, ...]:
    cut = plan(M, N, K, R, P, flags, device.sms)
    rank, t_p = R if flags.need_dx else 0, P if flags.need_dx or flags.need_dA else 0
    steps = cut.slabs * cut.across * cut.steps
    each = cdiv(steps, max(1, cut.project_blocks))
    # Parts of dB: of each block the steps of N that it has come by; coming by again it reads and writes them. What L2
    # cannot keep of them until the second launch goes to memory and back.
    kept = min(each, cut.steps) * cut.project_blocks * cut.step * P * 4 * flags.need_dB
    again = max(0, cut.slabs * cut.steps * cut.step * P * 4 * flags.need_dB - kept)
    lost = int(max(0, kept - L2_KEPT * device.l2_bytes))
    spilled = lost + 2 * again * (lost > 0)
    shared_tiles, parts = _shared(cut.slabs * cut.across, cut.project_blocks)
    part = cut.rows * (cut.columns + cut.adapter) * 4 * (rank + t_p > 0)
    t = M * (rank + t_p) * itemsize
    loaded = (cut.across * M * N + cut.slabs * N * (rank + t_p) + M * P * flags.need_dB) * itemsize
    project = walk(
        "project",
        device,
        _project_step(device, cut, flags, t_p > 0),
        each,
        cut.project_blocks,
        hbm=(cut.across * M * N + N * (rank + t_p) + M * P * flags.need_dB) * itemsize + t + spilled,
        l2=l2_traffic(loaded + again + parts * part, t + kept + again + parts * part, 0),
        l2_bytes=loaded + t + kept + 2 * again + 2 * parts * part,
        flops=2 * cut.slabs * cut.rows * N * (cut.across * cut.columns + cut.adapter * ((t_p > 0) + flags.need_dB)),
        rounds=1,
    )
    found = [project]
    if parts:  # the last block of a tile adds up
        cycles = parts / shared_tiles * part / _DRAW
        found.append(Phase("parts of T", latency_us=cycles / (device.clock_ghz * 1e3)))
    if kept:
        sums = cdiv(N * P // 4, 256 * cut.expand_blocks) * cdiv(cut.project_blocks, _IN_FLIGHT)
        dB = Phase(
            "parts of dB",
            hbm_us=lost / (device.hbm_gbs * 1e3 * COLUMN_WALK),
            l2_us=kept / (device.l2_gbs * 1e3),
            latency_us=sums * _L2_US,
            hbm_bytes=lost,
            l2_bytes=kept,
        )
        found.append(dB)
    across = cdiv(K, cut.width)
    # Coming to other columns, a block loads theirs.
    factors = (across + cut.expand_blocks) * cut.width * (rank + P) * itemsize * flags.need_dx
    x, dx = M * K * itemsize * flags.need_dA, M * K * itemsize * flags.need_dx
    loaded = across * M * ((rank + P) * flags.need_dx + P * flags.need_dA) * itemsize + x + factors
    gradients = (K * flags.need_dA + N * flags.need_dB) * P * 4
    found.append(
        walk(
            "expand",
            device,
            _expand_tile(device, cut, rank + P if rank else 0, flags),
            cdiv(cut.tiles, cut.expand_blocks),
            cut.expand_blocks,
            hbm=t + x + dx + (rank + P) * K * itemsize * flags.need_dx + gradients,
            l2=l2_traffic(loaded, dx + gradients, 0),
            l2_bytes=loaded + dx + gradients,
            flops=2 * cut.tiles * _ROWS * cut.width * ((rank + P) * flags.need_dx + cut.adapter * flags.need_dA),
            rounds=1,
        )
    )
    found.append(passes("small", device, 4 * (cut.project_blocks + cut.expand_blocks)))
    if flags.need_dbias:
        found.append(passes("db", device, M * N * itemsize))
    return tuple(found)


def _shared(tiles: int, blocks: int) -> tuple[int, int]:
    """Of `tiles` that `blocks` cut into equal shares: how many are cut, and into how many parts."""
    if blocks == 0 or tiles % blocks == 0:
        return 0, 0
    cut = min(tiles, blocks - 1)
    return cut, cut + blocks - 1


def _warp_tiles(rows: int, width: int) -> tuple[int, int]:
    """A warp's fragments [16, 16] of a product of `rows` by `width` columns."""
    across = 2 if width <= rows // 2 else 4
    return rows * across // (_WARPS * 16), width // across // 16


def _project_step(device: DeviceSpec, cut: Cut, flags: Flags, need_t_p: bool) -> Step:
    """Of the tiles that lie side by side one has the adapter's products: its share."""
    adapter = cut.adapter / cut.across
    skinny = product_cycles(device, 2, cut.rows, cut.adapter, cut.step) / cut.across
    tensor = product_cycles(device, 2, cut.rows, cut.columns, cut.step) + skinny * (need_t_p + flags.need_dB)
    rows, columns = _warp_tiles(cut.rows, cut.columns) if cut.columns else (cut.rows // (_WARPS * 16), 0)
    fragments = cut.step // 16 * (rows + columns + adapter / 16 * need_t_p)
    if flags.need_dB and cut.adapter:
        tiles = cut.adapter // 8 * (cut.step // 16) // _WARPS
        fragments += cut.rows // 16 * (1 + tiles / 2) / cut.across
    fill = 2 * cut.step * (cut.rows + cut.columns + adapter * need_t_p)
    return Step(tensor, fill + fragments * _WARPS * _FRAGMENT)


def _expand_tile(device: DeviceSpec, cut: Cut, depth: int, flags: Flags) -> Step:
    """The factors' columns are there; T, x and T_P are loaded, and dX is written from registers."""
    tensor = product_cycles(device, 2, _ROWS, cut.width, depth) * flags.need_dx
    tensor += product_cycles(device, 2, _ROWS, cut.adapter, cut.width) * flags.need_dA
    rows, columns = _warp_tiles(_ROWS, cut.width)
    fragments = cdiv(depth, 16) * (rows + columns) * flags.need_dx
    fragments += (8 * (cut.adapter // 16) + 4 * (cut.width // 64)) * flags.need_dA
    fill = 256 * (depth * flags.need_dx + (cut.width + cut.adapter) * flags.need_dA)
    return Step(tensor, fill + fragments * _WARPS * _FRAGMENT)
