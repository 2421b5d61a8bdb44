"""The cost model of the Hopper kernels (`csrc/sm90_*`): the counts of their plans, and the time they predict.

Constants and cuts are those of `csrc/sm90_tiles.h` and `sm90_plan.h`; `tests/kernels` compares the plans with the
extension's own where it is built, and the counts with those of the kernels' own code, emulated on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cost_model import finishing
from .phases import Estimate, Flags, Phase, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import CLUSTER_BYTES, EXCHANGE_US, ROUND_BYTES, SHARED_BYTES, TILE_CYCLES, WGMMA_LEAST, DeviceSpec

_TILE = 256  # columns of left that a block takes, and of dX in the second of two launches
_ROWS = 128  # of a slab
_STEP = 64  # columns of dY, x and dX per step
_MAX_CLUSTER = 8


def rank_tile(R: int) -> int:
    """Columns of left that a kernel is compiled for; R up to them costs the same on chip."""
    return 0 if R == 0 else 64 if R <= 64 else 128 if R <= 128 else _TILE


def adapter_tile(P: int) -> int:
    return 0 if P == 0 else 16 if P <= 16 else 64


def cut(M: int, N: int, K: int, R: int, P: int, sms: int, need_t: bool = True) -> tuple[int, int]:
    """Slabs of 128 rows that share a cluster and the factors' loads, and splits of N and K: what `sm90_plan.h` takes
    for a device that cannot be asked. Its costs are cycles, for comparing."""
    rank, adapter = rank_tile(R), adapter_tile(P)
    width, two = rank + adapter, R > _TILE

    def cost(rows: int, log_splits: int) -> int:
        splits = 1 << log_splits
        on_chip = 128 + width + 2 * (_STEP + rank) + 4 * (_STEP + adapter)
        step = max(on_chip, 128 * (128 + width // rows) // 27)
        steps = cdiv(cdiv(N, _STEP), splits) + (cdiv(cdiv(K, _STEP), splits) if need_t and not two else 0)
        exchange = 1000 + (48 * width * (splits - 1) >> log_splits) if splits > 1 and need_t else 0
        return rounds(M, R, rows, splits, sms) * (steps * step + exchange)

    most = 2 if rank == _TILE else 3  # the splits' shares of T must have room in shared memory
    cuts = [
        (rows, log_splits)
        for rows in (1, 2)
        for log_splits in range(most + 1)
        if rows << log_splits <= min(sms, _MAX_CLUSTER) and rows <= max(1, cdiv(M, _ROWS))
    ]
    rows, log_splits = min(cuts, key=lambda each: cost(*each))
    return rows, 1 << log_splits


def rounds(M: int, R: int, rows: int, splits: int, sms: int) -> int:
    """Clusters that the same multiprocessors take in turn. A cluster lies within a GPC, of 16 or 18 of them."""
    cluster = rows * splits
    in_full_gpcs = sms // 16 * 16 if sms >= 16 and cluster > 2 else sms
    return cdiv(cdiv(cdiv(M, _ROWS), rows) * cdiv(max(R, 1), _TILE), max(1, in_full_gpcs // cluster))


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, cut into clusters of `rows` slabs by `splits` of N and K."""

    M: int
    N: int
    K: int
    R: int  # 0 without dX
    P: int
    flags: Flags
    device: DeviceSpec
    rows: int
    splits: int

    @property
    def rank(self) -> int:
        return rank_tile(self.R)

    @property
    def adapter(self) -> int:
        return adapter_tile(self.P)

    @property
    def two(self) -> bool:
        return self.R > _TILE

    @property
    def need_t_p(self) -> bool:
        return (self.flags.need_dx or self.flags.need_dA) and self.P > 0

    @property
    def slabs(self) -> int:
        return cdiv(self.M, _ROWS)

    @property
    def asked(self) -> int:
        """Times that a factor is read from L2."""
        return cdiv(self.slabs, self.rows)

    @property
    def tiles(self) -> int:
        return cdiv(max(self.R, 1), _TILE)

    @property
    def blocks(self) -> int:
        return self.asked * self.rows * self.splits * self.tiles

    @property
    def rounds(self) -> int:
        return rounds(self.M, self.R, self.rows, self.splits, self.device.sms)

    @property
    def t_width(self) -> int:
        """Columns of T in memory, of two launches."""
        return cdiv(self.R, _STEP) * _STEP + self.adapter

    @property
    def skinny(self) -> float:
        """Tensor cycles of a tile [64, P] over 128 rows."""
        return 8 * max(self.adapter / 2, WGMMA_LEAST)

    def step_n(self) -> Step:
        """64 columns of a slab: two warpgroups, each of 64 rows, multiply what TMA has loaded. dB has one tile of 64
        rows a step and [64, 16]-operands of 128 rows."""
        rank, adapter, flags = self.rank, self.adapter, self.flags
        tensor = product_cycles(self.device, 2, _ROWS, rank, _STEP) + self.skinny * flags.need_dB
        tensor += product_cycles(self.device, 2, _ROWS, adapter * self.need_t_p, _STEP)
        left = 2 * (_STEP + rank) * _STEP * (rank > 0)
        lora_B = 2 * (_STEP + adapter) * _STEP * self.need_t_p
        fill = _STEP * (_ROWS + (rank + adapter) * (rank + self.need_t_p > 0))
        return Step(tensor, 2 * (fill + left + lora_B + (_STEP + adapter) * _ROWS * flags.need_dB))

    def step_k(self) -> Step:
        """The same over K, where the first operand, T, lies in registers and dX is staged on its way out."""
        rank, adapter, flags = self.rank, self.adapter, self.flags
        width = (rank + adapter) * flags.need_dx
        tensor = product_cycles(self.device, 2, _ROWS, _STEP, width) if width else 0.0
        fill = _STEP * (_ROWS * flags.need_dA + width)
        staged = 2 * _ROWS * _STEP * flags.need_dx
        operands = 2 * width * _STEP + (_STEP + adapter) * _ROWS * flags.need_dA
        return Step(tensor + self.skinny * flags.need_dA, 2 * (fill + staged + operands))

    def walk_n(self) -> Phase:
        M, N, flags, added = self.M, self.N, self.flags, not self.flags.deterministic
        dB = self.slabs * N * self.P * 4 * flags.need_dB
        dy = M * N * self.tiles
        xa = M * self.P * self.splits * flags.need_dB
        loaded = 2 * (dy + self.asked * N * (self.R + self.P * self.need_t_p) + xa)
        stored = 2 * M * self.t_width * self.two
        hbm = 2 * (M * N + N * (self.R + self.P) + M * self.P) + dB * (not added) + stored
        flops = self.rank * self.tiles + self.adapter * (self.need_t_p + flags.need_dB)
        return walk(
            "project" if self.two else "walk N",
            self.device,
            self.step_n(),
            cdiv(cdiv(N, _STEP), self.splits),
            self.blocks,
            hbm=hbm,
            l2=l2_traffic(loaded, stored + dB * (not added), dB * added),
            l2_bytes=loaded + stored + dB,
            flops=2 * self.slabs * _ROWS * N * flops,
            rounds=self.rounds,
        )

    def walk_k(self) -> Phase:
        M, K, flags, added = self.M, self.K, self.flags, not self.flags.deterministic
        dA, dX = self.slabs * K * self.P * 4 * flags.need_dA, 2 * M * K * flags.need_dx
        loaded = 2 * (M * K * flags.need_dA + self.asked * K * (self.R + self.P) * flags.need_dx)
        return walk(
            "walk K",
            self.device,
            self.step_k(),
            cdiv(cdiv(K, _STEP), self.splits),
            self.blocks,
            hbm=dX + 2 * (M * K * flags.need_dA + (self.R + self.P) * K) + dA * (not added),
            l2=l2_traffic(loaded, dX + dA * (not added), dA * added),
            l2_bytes=loaded + dX + dA,
            flops=2
            * self.slabs
            * _ROWS
            * K
            * ((self.rank + self.adapter) * flags.need_dx + self.adapter * flags.need_dA),
            rounds=self.rounds,
            kernels=0,
        )

    def exchange(self) -> Phase:
        """The splits of a slab add up T: of each value 4 bytes go to its owner from each other split, and 2 come back.
        Its own a split keeps in registers; what comes lands in shared memory and is read there once."""
        others = self.splits - 1
        remote = 6 * others * _ROWS * (self.rank + self.adapter) / self.splits
        cycles = remote / CLUSTER_BYTES + 2 * remote / SHARED_BYTES
        us = self.rounds * (EXCHANGE_US + cycles / (self.device.clock_ghz * 1e3))
        pushed = 6 * self.slabs * self.tiles * others * _ROWS * (self.rank + self.adapter)
        return Phase("exchange", latency_us=us, l2_bytes=pushed)

    def expand(self) -> Phase:
        """The second launch: tiles [128, 256] of dX, as many in turn for every block. T of a slab stays in shared
        memory for the tiles of a block there; what is read of it lies in L2."""
        M, K, flags, added = self.M, self.K, self.flags, not self.flags.deterministic
        columns = cdiv(K, _TILE)
        in_turn = cdiv(self.asked * columns, self.device.sms // self.rows)
        clusters = cdiv(self.asked * columns, in_turn)
        visits = min(self.asked * columns, clusters + self.asked - 1) * self.rows  # of a block to a slab
        width = self.t_width
        dA, dX = self.slabs * K * self.P * 4 * flags.need_dA, 2 * M * K
        loaded = 2 * (visits * _ROWS * width + self.asked * K * (self.R + self.P) + M * K * flags.need_dA)
        return walk(
            "expand",
            self.device,
            self.tile(),
            in_turn,
            clusters * self.rows,
            hbm=dX + 2 * (M * K * flags.need_dA + (self.R + self.P) * K) + dA * (not added),
            l2=l2_traffic(loaded, dX + dA * (not added), dA * added),
            l2_bytes=loaded + dX + dA,
            flops=2 * self.slabs * _ROWS * K * (width + self.adapter * flags.need_dA),
            rounds=1,
        )

    def tile(self) -> Step:
        """A tile [128, 256] of dX in the second launch: the first operand, T, is there; dX is staged on its way out,
        and nothing is multiplied meanwhile."""
        width, steps_dA = self.t_width, _TILE // _STEP * self.flags.need_dA
        tensor = product_cycles(self.device, 2, _ROWS, _TILE, width) + steps_dA * self.skinny
        fill = width * _TILE + steps_dA * _ROWS * _STEP
        operands = 2 * (_STEP + _TILE) * width + steps_dA * (_STEP + self.adapter) * _ROWS
        return Step(tensor, 2 * (fill + operands + 2 * _ROWS * _TILE), tensor + TILE_CYCLES)

    def small(self) -> Phase:
        """One fill of the workspace, and the rounding of the sums to 16 bits at the kernel's end, by one multiprocessor
        for each split of N and K. (Adapters in fp32 have none of it, and PyTorch casts them before.)"""
        flags = self.flags
        if flags.deterministic:
            without_bias = replace(flags, need_dbias=False, dropout=False)
            return finishing(self.N, self.K, self.P, without_bias, self.device, 2, self.slabs)
        sums = self.N * self.P * flags.need_dB + self.K * self.P * flags.need_dA
        fill = passes("small", self.device, 4 * sums, kernels=int(sums > 0))
        rounding = 6 * sums / self.splits / (ROUND_BYTES * self.device.clock_ghz * 1e3)
        return replace(fill, launch_us=fill.launch_us + rounding)


def estimate_sm90(M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec) -> Estimate:
    """One launch, or two for R beyond 256."""
    need_t = flags.need_dx or flags.need_dA
    real = R if flags.need_dx else 0
    rows, splits = cut(M, N, K, real, P, device.sms, need_t)
    p = Problem(M, N, K, real, P, flags, device, rows, splits)
    phases = [p.walk_n()]
    if need_t and splits > 1:
        phases.append(p.exchange())
    if need_t:
        phases.append(p.expand() if p.two else p.walk_k())
    phases.append(p.small())
    if flags.need_dbias:
        phases.append(passes("db", device, 2 * M * N))
    return Estimate("cuda sm90", tuple(phases), None, p.blocks, p.blocks / device.sms)
