"""Predicted cost of an exact backward: dX = dY W + s (dY B) A, dA = s (dY B)ᵀ x, dB = s dYᵀ xa, db.

    torch      all of it as PyTorch composes it; in 8 bits also the passes that quantise dY
    prepared   one read of dY for s dY B, dB, db and the rows' maxima, a second one to quantise it; then cuBLAS's
               product, to which s (dY B) A is added, and cuBLAS's dA
    fused      prepared, and one product that adds s (dY B) A and takes dA from one read of x as it writes dX

each in the operands' own dtype, in int8 or in float8 ("float8 fast" with use_fast_accum).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .configs import uses_wgmma
from .cost_model import triton_flops
from .exact_plan import product_takes_dA
from .library import dense_product, narrow_product
from .phases import Estimate, Flags, Phase, Step, cdiv, l2_traffic, passes, product_cycles, walk
from .rates import (
    CAST,
    CAST_FLOAT8,
    INT8_WAIT,
    KERNEL_US,
    PASS,
    REDUCTION,
    SHARED_BYTES,
    TILED_L2,
    TRITON_STORE_K,
    TRITON_STORE_N,
    TRITON_WAIT,
    DeviceSpec,
)

FORMS = ("torch", "prepared", "fused")
FAST = "float8 fast"
_ROWS, _COLUMNS = 128, 256  # of dY, of a step of a block of `exact_prepare`
_TILE_M, _TILE_K = 128, 256  # of dX, of a block of `exact_product`
EIGHT_BIT_STEP = 16  # N and K of 8-bit products are multiples of this


def rate_of(device: DeviceSpec, precision: str) -> float:
    """The matrix rate of a precision of 8 or 4 bits over that of 16; 0 where the device has none."""
    rates = {
        "nvfp4": device.four_bit,
        "mxfp4": device.four_bit,
        "int8": device.int8,
        "float8": device.float8,
        FAST: device.float8_fast,
    }
    return rates[precision]


def own_rate_of(device: DeviceSpec, precision: str) -> float:
    """The same of our own products, which take int8 at the speed of float8, as cuBLAS does not."""
    return max(device.int8, device.float8_fast) if precision == "int8" else rate_of(device, precision)


def precisions(N: int, K: int, device: DeviceSpec) -> tuple[str, ...]:
    """The 8-bit precisions that a weight [N, K] can be multiplied in on this device."""
    if N % EIGHT_BIT_STEP or K % EIGHT_BIT_STEP:
        return ()
    return tuple(name for name in ("int8", "float8", FAST) if rate_of(device, name))


def own_precision(itemsize: int) -> str:
    return f"{8 * itemsize}-bit"


def quantisation(
    M: int, N: int, K: int, name: str, size: int = 2, bfloat16: bool = True
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Bytes, and the share of the copy rate that they move at, of PyTorch's passes before and after an 8-bit product
    for dX [M, K], with dY [M, N] of `size` bytes: row maxima and division; int8 also rounds and converts, and scales
    int32 sums by row and by column afterwards, as float8 does with its float32 sums where dY is not bfloat16."""
    before = [(size * M * N, REDUCTION)]
    after = [((4 + 4) * M * K, CAST), ((4 + size) * M * K, CAST)]
    if name != "int8":
        return [*before, ((size + 1) * M * N, CAST_FLOAT8)], [] if bfloat16 else after
    return [*before, ((size + 4) * M * N, CAST), ((4 + 4) * M * N, PASS), ((4 + 1) * M * N, PASS)], after


def estimate_exact(
    form: str,
    precision: str | None,
    M: int,
    N: int,
    K: int,
    P: int,
    flags: Flags,
    device: DeviceSpec,
    itemsize: int = 2,
    bfloat16: bool = True,
) -> Estimate:
    """One of `FORMS` in one of `precisions` (None: the operands' own). `bfloat16`: what dY is, where it has 16 bits."""
    sizes, eight = (M, N, K, P), precision
    need_t = P > 0 and (flags.need_dx or flags.need_dA)
    phases: list[Phase] = []
    if form == "torch":
        if need_t:
            phases.append(narrow_product("T", device, M, N, P, itemsize))
        if eight and flags.need_dx:
            before, _ = quantisation(M, N, K, eight, itemsize, bfloat16)
            phases += [passes("quantise", device, nbytes, share=share) for nbytes, share in before]
            phases.append(passes("quantise", device, 0, kernels=2))  # the scales
        if flags.need_dB:
            phases.append(narrow_product("dB", device, N, M, P, itemsize))
        if flags.need_dbias:
            phases.append(passes("db", device, M * N * itemsize))
        phases.append(passes("small", device, 4 * N * P * itemsize, need_t + flags.need_dB))  # s B, s dB
    else:
        phases += _prepared(*sizes, eight if flags.need_dx else None, flags, device, itemsize)
        gradients = (P * K * flags.need_dA + N * P * flags.need_dB) * (4 + itemsize)
        casts = (flags.need_dA + flags.need_dB) * (itemsize == 2)
        phases.append(passes("small", device, 4 * M * (P + 1) + gradients, 1 + casts))  # one fill clears them all
    if form == "fused":
        taken = product_takes_dA(torch.int8 if eight == "int8" else None, flags.dropout, device)
        phases.append(_fused(*sizes, eight, replace(flags, need_dA=flags.need_dA and taken), device, itemsize))
        if flags.need_dA and not taken:
            phases.append(passes("dA", device, M * P * (4 + itemsize)))
            phases.append(narrow_product("dA", device, P, M, K, itemsize))
    else:
        phases += _library(*sizes, eight, flags, device, itemsize, bfloat16, first=form == "prepared")
    return Estimate(form, tuple(phases), precision=eight or own_precision(itemsize))


