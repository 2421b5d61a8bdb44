"""Host entry points: `backward` and `forward` launch on the tensors' device and its current stream.

What depends on (R, P, dtypes, flags, device) is decided once and kept; a call then looks it up, allocates the outputs
and launches. Nothing is tuned here, nothing is compiled after a form's first call of a key, and the host never waits
for the device.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import availability, dispatch
from .configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig
from .constants import expand_constants, forward_constants, keeps_t, one_launch_constants, project_constants
from .cost_model import Flags, cdiv, k_chunk_of, n_chunk_of
from .devices import device_spec
from .fused_forward import fused_forward
from .one_launch import one_launch_backward
from .two_launch import expand_slab, expand_tiles, project

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decided once for calls of one size and kind."""

    flags: Flags
    config: OneLaunchConfig | TwoLaunchConfig
    rows: int  # slabs of block_m rows
    constants: dict[str, Any]  # of one_launch_backward, or of project
    expand: dict[str, Any]  # of the second launch
    n_chunk: int
    k_chunk: int
    slabs: int  # buffers of each sum that are stored apart and added afterwards; 0: one, added to by atomics
    parts: tuple[Part | None, ...]  # of dA, dB and db in the workspace
    workspace: int  # elements


class Part(NamedTuple):
    """Where a contiguous tensor lies in a flat one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int


# Elements: 512 bytes, on which torch's allocator puts tensors of their own. Kernels are compiled for aligned pointers.
_BOUNDARY = 128
# Enough for every layer of a model at some hundred batch sizes; then the table starts anew.
_MOST_PLANS = 8192
_NOTHING = contextlib.nullcontext()
_plans: dict[tuple[Any, ...], Plan] = {}
_kinds: set[tuple[Any, ...]] = set()
compiles_both_forms = not availability.interpreted()
_forward_constants: dict[tuple[Any, ...], dict[str, Any]] = {}


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
    drops = dropout > 0.0 and P > 0
    # A tensor that is not read stands for itself by dy: a pointer has to have a type.
    given = _Inputs(
        dy,
        x if x is not None and need_dA else dy,
        xa.contiguous() if xa is not None and need_dB else dy,
        dy if factor is None else factor.contiguous(),
        right.contiguous() if right is not None and need_dx else dy,
        lora_A.contiguous() if lora_A is not None and P else dy,
        lora_B.contiguous() if lora_B is not None and P else dy,
        seed if seed is not None and drops else dy,
    )
    dtype, device = dy.dtype, dy.device
    needs = (need_dx, need_dA, need_dB, need_dbias, drops, deterministic)
    aligned_n, aligned_k = _alignment(given, N, K, need_dA)
    key = (M, N, K, R, P, dtype, device, needs, aligned_n, aligned_k, config)
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(*key)
        other = _form_to_compile(plan.config, R, P, dtype, device, needs, aligned_n and aligned_k) if M else None
        if config is None and other is not None:
            row = slice(0, 1)
            x_row, xa_row = None if x is None else x[row], None if xa is None else xa[row]
            options: dict[str, Any] = {"dropout": dropout, "seed": seed, "deterministic": deterministic}
            options |= {"need_dx": need_dx, "need_dA": need_dA, "need_dB": need_dB, "need_dbias": need_dbias}
            backward(dy[row], x_row, xa_row, left, right, lora_A, lora_B, scaling, **options, config=other)

    dx = torch.empty((M, K), dtype=dtype, device=device) if need_dx else None
    dA, dB, db = _sums(plan, device)
    if plan.rows:
        results = tuple(dy if result is None else result for result in (dx, dA, dB, db))
        mask = (threshold_of(dropout), 1.0 / (1.0 - dropout)) if drops else (0, 1.0)
        with on(device):
            launch = _launch_once if isinstance(plan.config, OneLaunchConfig) else _launch_twice
            launch(plan, given, results, (M, N, K, R), float(scaling), mask)
    # Without lora_A or lora_B their gradients are not asked for.
    return (
        dx,
        None if dA is None else finished(dA, given.lora_A.dtype, plan.slabs),
        None if dB is None else finished(dB, given.lora_B.dtype, plan.slabs),
        None if db is None else finished(db, dtype, plan.slabs),
    )


class _Inputs(NamedTuple):
    """What the kernels read, in their order; `dy` in the place of what a call does not read."""

    dy: Tensor
    x: Tensor
    xa: Tensor
    left: Tensor
    right: Tensor
    lora_A: Tensor
    lora_B: Tensor
    seed: Tensor


def _alignment(given: _Inputs, N: int, K: int, need_dA: bool) -> tuple[bool, bool]:
    """Whether rows along N, and rows along K, start on 16-byte boundaries and are contiguous."""
    stride_m, stride_n = given.dy.stride()
    aligned_n = N % 8 == 0 and stride_n == 1 and stride_m % 8 == 0 and given.dy.data_ptr() % 16 == 0
    stride_m, stride_k = given.x.stride()
    aligned_k = (
        K % 8 == 0
        and (not need_dA or (stride_k == 1 and stride_m % 8 == 0 and given.x.data_ptr() % 16 == 0))
        and given.right.data_ptr() % 16 == 0
        and given.lora_A.data_ptr() % 16 == 0
    )
    return aligned_n, aligned_k


def _sums(plan: Plan, device: torch.device) -> list[Tensor | None]:
    """The fp32 buffers of dA, dB and db: disjoint, contiguous views of one workspace, which one memset zeroes.

    fp32 gradients are returned as these views. To autograd and to optimizers a contiguous view is a tensor like any
    other: AccumulateGrad keeps it as `.grad` without a copy, and what is added to one in place does not touch the
    others. The workspace lives as long as one of them; it is no larger than they are together. Gradients of other
    dtypes are copies, and the workspace goes with the call.
    """
    if not any(plan.parts):
        return [None, None, None]
    allocate = torch.empty if plan.slabs else torch.zeros
    space = allocate((plan.workspace,), dtype=torch.float32, device=device)
    # as_strided is one call, narrow and view are two: 2 us against 5.
    origin = space.storage_offset()
    return [None if p is None else space.as_strided(p.shape, p.stride, origin + p.begin) for p in plan.parts]


def _launch_once(
    plan: Plan,
    given: _Inputs,
    results: tuple[Tensor, ...],
    sizes: tuple[int, int, int, int],
    scaling: float,
    mask: tuple[int, float],
) -> None:
    """`results` are dX, dA, dB and db, `sizes` M, N, K and R, `mask` the threshold of dropout and 1 / (1 - p)."""
    *inputs, seed = given
    numbers = (*sizes[:3], *given.dy.stride(), *given.x.stride(), scaling, *mask)
    one_launch_backward[(plan.rows,)](*inputs, *results, seed, *numbers, **plan.constants)


def _launch_twice(
    plan: Plan,
    given: _Inputs,
    results: tuple[Tensor, ...],
    sizes: tuple[int, int, int, int],
    scaling: float,
    mask: tuple[int, float],
) -> None:
    """As `_launch_once`: T = dY [left | s·B] first, then what is made of it."""
    (M, N, K, R), (dx, dA, dB, db) = sizes, results
    flags, splits = plan.flags, max(1, cdiv(N, plan.n_chunk))
    needed = flags.need_dx or flags.need_dA
    layers = 0 if splits == 1 or not needed else splits if flags.deterministic else 1
    shape = (plan.rows * plan.config.block_m, plan.constants["WIDTH"])
    t = torch.empty(shape, dtype=given.dy.dtype, device=given.dy.device)
    # Passed all the same where it is empty, so that one compiled kernel serves sizes that are split and that are not.
    allocate = torch.empty if flags.deterministic else torch.zeros
    parts = allocate((layers, *shape), dtype=torch.float32, device=given.dy.device)
    tiles = max(1, cdiv(R, plan.constants["BR"]))
    n_sizes = (M, N, plan.n_chunk, *given.dy.stride(), scaling)
    n_inputs = (given.dy, given.xa, given.left, given.lora_B)
    project[(plan.rows * tiles, splits)](*n_inputs, t, parts, dB, db, *n_sizes, **plan.constants)
    if not needed:
        return
    assert isinstance(plan.config, TwoLaunchConfig)
    k_inputs, strides, chunks = (given.x, given.right, given.lora_A), given.x.stride(), cdiv(K, plan.k_chunk)
    if keeps_t(R, plan.config):
        k_sizes = (M, K, plan.k_chunk, layers, *strides, *mask)
        expand_slab[(plan.rows, chunks)](t, parts, *k_inputs, dx, dA, given.seed, *k_sizes, **plan.expand)
    else:
        if layers:
            t = (parts[0] if layers == 1 else parts.sum(0)).to(t.dtype)
        k_sizes = (M, K, *strides, *mask)
        expand_tiles[(plan.rows * chunks,)](t, *k_inputs, dx, dA, given.seed, *k_sizes, **plan.expand)


def _make_plan(
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    dtype: torch.dtype,
    device: torch.device,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    aligned_n: bool,
    aligned_k: bool,
    forced: OneLaunchConfig | TwoLaunchConfig | None,
) -> Plan:
    """Decide, and remember the decision."""
    spec, flags = device_spec(device), Flags(*needs)
    aligned = aligned_n and aligned_k  # both or neither: what ships is compiled and checked in these two kinds
    config = forced or dispatch.choose_config(M, N, K, R, P, dtype, flags, aligned, spec)
    rows = cdiv(M, config.block_m)
    slabs = rows if flags.deterministic else 0
    wanted = (((P, K), flags.need_dA), ((N, P), flags.need_dB), ((N,), flags.need_dbias))
    sums = (slabs, *_parts([shape if needed else None for shape, needed in wanted], slabs))
    if isinstance(config, OneLaunchConfig):
        constants = one_launch_constants(R, P, dtype, flags, aligned, aligned, config, spec)
        plan = Plan(flags, config, rows, constants, {}, N, K, *sums)
    else:
        constants = project_constants(R, P, dtype, flags, aligned, config, spec)
        expand = expand_constants(R, P, dtype, flags, aligned, config, spec)
        n_chunk, k_chunk = n_chunk_of(M, N, R, config, spec.sms), k_chunk_of(M, K, R, config, flags, spec.sms)
        plan = Plan(flags, config, rows, constants, expand, n_chunk, k_chunk, *sums)
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[(M, N, K, R, P, dtype, device, needs, aligned_n, aligned_k, forced)] = plan
    return plan


def _parts(shapes: list[tuple[int, ...] | None], slabs: int) -> tuple[tuple[Part | None, ...], int]:
    """Where tensors of these shapes, or `slabs` of each, lie one after the other, and where the last one ends."""
    parts: list[Part | None] = []
    end = 0
    for shape in shapes:
        if shape is None:
            parts.append(None)
            continue
        shape = (slabs, *shape) if slabs else shape
        begin = cdiv(end, _BOUNDARY) * _BOUNDARY
        end = begin + math.prod(shape)
        parts.append(Part(shape, tuple(math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)), begin))
    return tuple(parts), end


def _form_to_compile(
    chosen: OneLaunchConfig | TwoLaunchConfig,
    R: int,
    P: int,
    dtype: torch.dtype,
    device: torch.device,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    aligned: bool,
) -> OneLaunchConfig | TwoLaunchConfig | None:
    """The form that other sizes of this kind may need, at the kind's first call: compiling it now, on one row, keeps
    every later call free of compilation. Nothing to compile in the interpreter."""
    kind = (R, P, dtype, device, needs, aligned)
    if not compiles_both_forms or kind in _kinds:
        return None
    _kinds.add(kind)
    forms = dispatch.form_configs(dtype, R, P, aligned, device_spec(device))
    return next((form for form in forms if form is not None and form != chosen), None)


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
    aligned = K % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0
    aligned = aligned and all(t.data_ptr() % 16 == 0 for t in (x, weight, lora_A))
    key = (P, x.dtype, bias is not None, dropout > 0.0, aligned, config, x.device)
    constants = _forward_constants.get(key)
    if constants is None:
        chosen = config or dispatch.config_for("forward", x.dtype, 16, P, aligned, device_spec(x.device))
        if not isinstance(chosen, ForwardConfig):
            raise ValueError(f"no shipped configuration holds P={P} in {x.dtype}")
        constants = forward_constants(P, x.dtype, bias is not None, dropout > 0.0, aligned, chosen)
        _forward_constants[key] = constants
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    xa = torch.empty((M, P), dtype=x.dtype, device=x.device)
    blocks = cdiv(M, constants["BM"]) * cdiv(N, constants["BN"])
    if blocks:
        with on(x.device):
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
                threshold_of(dropout),
                1.0 / (1.0 - dropout),
                **constants,
            )
    return y, xa


def finished(buffer: Tensor, dtype: torch.dtype, slabs: int) -> Tensor:
    """A gradient from its fp32 buffer. The slabs' own buffers are added by torch.sum, whose order is fixed for a
    shape: a second launch, over a few MB."""
    whole = buffer.sum(0) if slabs else buffer
    return whole if dtype == torch.float32 else whole.to(dtype)


def threshold_of(dropout: float) -> int:
    """floor(p * 2^32) as an int32 of the same bits: an argument that fits no int32 would change the signature."""
    threshold = int(dropout * (1 << 32))
    return threshold - (1 << 32) if threshold >= 1 << 31 else threshold


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' one, at no cost where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
