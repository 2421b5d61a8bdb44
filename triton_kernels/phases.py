"""What a prediction is made of: phases, each with its counts and its bounds, and their sum.

A phase is a part of a candidate that starts when the one before it has ended: a walk over N, a walk over K, a product,
a pass. Its time is the longest of its five bounds, and what its launches take beside them:

    HBM       unique bytes at the device's copy rate
    L2        bytes into and out of multiprocessors; stores count half, atomics as two stores
    tensor    products, with their padding, at the matrix units' rate
    shared    bytes through shared memory of the busiest multiprocessor
    latency   what one step waits for, one step after the other, on the busiest multiprocessor
"""

from __future__ import annotations

from dataclasses import dataclass

from .configs import Config, padded, uses_wgmma
from .rates import (
    COLUMN_WALK,
    HOST_CALL_US,
    HOST_KERNEL_US,
    KERNEL_US,
    L2_WRITE,
    OVERLAP,
    PASS,
    SHARED_BYTES,
    SM_DRAW,
    SM_DRAW_HBM,
    WALK_US,
    WGMMA_LEAST,
    DeviceSpec,
)

BOUNDS = ("hbm", "l2", "tensor", "shared", "latency")


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
class Phase:
    """Counts and bounds of one phase; times in microseconds, bytes as counted, flops with padding."""

    name: str
    hbm_us: float = 0.0
    l2_us: float = 0.0
    tensor_us: float = 0.0
    shared_us: float = 0.0
    latency_us: float = 0.0
    launch_us: float = 0.0  # gaps before its kernels, and their starts and ends
    kernels: int = 0
    hbm_bytes: int = 0
    l2_bytes: int = 0
    flops: int = 0

    @property
    def bound_us(self) -> float:
        """The longest of the bounds, and a little of those that come near it (`OVERLAP`)."""
        bounds = [float(getattr(self, f"{bound}_us")) for bound in BOUNDS]
        longest = max(bounds)
        return longest * sum((us / longest) ** OVERLAP for us in bounds) ** (1 / OVERLAP) if longest else 0.0

    @property
    def us(self) -> float:
        return self.bound_us + self.launch_us

    @property
    def limit(self) -> str:
        """The bound that holds it, or "launches"."""
        if self.launch_us >= self.bound_us:
            return "launches"
        return max(BOUNDS, key=lambda bound: float(getattr(self, f"{bound}_us")))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one candidate costs: the sum of its phases.

    precision: of the dense product, for candidates that have one.   waves: blocks over what is resident at once.
    """

    form: str
    phases: tuple[Phase, ...]
    config: Config | None = None
    blocks: int = 0
    waves: float = 0.0
    precision: str = ""

    @property
    def name(self) -> str:
        return f"{self.form} {self.precision}".strip()

    @property
    def predicted_us(self) -> float:
        return sum(phase.us for phase in self.phases)

    @property
    def launch_us(self) -> float:
        return sum(phase.launch_us for phase in self.phases)

    @property
    def kernels(self) -> int:
        return sum(phase.kernels for phase in self.phases)

    @property
    def hbm_bytes(self) -> int:
        return sum(phase.hbm_bytes for phase in self.phases)

    @property
    def l2_bytes(self) -> int:
        return sum(phase.l2_bytes for phase in self.phases)

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.phases)

    @property
    def host_us(self) -> float:
        """What the host takes to issue it: the floor of the call where no queue hides it."""
        return HOST_CALL_US + HOST_KERNEL_US * self.kernels

    def bound_us(self, bound: str) -> float:
        """Microseconds of one of `BOUNDS`, summed over the phases."""
        return float(sum(getattr(phase, f"{bound}_us") for phase in self.phases))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def matrix_tflops(device: DeviceSpec, itemsize: int) -> float:
    return device.tflops_16 if itemsize == 2 else device.tflops_32


def l2_traffic(loaded: float, stored: float, added: float) -> float:
    """Bytes between L2 and the multiprocessors, as much as loaded ones: stores at half, atomics at twice a store."""
    return loaded + L2_WRITE * (stored + 2 * added)


def product_cycles(device: DeviceSpec, itemsize: int, rows: int, width: int, depth: int) -> float:
    """Cycles of a multiprocessor's matrix units for [rows, depth] @ [depth, width]; 0 for an empty product. A width of
    16, an adapter's, costs wgmma two and a half times its flops."""
    if width == 0:
        return 0.0
    if uses_wgmma(device.capability, itemsize * 8):
        return cdiv(rows, 64) * cdiv(depth, 16) * max(padded(width) / 2, WGMMA_LEAST)
    rate = matrix_tflops(device, itemsize) * 1e3 / (device.sms * device.clock_ghz)  # flops a cycle
    return 2 * rows * padded(width) * depth / rate


@dataclass(frozen=True, slots=True)
class Step:
    """Cycles that one step of a block's walk takes of its multiprocessor, by bound; steps of blocks on the same
    multiprocessor add up."""

    tensor: float
    shared: float  # bytes
    latency: float = 0.0


def walk(
    name: str,
    device: DeviceSpec,
    step: Step,
    steps: int,
    blocks: int,
    *,
    hbm: int,
    l2: float,
    l2_bytes: int,
    flops: int,
    resident: int = 1,
    rounds: int | None = None,
    kernels: int = 1,
    share: float = COLUMN_WALK,
    start_us: float = WALK_US,
) -> Phase:
    """A grid of `blocks` of which each takes `steps` steps; `resident` fit on a multiprocessor at once, and the busiest
    one has `rounds` in all. `kernels` = 0: it goes on in the kernel of the phase before. `share` of the copy rate;
    `start_us` of each round of resident blocks."""
    if blocks == 0:
        return Phase(name)
    in_turn = cdiv(blocks, device.sms) if rounds is None else rounds
    busy = min(1.0, blocks / (in_turn * device.sms))
    us = in_turn * steps / (device.clock_ghz * 1e3)
    return Phase(
        name,
        hbm_us=hbm / (device.hbm_gbs * 1e3 * share * min(1.0, SM_DRAW_HBM * busy)),
        l2_us=l2 / (device.l2_gbs * 1e3 * min(1.0, SM_DRAW * busy)),
        tensor_us=us * step.tensor,
        shared_us=us * step.shared / SHARED_BYTES,
        latency_us=us * step.latency,
        launch_us=kernels * (device.gap_us + start_us * cdiv(in_turn, resident)),
        kernels=kernels,
        hbm_bytes=hbm,
        l2_bytes=l2_bytes,
        flops=flops,
    )


def passes(name: str, device: DeviceSpec, nbytes: int, kernels: int = 1, share: float = PASS) -> Phase:
    """Elementwise kernels of a library that move `nbytes` in all."""
    return Phase(
        name,
        hbm_us=nbytes / (device.hbm_gbs * 1e3 * share),
        launch_us=kernels * (device.gap_us + KERNEL_US),
        kernels=kernels,
        hbm_bytes=nbytes,
        l2_bytes=nbytes,
    )