def _prepared(
    M: int, N: int, K: int, P: int, eight: str | None, flags: Flags, device: DeviceSpec, itemsize: int
) -> list[Phase]:
    """`exact_prepare`, whose blocks own columns of dY and walk a chunk of its rows; for 8 bits `exact_quantize` too."""
    columns, rows = cdiv(N, _COLUMNS), cdiv(M, _ROWS)
    chunks = max(1, min(rows, device.sms // columns))
    need_t = P > 0 and (flags.need_dx or flags.need_dA)
    loaded = M * N * itemsize + columns * M * P * itemsize * flags.need_dB + chunks * N * P * itemsize * need_t
    row_maxima = eight is not None
    added = columns * M * 4 * (P * need_t + row_maxima) + chunks * N * 4 * (P * flags.need_dB + flags.need_dbias)
    tensor = product_cycles(device, itemsize, _ROWS, P * need_t, _COLUMNS)
    tensor += product_cycles(device, itemsize, _COLUMNS, P * flags.need_dB, _ROWS)
    fill = (_ROWS * _COLUMNS + _ROWS * P) * itemsize
    shared = fill * (1 + need_t + flags.need_dB)
    first = walk(
        "prepare",
        device,
        Step(tensor, shared, tensor + fill / SHARED_BYTES + TRITON_STORE_N + TRITON_WAIT),
        cdiv(rows, chunks),
        columns * chunks,
        hbm=(M * N + M * P + N * P) * itemsize + M * P * 4,
        l2=l2_traffic(loaded, added * flags.deterministic, added * (not flags.deterministic)),
        l2_bytes=loaded + added,
        flops=2 * M * N * P * (need_t + flags.need_dB),
    )
    if not row_maxima:
        return [first]
    return [first, passes("quantise", device, (itemsize + 1) * M * N + 4 * M)]


def _library(
    M: int,
    N: int,
    K: int,
    P: int,
    eight: str | None,
    flags: Flags,
    device: DeviceSpec,
    itemsize: int,
    bfloat16: bool,
    first: bool,
) -> list[Phase]:
    """cuBLAS's product, the adapter's part of dX and dA. `first`: in the operands' own dtype the adapter's part is
    written first, and the product reads what it adds to while it multiplies."""
    phases: list[Phase] = []
    adapter = P > 0 and flags.need_dx
    if flags.need_dx and eight:
        _, after = quantisation(M, N, K, eight, itemsize, bfloat16)
        out_size = 4 if after else itemsize
        phases.append(dense_product("product", device, M, N, K, 1, times=rate_of(device, eight), out_size=out_size))
        phases += [passes("product", device, nbytes, share=share) for nbytes, share in after]
    if adapter and flags.dropout:
        phases.append(narrow_product("adapter", device, M, P, K, itemsize))
        phases.append(passes("adapter", device, 3 * M * K * itemsize))
    elif adapter:
        before = first and not eight
        phases.append(narrow_product("adapter", device, M, P, K, itemsize, accumulates=not before))
    if flags.need_dx and not eight:
        accumulates = first and adapter and not flags.dropout
        phases.append(dense_product("product", device, M, N, K, itemsize, accumulates=accumulates))
    if flags.need_dA:
        if flags.dropout:
            phases.append(passes("mask", device, 3 * M * K * itemsize))
        phases.append(narrow_product("dA", device, P, M, K, itemsize))
    return phases


def _fused(M: int, N: int, K: int, P: int, eight: str | None, flags: Flags, device: DeviceSpec, itemsize: int) -> Phase:
    """`exact_product`: tiles [128, 256] of dX, half as wide with a second accumulator; at a tile's end the adapter's
    part, dA, x and dX pass once."""
    size = 1 if eight else itemsize
    width = _TILE_K // 2 if flags.dropout or eight in ("int8", "float8") else _TILE_K
    depth = 128 // size
    rows, columns = cdiv(M, _TILE_M), cdiv(K, width)
    steps = cdiv(N, depth)
    tile = 2 * _TILE_M * width * depth / triton_flops(device, itemsize, own_rate_of(device, eight) if eight else 1.0)
    end = product_cycles(device, itemsize, _TILE_M, width, P) if P and flags.need_dx else 0.0
    end += product_cycles(device, itemsize, width, P * flags.need_dA, _TILE_M)
    moved = _TILE_M * width * itemsize * (2 * flags.need_dx + flags.need_dA)
    wait = (moved / SHARED_BYTES + TRITON_STORE_K + 2 * TRITON_WAIT) / steps
    wait += INT8_WAIT * (eight == "int8" and flags.need_dA and uses_wgmma(device.capability, 16))
    fill = depth * (_TILE_M + width) * size
    operands = (_TILE_M + _TILE_M // 64 * width) * depth * size
    t_p = M * P * 4 * flags.need_dx
    loaded = (columns * M * N + rows * N * K) * size + columns * t_p + M * K * itemsize * flags.need_dA
    added, dX = rows * P * K * 4 * flags.need_dA, M * K * itemsize * flags.need_dx
    return walk(
        "product",
        device,
        Step(tile + end / steps + wait, fill + operands + moved / steps),
        steps,
        rows * columns,
        hbm=(M * N + N * K) * size + t_p + dX + M * K * itemsize * flags.need_dA + 4 * P * K,
        l2=l2_traffic(loaded, dX + added * flags.deterministic, added * (not flags.deterministic)) / TILED_L2,
        l2_bytes=loaded + dX + added,
        flops=2 * rows * _TILE_M * columns * width * (N + P * (flags.need_dx + flags.need_dA)),
        resident=cdiv(rows * columns, device.sms),
        share=PASS,
        start_us=KERNEL_US,
    )
