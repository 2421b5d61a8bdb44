"""The constexpr arguments and launch options of every kernel: what one compiled kernel stands for."""

from __future__ import annotations

from typing import Any

import torch

from .configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig, padded, tile_k, uses_wgmma
from .cost_model import Flags
from .devices import DeviceSpec


def precision(dtype: torch.dtype) -> str:
    """fp32 inputs multiply in fp32; for 16-bit ones the argument says nothing."""
    return "ieee" if dtype == torch.float32 else "tf32"


def one_launch_constants(
    R: int,
    P: int,
    dtype: torch.dtype,
    flags: Flags,
    aligned_n: bool,
    aligned_k: bool,
    config: OneLaunchConfig,
    device: DeviceSpec,
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `one_launch_backward`."""
    return {
        "R": R,
        "P": P,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "BR": padded(R),
        "BP": padded(P),
        "NEED_DX": flags.need_dx,
        "NEED_DA": flags.need_dA,
        "NEED_DB": flags.need_dB,
        "NEED_DBIAS": flags.need_dbias,
        "DROPOUT": flags.dropout,
        "ALIGNED_N": aligned_n,
        "ALIGNED_K": aligned_k,
        "WGMMA": uses_wgmma(device.capability, dtype.itemsize * 8),
        "ATOMIC": not flags.deterministic,
        "PRECISION": precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def project_constants(
    R: int,
    P: int,
    dtype: torch.dtype,
    flags: Flags,
    aligned_n: bool,
    config: TwoLaunchConfig,
    device: DeviceSpec,
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `project`."""
    return {
        "R": R,
        "P": P,
        "BM": config.block_m,
        "BN": config.block_n,
        "BR": min(config.project_r, padded(R)),
        "BP": padded(P),
        "WIDTH": t_width(R, P, config),
        "NEED_T_R": flags.need_dx and R > 0,
        "NEED_T_P": (flags.need_dx or flags.need_dA) and P > 0,
        "NEED_DB": flags.need_dB,
        "NEED_DBIAS": flags.need_dbias,
        "ALIGNED_N": aligned_n,
        "WGMMA": uses_wgmma(device.capability, dtype.itemsize * 8),
        "ATOMIC": not flags.deterministic,
        "PRECISION": precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def expand_constants(
    R: int,
    P: int,
    dtype: torch.dtype,
    flags: Flags,
    aligned_k: bool,
    config: TwoLaunchConfig,
    device: DeviceSpec,
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `expand_slab`, or of `expand_tiles` for a larger R."""
    slab = keeps_t(R, config)
    return {
        "R": R,
        "P": P,
        "BM": config.block_m,
        "BK": config.block_k if slab else tile_k(config, flags.dropout),
        "BR": padded(R) if slab else config.tile_r,
        "BP": padded(P),
        "WIDTH": t_width(R, P, config),
        "NEED_DX": flags.need_dx,
        "NEED_DA": flags.need_dA,
        "DROPOUT": flags.dropout,
        "ALIGNED_K": aligned_k,
        "WGMMA": uses_wgmma(device.capability, dtype.itemsize * 8),
        "ATOMIC": not flags.deterministic,
        "PRECISION": precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.slab_stages if slab else config.num_stages,
    }


def t_width(R: int, P: int, config: TwoLaunchConfig) -> int:
    """Columns of T between the two launches: whole tiles of R, then the adapter's."""
    tile = min(config.project_r, padded(R))
    return -(-R // tile) * tile + padded(P)


def keeps_t(R: int, config: TwoLaunchConfig) -> bool:
    """Whether one tile holds all of R, so that the second launch keeps T on chip."""
    return padded(R) <= config.project_r


def forward_constants(
    P: int, dtype: torch.dtype, has_bias: bool, dropout: bool, aligned_k: bool, config: ForwardConfig
) -> dict[str, Any]:
    """The constexpr arguments and launch options of `fused_forward`."""
    return {
        "P": P,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "BP": padded(P),
        "GROUP": config.group,
        "HAS_BIAS": has_bias,
        "DROPOUT": dropout,
        "ALIGNED_K": aligned_k,
        "PRECISION": precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
