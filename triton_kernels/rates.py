"""Every rate and share that a prediction rests on, once, each with its source.

Sources: [H200] measured on one, `bench/results/h200`; [sheet] the device's data sheet; [review] a review of the kernels
on paper, from compiled code, published measurements and counts, good to 15 % (kernels) and 20 % (cuBLAS's skinny
products, PyTorch's passes); [compiled] read from the machine code. `bench linear` measures the fields of `MEASURED` on
a GPU and keeps them in the user's table, from where `devices.device_spec` puts them in the place of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Width of a product's narrow side, a rank, and the share of the matrix rate that cuBLAS reaches there: it wastes tiles
# and fills its pipeline for few columns. [review]
_NARROW = ((80, 0.32), (144, 0.45), (272, 0.56), (528, 0.72), (4096, 1.0))


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Attainable rates, not peak ones: bandwidths in GB/s, matrix rates in TFLOP/s, sizes in bytes."""

    name: str
    capability: tuple[int, int]
    sms: int
    hbm_gbs: float  # of a large copy
    l2_gbs: float  # from L2 into all multiprocessors together
    l2_bytes: int
    shared_bytes: int  # per block, opt-in
    tflops_16: float  # of a large cuBLAS product in a short run
    tflops_16_sustained: float  # of the same in a training step of a second, under the power limit
    tflops_32: float
    clock_ghz: float  # of a multiprocessor under load
    skinny: float  # share of hbm_gbs of cuBLAS products that read a wide operand against some 16 columns
    int8: float = 1.5  # matrix rates over that of 16 bits; 0: none
    float8: float = 0.0  # torch._scaled_mm, scales by row and column
    float8_fast: float = 0.0  # the same with use_fast_accum
    four_bit: float = 0.0  # nvfp4 and mxfp4
    narrow: tuple[tuple[int, float], ...] = _NARROW
    gap_us: float = 1.25  # from one kernel's end to the next one's start on a busy stream: 1 to 1.5 [review]


# What `bench linear` measures on a GPU, and between what values it can be believed; the user's table may hold these and
# no others. Of `narrow`, the shares.
MEASURED = {
    "hbm_gbs": (10.0, 1e5),
    "tflops_16": (0.1, 1e5),
    "skinny": (0.01, 1.5),
    "narrow": (0.001, 1.5),
    "gap_us": (0.01, 100.0),
}

# Copy and matrix rates: H200 4.16 TB/s and 790 TFLOP/s [H200], H100 SXM 3.0 and 740, the others 0.90 and 0.80 of the
# sheet. Sustained: 660 (H100) and 720 (H200) at 700 W [review], 708 to 798 by shape [H200]; Ampere holds its rate. L2:
# what walks get of it, by the kernels for R = 128 to 512 [H200]; H100 the same for its clock, scaled by multiprocessors
# and clock elsewhere. Skinny: 0.59 of 67 MB, 0.87 of 235 MB [H200], 0.72 on A100 [review]. Narrow [H200]; on A100 from
# a composition of 255 us at R = 128 and of 320 at R = 256 [review]. 8 bits by cuBLAS [H200]: float8 1170 to 1290 and
# 1310 to 1450 TFLOP/s, int8 no more than 760 to 830; on A100 int8 0.72 of its sheet's rate [review].
_H200 = DeviceSpec(
    name="NVIDIA H200",
    capability=(9, 0),
    sms=132,
    hbm_gbs=4160.0,
    l2_gbs=5200.0,
    l2_bytes=50 << 20,
    shared_bytes=232448,
    tflops_16=790.0,
    tflops_16_sustained=720.0,
    tflops_32=50.0,
    clock_ghz=1.70,
    skinny=0.70,
    int8=1.1,
    float8=1.67,
    float8_fast=1.87,
    narrow=((80, 0.30), (144, 0.42), (272, 0.60), (528, 0.78), (4096, 1.0)),
)
_H100 = replace(
    _H200,
    name="NVIDIA H100 80GB HBM3",
    hbm_gbs=3000.0,
    l2_gbs=5000.0,
    tflops_16=740.0,
    tflops_16_sustained=660.0,
)
_H100_PCIE = replace(
    _H100,
    name="NVIDIA H100 PCIe",
    sms=114,
    hbm_gbs=1800.0,
    l2_gbs=3850.0,
    tflops_16=600.0,
    tflops_16_sustained=433.0,
    tflops_32=40.0,
    clock_ghz=1.50,
)
_A100 = DeviceSpec(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    sms=108,
    hbm_gbs=1800.0,
    l2_gbs=4000.0,
    l2_bytes=40 << 20,
    shared_bytes=166912,
    tflops_16=250.0,
    tflops_16_sustained=250.0,
    tflops_32=16.0,
    clock_ghz=1.41,
    skinny=0.72,
    int8=1.8,
    narrow=((80, 0.40), (144, 0.58), (272, 0.74), (528, 0.85), (4096, 1.0)),
)
# On paper alone: no kernel was tuned or counted for it. From its sheet (2250 TFLOP/s in 16 bits, 8 TB/s) by the shares
# that an H200 reaches of its own, 4 bits at twice the 1.87 of 8.
B200 = replace(
    _H200,
    name="NVIDIA B200",
    capability=(10, 0),
    sms=148,
    hbm_gbs=7200.0,
    l2_gbs=6300.0,
    l2_bytes=126 << 20,
    tflops_16=1800.0,
    tflops_16_sustained=1640.0,
    tflops_32=60.0,
    clock_ghz=1.85,
    four_bit=2 * 1.87,
)
KNOWN = {
    spec.name: spec
    for spec in (_H200, _H100, _H100_PCIE, _A100, replace(_A100, name="NVIDIA A100-SXM4-40GB", hbm_gbs=1400.0))
}
# What explain() describes where there is no GPU, and what a device without readable properties is taken for.
DEFAULT = _H200

