"""Host entry points: `backward` and `forward` launch on the tensors' device and its current stream.

What depends on (R, P, dtypes, flags, device) is decided once and kept; a call then looks it up, allocates the outputs
and launches. Nothing is tuned here, nothing is compiled after a form's first call of a key, and the host never waits
for the device.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig
from .constants import expand_constants, forward_constants, keeps_t, one_launch_constants, project_constants
from .devices import DeviceSpec, device_spec
from .forward import fused_forward
from .model import Flags, cdiv
from .one_launch import one_launch_backward
from .two_launch import expand_slab, expand_tiles, project

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Constexpr arguments of a launch, by everything they depend on.
_constants: dict[tuple[Any, ...], dict[str, Any]] = {}
_specs: dict[torch.device, DeviceSpec] = {}


def backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    need_dA: bool = True,
    need_dB: bool = True,
    need_dbias: bool = False,
    deterministic: bool = False,
    config: OneLaunchConfig | TwoLaunchConfig | None = None,
) -> Gradients:
    """dX [M, K], dA [P, K], dB [N, P], db [N] of `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` with W ≈ left · right; None where not
    needed.

    dy [M, N] and x [M, K] with any strides, xa [M, P], left [N, R], right [R, K] in one dtype (fp32, fp16, bf16);
    lora_A [P, K], lora_B [N, P] in that dtype or fp32, in which dA and dB come back. A tensor that the needed gradients
    do not read may be None. `dropout` with `seed`, int64 [2] (seed, offset) on the device: the adapter's input mask,
    regenerated. `deterministic`: no atomics, the same bits from run to run. `config` forces a form and its tiles;
    otherwise the cost model chooses between the two. Raises ValueError where a needed tensor is missing; what
    `why_not` reports is the caller's to check.
    """
    M, N = dy.shape
    factor = left if need_dx else None
    R = 0 if factor is None else factor.shape[1]
    adapter = need_dx or need_dA or need_dB
    P = 0 if not adapter or lora_B is None else lora_B.shape[1]
    K = right.shape[1] if right is not None else lora_A.shape[1] if lora_A is not None else 0
    if (
        (need_dx and (R == 0 or right is None or (P > 0 and lora_A is None)))
        or (need_dA and (x is None or lora_A is None or P == 0))
        or (need_dB and (xa is None or P == 0))
        or (dropout > 0.0 and seed is None)
    ):
        raise ValueError("a tensor that the needed gradients read is None")

    flags = Flags(need_dx, need_dA, need_dB, need_dbias, dropout > 0.0 and P > 0, deterministic)
    # A tensor that is not read stands for itself by dy: a pointer has to have a type.
    left = dy if factor is None else factor.contiguous()
    right = right.contiguous() if right is not None and need_dx else dy
    p_A = lora_A.contiguous() if lora_A is not None and P > 0 else dy
    p_B = lora_B.contiguous() if lora_B is not None and P > 0 else dy
    x = x if x is not None and need_dA else dy
    xa = xa.contiguous() if xa is not None and need_dB else dy
    seed = seed if seed is not None and flags.dropout else dy

    aligned_n = N % 8 == 0 and _aligned_rows(dy)
    aligned_k = (
        K % 8 == 0 and (not need_dA or _aligned_rows(x)) and right.data_ptr() % 16 == 0 and p_A.data_ptr() % 16 == 0
    )
    spec = _spec(dy.device)
    if config is None:
        config = dispatch.choose_config(M, N, K, R, P, dy.dtype, flags, aligned_n and aligned_k, spec)

    rows = 0 if M == 0 else cdiv(M, config.block_m)
    fp32 = {"dtype": torch.float32, "device": dy.device}
    lead = (rows,) if deterministic else ()
    allocate = torch.empty if deterministic and rows else torch.zeros
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device) if need_dx else None
    dA = allocate((*lead, P, K), **fp32) if need_dA else None
    dB = allocate((*lead, N, P), **fp32) if need_dB else None
    db = allocate((*lead, N), **fp32) if need_dbias else None

    if rows:
        outputs = [dy if output is None else output for output in (dx, dA, dB, db)]
        operands = (dy, x, xa, left, right, p_A, p_B, *outputs, seed)
        launch = _one_launch if isinstance(config, OneLaunchConfig) else _two_launch
        with _on(dy.device):
            launch(operands, M, N, K, R, P, float(scaling), dropout, flags, aligned_n, aligned_k, config, spec)
    A_dtype = dy.dtype if lora_A is None else lora_A.dtype
    B_dtype = dy.dtype if lora_B is None else lora_B.dtype
    return (
        dx,
        _finished(dA, A_dtype, deterministic),
        _finished(dB, B_dtype, deterministic),
        _finished(db, dy.dtype, deterministic),
    )


def _one_launch(
    operands: tuple[Tensor, ...],
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    scaling: float,
    dropout: float,
    flags: Flags,
    aligned_n: bool,
    aligned_k: bool,
    config: OneLaunchConfig,
    spec: DeviceSpec,
) -> None:
    dy, x = operands[0], operands[1]
    key = (config, R, P, dy.dtype, flags, aligned_n, aligned_k, spec.capability)
    constants = _constants.get(key)
    if constants is None:
        constants = _constants[key] = one_launch_constants(R, P, dy.dtype, flags, aligned_n, aligned_k, config, spec)
    one_launch_backward[(cdiv(M, config.block_m),)](
        *operands,
        M,
        N,
        K,
        *dy.stride(),
        *x.stride(),
        scaling,
        _threshold(dropout),
        1.0 / (1.0 - dropout),
        **constants,
    )


def _two_launch(
    operands: tuple[Tensor, ...],
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    scaling: float,
    dropout: float,
    flags: Flags,
    aligned_n: bool,
    aligned_k: bool,
    config: TwoLaunchConfig,
    spec: DeviceSpec,
) -> None:
    dy, x, xa, left, right, lora_A, lora_B, dx, dA, dB, db, seed = operands
    key = (config, R, P, dy.dtype, flags, aligned_n, aligned_k, spec.capability)
    constants = _constants.get(key)
    if constants is None:
        constants = _constants[key] = {
            "project": project_constants(R, P, dy.dtype, flags, aligned_n, config, spec),
            "expand": expand_constants(R, P, dy.dtype, flags, aligned_k, config, spec),
        }
    rows = cdiv(M, config.block_m)
    n_chunk, k_chunk = dispatch.chunks(M, N, K, R, config, flags.need_dx, spec)
    splits = max(1, cdiv(N, n_chunk))
    layers = splits if flags.deterministic else 1
    allocate = torch.empty if flags.deterministic else torch.zeros
    t = allocate((layers, rows * config.block_m, constants["project"]["WIDTH"]), dtype=torch.float32, device=dy.device)
    tiles = max(1, cdiv(R, constants["project"]["BR"]))
    project[(rows, tiles, splits)](
        dy, xa, left, lora_B, t, dB, db, M, N, n_chunk, *dy.stride(), scaling, **constants["project"]
    )
    if flags.need_dx or flags.need_dA:
        expand = expand_slab if keeps_t(R, config) else expand_tiles
        expand[(cdiv(K, k_chunk), rows)](
            t,
            x,
            right,
            lora_A,
            dx,
            dA,
            seed,
            M,
            K,
            k_chunk,
            layers,
            *x.stride(),
            _threshold(dropout),
            1.0 / (1.0 - dropout),
            **constants["expand"],
        )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    config: ForwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s xa Bᵀ [M, N] and xa = drop(x) Aᵀ [M, P], both in x's dtype, in one launch.

    x [M, K] with any strides; weight [N, K] and bias [N] in its dtype; lora_A [P, K], lora_B [N, P] in that dtype or
    fp32; `dropout` and `seed` as in `backward`. Raises ValueError where no configuration holds P.
    """
    M, K = x.shape
    N, P = lora_B.shape
    if dropout > 0.0 and seed is None:
        raise ValueError("dropout needs a seed")
    weight, lora_A, lora_B = weight.contiguous(), lora_A.contiguous(), lora_B.contiguous()
    aligned = K % 8 == 0 and _aligned_rows(x) and weight.data_ptr() % 16 == 0 and lora_A.data_ptr() % 16 == 0
    key = (P, x.dtype, bias is not None, dropout > 0.0, aligned, config, x.device)
    constants = _constants.get(key)
    if constants is None:
        chosen = config or dispatch.config_for("forward", x.dtype, 16, P, aligned, _spec(x.device))
        if not isinstance(chosen, ForwardConfig):
            raise ValueError(f"no shipped configuration holds P={P} in {x.dtype}")
        constants = _constants[key] = forward_constants(P, x.dtype, bias is not None, dropout > 0.0, aligned, chosen)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    xa = torch.empty((M, P), dtype=x.dtype, device=x.device)
    blocks = cdiv(M, constants["BM"]) * cdiv(N, constants["BN"])
    if blocks:
        with _on(x.device):
            fused_forward[(blocks,)](
                x,
                weight,
                x if bias is None else bias,
                lora_A,
                lora_B,
                y,
                xa,
                x if seed is None else seed,
                M,
                N,
                K,
                *x.stride(),
                float(scaling),
                _threshold(dropout),
                1.0 / (1.0 - dropout),
                **constants,
            )
    return y, xa


def _finished(buffer: Tensor | None, dtype: torch.dtype, deterministic: bool) -> Tensor | None:
    """A gradient from its fp32 buffer. The slabs' own buffers are added by torch.sum, whose order is fixed for a
    shape: a second launch, over a few MB."""
    if buffer is None:
        return None
    return (buffer.sum(0) if deterministic else buffer).to(dtype)


def _threshold(dropout: float) -> int:
    """floor(p * 2^32) as an int32 of the same bits: an argument that fits no int32 would change the signature."""
    threshold = int(dropout * (1 << 32))
    return threshold - (1 << 32) if threshold >= 1 << 31 else threshold


def _aligned_rows(t: Tensor) -> bool:
    return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def _spec(device: torch.device) -> DeviceSpec:
    spec = _specs.get(device)
    if spec is None:
        spec = _specs[device] = device_spec(device)
    return spec


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' one, at no cost where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
