"""Host entry points of the exact kernels: `prepare` around dY, `product` for dX and dA.

They launch on the tensors' device and its current stream; the host never waits for the device, and nothing is tuned
here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import PrepareConfig, ProductConfig
from .cost_model import Flags, cdiv
from .devices import device_spec
from .dispatch import config_for
from .exact_plan import (
    LIMITS,
    m_chunk_of,
    prepare_constants,
    product_constants,
    quantize_constants,
    quantize_rows_constants,
)
from .exact_prepare import exact_prepare, exact_quantize, exact_quantize_rows
from .exact_product import exact_product
from .launch import finished, on, threshold_of

_prepare_constants: dict[tuple[Any, ...], tuple[PrepareConfig, dict[str, Any]]] = {}
_product_constants: dict[tuple[Any, ...], dict[str, Any]] = {}


class Prepared(NamedTuple):
    """What one read of dY [M, N] gives (a second one for 8 bits); None where it was not asked for."""

    t: Tensor | None  # [M, P] in fp32: s · dY B
    dB: Tensor | None  # [N, P] in lora_B's dtype
    dbias: Tensor | None  # [N] in dY's dtype
    q: Tensor | None  # [M, N] in 8 bits
    scale: Tensor | None  # fp32 [M], of its rows
    zeros: Tensor | None  # fp32 [.], as many as asked for


def prepare(
    dy: Tensor,
    xa: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    need_t: bool = True,
    need_dB: bool = True,
    need_dbias: bool = False,
    eight_bits: torch.dtype | None = None,
    column_scale: Tensor | None = None,
    zeros: int = 0,
    deterministic: bool = False,
) -> Prepared:
    """T = s · dY B, dB = s · dYᵀ xa, db = Σ dY, and dY in `eight_bits` (float8_e4m3fn or int8) with a scale for each
    row, times `column_scale` [N] in fp32 where that is given.

    dy [M, N] with any strides and xa [M, P] in one dtype (fp32, fp16, bf16); lora_B [N, P] in that or fp32. `zeros`:
    that many zeros more in the workspace that is cleared at once. `deterministic`: no atomics but the rows' maxima,
    whose order no bit depends on. Raises ValueError where a needed tensor is missing or no tile holds P.
    """
    if (need_t and lora_B is None) or (need_dB and (xa is None or lora_B is None)):
        raise ValueError("a tensor that the needed gradients read is None")
    if eight_bits is not None and eight_bits not in LIMITS:
        raise ValueError(f"eight_bits={eight_bits}: give torch.float8_e4m3fn, torch.int8 or None")
    column_scales = column_scale is not None and eight_bits is not None
    (M, N), device, dtype = dy.shape, dy.device, dy.dtype
    P = 0 if lora_B is None or not (need_t or need_dB) else lora_B.shape[1]
    aligned = N % 8 == 0 and dy.stride(1) == 1 and dy.stride(0) % 8 == 0 and dy.data_ptr() % 16 == 0
    key = (P, dtype, need_t, need_dB, need_dbias, eight_bits, column_scales, aligned, deterministic, device)
    known = _prepare_constants.get(key)
    if known is None:
        spec = device_spec(device)
        chosen = config_for("exact_prepare", dtype, 16, P, aligned, spec)
        if not isinstance(chosen, PrepareConfig):
            raise ValueError(f"no shipped configuration holds P={P} in {dtype}")
        flags = Flags(True, False, need_dB, need_dbias, False, deterministic)
        known = chosen, prepare_constants(P, dtype, need_t, flags, eight_bits, column_scales, aligned, chosen, spec)
        _prepare_constants[key] = known
    chosen, constants = known
    m_chunk = m_chunk_of(M, N, chosen, device_spec(device).sms)
    columns, chunks = cdiv(N, chosen.block_n), cdiv(M, m_chunk)
    layers, slabs = (columns, chunks) if deterministic else (1, 1)

    # What atomics add to is cleared in two memsets: what lives as long as the gradients, and what does not.
    kept = {"dB": slabs * N * P * need_dB, "db": slabs * N * need_dbias, "zeros": zeros}
    passing = {"t": layers * M * P * need_t, "amax": M * (eight_bits is not None)}
    parts: dict[str, Tensor] = {}
    for sizes in (kept, passing):
        workspace = torch.zeros((sum(sizes.values()),), dtype=torch.float32, device=device)
        parts.update(zip(sizes, workspace.split(list(sizes.values())), strict=True))
    q = None if eight_bits is None else torch.empty((M, N), dtype=eight_bits, device=device)
    scale = None if eight_bits is None else torch.empty((M,), dtype=torch.float32, device=device)
    columns_of = parts["t"] if column_scale is None else column_scale.contiguous()
    amax = parts["amax"].view(torch.int32)
    if M and N and (P or need_dbias or eight_bits is not None):  # or there is nothing to read dY for
        strides = dy.stride()
        with on(device):
            exact_prepare[(columns, chunks)](
                dy,
                xa.contiguous() if xa is not None and need_dB else dy,
                lora_B.contiguous() if lora_B is not None and P else dy,
                parts["t"],
                parts["dB"],
                parts["db"],
                amax,
                columns_of,
                M,
                N,
                m_chunk,
                *strides,
                float(scaling),
                **constants,
            )
            if eight_bits is not None:
                tiles = quantize_constants(eight_bits, column_scales, aligned)
                blocks = cdiv(M, tiles["BM"]) * cdiv(N, tiles["BN"])
                exact_quantize[(blocks,)](dy, amax, columns_of, q, scale, M, N, *strides, **tiles)

    def result(name: str, shape: tuple[int, ...], count: int, dtype: torch.dtype) -> Tensor:
        buffer = parts[name].view(count, *shape) if deterministic else parts[name].view(shape)
        return finished(buffer, dtype, deterministic)

    return Prepared(
        result("t", (M, P), layers, torch.float32) if need_t else None,
        result("dB", (N, P), slabs, lora_B.dtype) if need_dB and lora_B is not None else None,
        result("db", (N,), slabs, dtype) if need_dbias else None,
        q,
        scale,
        parts["zeros"] if zeros else None,
    )


def quantize(x: Tensor, eight_bits: torch.dtype, rotation: int = 1) -> tuple[Tensor, Tensor]:
    """x [M, N], any strides, in `eight_bits`, float8_e4m3fn or int8, rotated in blocks of `rotation` columns before,
    and its row scales, fp32 [M]."""
    (M, N), device = x.shape, x.device
    aligned = N % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    q = torch.empty((M, N), dtype=eight_bits, device=device)
    scale = torch.empty((M,), dtype=torch.float32, device=device)
    if M:
        constants = quantize_rows_constants(eight_bits, rotation, x.dtype, aligned)
        with on(device):
            exact_quantize_rows[(cdiv(M, constants["BM"]),)](x, q, scale, M, N, *x.stride(), **constants)
    return q, scale


def product(
    dy: Tensor,
    weight: Tensor,
    *,
    t: Tensor | None = None,
    lora_A: Tensor | None = None,
    x: Tensor | None = None,
    dy_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    zeros: Tensor | None = None,
    rotation: int = 1,
    fast_accumulation: bool = True,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dX = dY W + drop(T A) [M, K] in `dtype` (None: dY's), written once, and dA = Tᵀ drop(x) [P, K] in lora_A's dtype
    where x is given.

    dy [M, N] with any strides and weight [N, K]: in one dtype, fp32, fp16 or bf16; or both in float8_e4m3fn or both in
    int8, with dy_scale [M] and, unless its columns have none, weight_scale [K]. t [M, P] in fp32, lora_A [P, K] in dX's
    dtype or fp32, x [M, K] with any strides. `rotation`: dY W is rotated in blocks of so many columns, up to 64.
    `zeros`: P · K cleared floats for dA, which are used up. `fast_accumulation` is for float8 alone. Raises ValueError
    where a needed tensor is missing or no tile holds P.
    """
    if (t is None) != (lora_A is None) or (x is not None and t is None) or (dropout > 0.0 and seed is None):
        raise ValueError("a tensor that the needed gradients read is None")
    if (dy.dtype in LIMITS) != (dy_scale is not None) or (dy_scale is None and weight_scale is not None):
        raise ValueError(f"dy in {dy.dtype}: 8 bits need dy_scale, and take weight_scale; nothing else does")
    (M, N), K, device = dy.shape, weight.shape[1], dy.device
    dtype = dtype or dy.dtype
    P = 0 if lora_A is None else lora_A.shape[0]
    drops = dropout > 0.0 and P > 0
    # The kernel reads 16 bits row by row, 8 bits column by column, as each is kept.
    weight = weight.contiguous() if dy_scale is None else weight.t().contiguous().t()
    lora_A = None if lora_A is None else lora_A.contiguous()
    per_load = 8 if dy_scale is None else 16
    aligned = (
        N % 16 == 0
        and K % 8 == 0
        and dy.stride(1) == 1
        and dy.stride(0) % per_load == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in (dy, weight) if tensor is not None)
        and (lora_A is None or lora_A.data_ptr() % 16 == 0)
        and (x is None or (x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0))
    )
    scaled = weight_scale is not None
    forms = scaled, rotation, x is not None, drops, fast_accumulation, aligned, deterministic
    key = (P, dy.dtype, dtype, forms, device)
    constants = _product_constants.get(key)
    if constants is None:
        spec = device_spec(device)
        chosen = config_for("exact_product", dy.dtype, 16, P, aligned, spec)
        if not isinstance(chosen, ProductConfig):
            raise ValueError(f"no shipped configuration holds P={P} in {dy.dtype}")
        flags = Flags(True, x is not None, False, False, drops, deterministic)
        constants = product_constants(
            P, dy.dtype, dtype, flags, scaled, rotation, fast_accumulation, aligned, chosen, spec
        )
        _product_constants[key] = constants
    rows = cdiv(M, constants["BM"])
    dx = (torch.empty if N else torch.zeros)((M, K), dtype=dtype, device=device)
    dA = None
    if x is not None and deterministic and rows:
        dA = torch.empty((rows, P, K), dtype=torch.float32, device=device)
    elif x is not None:
        dA = torch.zeros((P, K), dtype=torch.float32, device=device) if zeros is None else zeros.view(P, K)
    if M and N and K:
        with on(device):
            exact_product[(rows * cdiv(K, constants["BK"]),)](
                dy,
                weight,
                dx if dy_scale is None else dy_scale,
                dx if weight_scale is None else weight_scale.contiguous(),
                dx if t is None else t,
                dx if x is None else x,
                dx if lora_A is None else lora_A,
                dx,
                dx if dA is None else dA,
                dx if seed is None or not drops else seed,
                M,
                N,
                K,
                *dy.stride(),
                *((0, 0) if x is None else x.stride()),
                *((threshold_of(dropout), 1.0 / (1.0 - dropout)) if drops else (0, 1.0)),
                **constants,
            )
    if dA is None or lora_A is None:
        return dx, None
    return dx, finished(dA, lora_A.dtype, dA.dim() == 3)