# ---- shares of the copy rate [review] ----
COLUMN_WALK = 0.92  # our kernels' walks, which read rows in pieces of 128 bytes
PASS = 0.85  # elementwise kernels, dense products, products that write their wide side
REDUCTION = 0.72  # row maxima
CAST = 0.50  # PyTorch kernels that broadcast and change the dtype
CAST_FLOAT8 = 0.16  # the same to float8 [H200]

# ---- between L2 and a multiprocessor [review] ----
# Times the rate of a walk at which our products in tiles load: 9.8 TB/s in int8, of a forward less its x Aᵀ [H200].
TILED_L2 = 1.9
L2_WRITE = 0.5  # weight of a stored byte over a loaded one; an atomic costs twice a store
L2_KEPT = 0.5  # share of L2 in which a kernel's results wait for the next one's reads, beside operands read once
SM_DRAW = 1.45  # times its share of L2's rate that a multiprocessor draws where others idle: 40 of 27.6 B a cycle
SM_DRAW_HBM = 2.0  # the same of HBM

# Bounds of one phase overlap, but not entirely: two equal ones take 2 ** (1 / OVERLAP), 1.09 times, as long. [review]
OVERLAP = 8

# ---- within a multiprocessor, cycles and bytes ----
SHARED_BYTES = 128  # of shared memory a cycle: fills, operands and staging alike [sheet]
TILE_CYCLES = 1200  # from the last product of a tile [128, 256] to the first of the next: drained and staged [review]
ROUND_BYTES = 56  # a cycle that one multiprocessor alone gets from L2 and to it [review]
CLUSTER_BYTES = 16  # of another block's shared memory a cycle [review]
WGMMA_LEAST = 20  # cycles of one [64, 16] x [16, n]: n / 2, but the 2 KB of its first operand take as long [review]
# A step of a Triton walk waits for each of its thin products (one over N, two over K) before it goes on; the stores of
# their results and the next loads come after them, with a change of layout through shared memory. With wgmma the wide
# product is in flight meanwhile. [compiled: what is waited for; the cycles are assumptions]
TRITON_WAIT = 100  # cycles from the end of a product to what waited for it
TRITON_STORE_N = 350  # cycles of dB's layout and atomics and of issuing loads
TRITON_STORE_K = 400  # the same of dX and dA
# What a tile of `expand_tiles` takes beside its products and the bytes it moves: T_P and A before the loop, the loop's
# first loads and x after it, one latency of L2 or HBM after the other, which no other tile hides. An assumption.
TRITON_TILE = 3000
# Cycles that a step of an int8 product waits where one block fills a multiprocessor, as with the registers of dA and of
# dropout: Triton has no two of its products in flight. 300 to 500 [H200].
INT8_WAIT = 350
# What a Triton product without such waits reaches of cuBLAS's rate: 0.95 in 8 bits, of a forward less its x Aᵀ [H200];
# less where an epilogue is not hidden, an assumption.
TRITON_MATRIX_SHARE = 0.85

# ---- microseconds [review] ----
KERNEL_US = 1.25  # start and end of a library kernel, beside the gap before it
WALK_US = 2.75  # the same of a kernel that walks: descriptors, the first stage from HBM, the last stores
EXCHANGE_US = 0.6  # its three waits for another block: a remote arrival and two pushes [review]
# The host's own time, which a busy stream hides and an idle one does not: a call of the op (checks, the autograd node,
# allocations), and each kernel that it issues. 60 to 120 us in all for the CUDA kernels in eager mode.
HOST_CALL_US = 40.0
HOST_KERNEL_US = 6.0

TILE = 128  # rows and columns of a dense product's result that one multiprocessor computes at a time


def narrow_share(device: DeviceSpec, width: int) -> float:
    """The share of the matrix rate that cuBLAS reaches where the narrow side has `width` columns: between the classes
    in proportion, and below the first in proportion to it."""
    below, share = 0, 0.0
    for upper, reached in device.narrow:
        if width <= upper:
            return share + (reached - share) * (width - below) / (upper - below)
        below, share = upper, reached
    return share
