"""Predicted cost of what PyTorch composes: cuBLAS products and elementwise passes, one kernel each."""

from __future__ import annotations

from .phases import Estimate, Flags, Phase, cdiv, matrix_tflops, passes
from .rates import KERNEL_US, PASS, TILE, DeviceSpec, narrow_share


def _product(name: str, device: DeviceSpec, flops: int, tflops: float, nbytes: int, share: float) -> Phase:
    return Phase(
        name,
        hbm_us=nbytes / (device.hbm_gbs * 1e3 * share),
        tensor_us=flops / (tflops * 1e6) if flops else 0.0,
        launch_us=device.gap_us + KERNEL_US,
        kernels=1,
        hbm_bytes=nbytes,
        l2_bytes=nbytes,
        flops=flops,
    )


def dense_product(
    name: str,
    device: DeviceSpec,
    I: int,
    J: int,
    L: int,
    itemsize: int = 2,
    *,
    times: float = 1.0,
    out_size: int | None = None,
    accumulates: bool = False,
) -> Phase:
    """[I, J] @ [J, L] with no narrow side, at the rate that lasts: such products draw all power. `times` the 16-bit
    rate for 8-bit operands. With fewer result tiles than multiprocessors, the share of these that have one."""
    tflops = device.tflops_32 if itemsize == 4 else device.tflops_16_sustained * times
    busy = min(1.0, cdiv(I, TILE) * cdiv(L, TILE) / device.sms) or 1.0
    written = I * L * (itemsize if out_size is None else out_size)
    nbytes = (I * J + J * L) * itemsize + written * (1 + accumulates)
    return _product(name, device, 2 * I * J * L, tflops * busy, nbytes, PASS)


def narrow_product(
    name: str, device: DeviceSpec, I: int, J: int, L: int, itemsize: int = 2, *, accumulates: bool = False
) -> Phase:
    """[I, J] @ [J, L] whose narrowest side is a rank. One that writes its wide side moves bytes as a pass does, one
    that reads it at the skinny rate. `accumulates`: it reads what it adds to."""
    width = min(I, J, L)
    nbytes = itemsize * (I * J + J * L + I * L * (1 + accumulates))
    tflops = matrix_tflops(device, itemsize) * narrow_share(device, width)
    return _product(name, device, 2 * I * J * L, tflops, nbytes, PASS if width == J else device.skinny)


def estimate_torch(
    M: int, N: int, K: int, R: int, P: int, flags: Flags, device: DeviceSpec, itemsize: int = 2
) -> Estimate:
    """The low-rank formula as PyTorch composes it: T = dY [left | s B], dX = T [right ; A], dA = T_Bᵀ x, dB = s dYᵀ xa,
    each a cuBLAS call; with dropout, passes over x and over the adapter's part of dX."""
    need_t_p = (flags.need_dx or flags.need_dA) and P > 0
    width = R * flags.need_dx + P * need_t_p
    phases = []
    if width:
        phases.append(narrow_product("T", device, M, N, width, itemsize))
    if flags.need_dx and flags.dropout and P:
        phases += [narrow_product("dX", device, M, rank, K, itemsize) for rank in (R, P)]
        phases.append(passes("mask", device, 3 * M * K * itemsize))
    elif flags.need_dx:
        phases.append(narrow_product("dX", device, M, R + P, K, itemsize))
    if flags.need_dA:
        if flags.dropout:
            phases.append(passes("mask", device, 3 * M * K * itemsize))
        phases.append(narrow_product("dA", device, P, M, K, itemsize))
    if flags.need_dB:
        phases.append(narrow_product("dB", device, N, M, P, itemsize))
    if flags.need_dbias:
        phases.append(passes("db", device, M * N * itemsize))
    # [left | s B] and [right ; A]; s B; s dB.
    copied = 2 * width * (N * need_t_p + K * (P > 0)) * flags.need_dx * (not flags.dropout)
    kernels = flags.need_dx * (need_t_p + (P > 0) * (not flags.dropout)) + need_t_p + flags.need_dB
    if kernels:
        phases.append(passes("small", device, (copied + 2 * N * P * (need_t_p + flags.need_dB)) * itemsize, kernels))
    return Estimate("torch", tuple(phases))


def estimate_torch_forward(
    M: int, N: int, K: int, P: int, device: DeviceSpec, dropout: bool, itemsize: int = 2
) -> Estimate:
    """`x Wᵀ`, `x Aᵀ` and the product with Bᵀ that adds to y, as cuBLAS calls; dropout reads and writes x."""
    phases = [
        dense_product("y", device, M, K, N, itemsize),
        narrow_product("xa", device, M, K, P, itemsize),
        narrow_product("adapter", device, M, P, N, itemsize, accumulates=True),
        *[passes("mask", device, 2 * M * K * itemsize)] * dropout,
    ]
    return Estimate("torch", tuple(phases))
