"""What the exact kernels are launched with: their constexpr arguments and grids. Needs no Triton."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import availability
from .configs import PrepareConfig, ProductConfig, padded, uses_wgmma
from .constants import precision
from .cost_model import Flags, cdiv
from .devices import DeviceSpec

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_WAVE = 0.9  # share of the multiprocessors that a grid should keep busy


def limit_reciprocal(dtype: torch.dtype) -> float:
    """What the largest magnitude of a row is multiplied by for its scale in `dtype`."""
    return 1.0 / LIMITS[dtype]


def tile_k(config: ProductConfig, operands: torch.dtype, dropout: bool, fast_accumulation: bool) -> int:
    """The columns of a tile of dX. A second accumulator, of integers, of float8 sums in parts or of what the mask falls
    on, leaves registers for half of the columns."""
    float8_in_parts = operands == torch.float8_e4m3fn and not fast_accumulation
    second = dropout or operands == torch.int8 or float8_in_parts
    return config.block_k // 2 if second else config.block_k


def product_takes_dA(eight_bits: torch.dtype | None, dropout: bool, device: DeviceSpec) -> bool:
    """Whether `exact_product` takes dA too, or leaves it to PyTorch.

    Of int8 Triton has no two wgmma in flight, so that two blocks must share a multiprocessor, and dA leaves no
    registers for two. On an H200 that was some 390 us of a backward with it, and 220 of a forward, which has none (M =
    8192, 4096 x 4096; what is around them taken off); PyTorch's dA takes 30. With dropout it does, for else the masked
    x would pass through memory.
    """
    return dropout or eight_bits != torch.int8 or not uses_wgmma(device.capability, 16)


@functools.lru_cache(maxsize=4096)
def m_chunk_of(M: int, N: int, config: PrepareConfig, sms: int) -> int:
    """The rows a block of `exact_prepare` walks: few enough to fill the card, many enough to add dB seldom."""
    columns = cdiv(N, config.block_n)
    most = max(1, cdiv(M, config.block_m))
    fewest = min(most, max(1, sms // columns))

    def busy(chunks: int) -> float:
        blocks = columns * chunks
        return blocks / (cdiv(blocks, sms) * sms)

    candidates = range(fewest, min(most, 4 * fewest) + 1)
    chunks = next((c for c in candidates if busy(c) >= _WAVE), max(candidates, key=busy))
    return cdiv(most, chunks) * config.block_m


def prepare_constants(
    P: int,
    dtype: torch.dtype,
    need_t: bool,
    flags: Flags,
    eight_bits: torch.dtype | None,
    column_scales: bool,
    aligned_n: bool,
    config: PrepareConfig,
    device: DeviceSpec,
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `exact_prepare`."""
    return {
        "P": P,
        "BM": config.block_m,
        "BN": config.block_n,
        "BP": padded(P),
        "NEED_T": need_t,
        "NEED_DB": flags.need_dB,
        "NEED_DBIAS": flags.need_dbias,
        "ROW_MAXIMA": eight_bits is not None,
        "COLUMN_SCALES": column_scales,
        "ALIGNED_N": aligned_n,
        "WGMMA": uses_wgmma(device.capability, dtype.itemsize * 8),
        "ATOMIC": not flags.deterministic,
        "PRECISION": precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def quantize_constants(eight_bits: torch.dtype, column_scales: bool, aligned_n: bool) -> dict[str, Any]:
    """The constexpr arguments and launch options of `exact_quantize`: a tile for each block, bound by memory alone."""
    return {
        "BM": 16,
        "BN": 64 if availability.interpreted() else 512,
        "COLUMN_SCALES": column_scales,
        "LIMIT_RECIPROCAL": limit_reciprocal(eight_bits),
        "ALIGNED_N": aligned_n,
        "num_warps": 4,
    }


def quantize_rows_constants(
    eight_bits: torch.dtype, rotation: int, dtype: torch.dtype, aligned_n: bool
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `exact_quantize_rows`: 16 rows a block, which fill the card from
    some 2,000 on."""
    return {
        "BM": 16,
        "BN": 128 if availability.interpreted() else 512 if aligned_n else 256,  # or it spills
        "ROTATE": rotation,
        "LIMIT_RECIPROCAL": limit_reciprocal(eight_bits),
        "ALIGNED_N": aligned_n,
        "PRECISION": precision(dtype),
        "num_warps": 4,
    }


def product_constants(
    P: int,
    operands: torch.dtype,
    dtype: torch.dtype,
    flags: Flags,
    weight_scales: bool,
    rotation: int,
    fast_accumulation: bool,
    aligned: bool,
    config: ProductConfig,
    device: DeviceSpec,
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `exact_product`; `operands` is the dtype of dY and W, `dtype` that
    of dX."""
    return {
        "P": P,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": tile_k(config, operands, flags.dropout, fast_accumulation),
        "BP": padded(P),
        "GROUP": config.group,
        "SCALES": operands.itemsize == 1,
        "WEIGHT_SCALES": weight_scales,
        "ROTATE": rotation,
        # Terms of float8 in the tensor cores' own accumulator before float32 takes them; None: all, use_fast_accum.
        "IMPRECISE": min(128, config.block_n) if operands == torch.float8_e4m3fn and not fast_accumulation else None,
        "NEED_DA": flags.need_dA,
        "DROPOUT": flags.dropout,
        "ALIGNED_N": aligned,
        "ALIGNED_K": aligned,
        "WGMMA": uses_wgmma(device.capability, dtype.itemsize * 8),
        "ATOMIC": not flags.deterministic,
        "PRECISION": precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
