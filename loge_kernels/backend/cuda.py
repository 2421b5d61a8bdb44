"""The adapter between a backward problem and the CUDA C++ kernels, which know pointers, sizes and a stream.

What depends on shapes, dtypes, wants and the device is decided once and kept. A call then looks it up, allocates, and
asks for one memset and one kernel, or two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import BackwardProblem, Gradients
from .reference import add_weight_gradient

_CODES = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


class _Plan(NamedTuple):
    """What is decided once for the calls of one shape."""

    launch: Callable[..., None]  # of the extension's own Plan
    K: int
    R: int
    P: int
    sets: int  # of sums to add up; 0: the kernels leave none
    workspace: int  # elements
    scratch: int


# Enough for every layer of a model at some hundred batch sizes; then the table starts anew. A reason against is kept,
# too.
_MOST_PLANS = 8192
_plans: dict[tuple[Any, ...], _Plan | str] = {}


@functools.cache
def _extension() -> ModuleType | str:
    """The extension module, or the reason why there is none."""
    try:
        return import_module("loge_kernels._C")
    except ModuleNotFoundError:
        return "the CUDA extension is not built: reinstall where nvcc is, without LOGE_SKIP_CUDA"
    except ImportError as error:
        return f"the CUDA extension cannot be loaded: {error}"


def why_not_here() -> str | None:
    """Why no CUDA kernel can run on this machine, or None."""
    extension = _extension()
    if isinstance(extension, str):
        return extension
    if torch.version.hip is not None:
        return "only NVIDIA GPUs are supported"
    return None if torch.cuda.is_available() else f"no CUDA GPU (built {built_for()})"


def built_for() -> str:
    """The architectures and the toolkit of the extension; "" without one."""
    extension = _extension()
    if isinstance(extension, str):
        return ""
    archs = ", ".join(f"sm_{arch}" for arch in extension.archs.split())
    return f"for {archs} with CUDA {extension.toolkit}"


def why_not(p: BackwardProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if p.kind == "mixed":
        return "exact_fraction needs dense products, which PyTorch computes"
    if p.left_scale is not None:
        return "the low-rank product is in 8 bits, which PyTorch computes"
    if p.dropout > 0.0:
        return "the CUDA kernels regenerate no dropout mask"
    if p.need_dx and p.left is None:
        return "without factors dX is the dense product, which PyTorch computes"
    if p.dy.device.type != "cuda":
        return why_not_here() or f"tensors are on {p.dy.device.type}, the kernels run on CUDA"
    plan = _plan(p)
    return plan if isinstance(plan, str) else None


def backward(p: BackwardProblem) -> Gradients:
    """All gradients: dX, dA and dB from the kernels; dW and db, where asked for, are PyTorch's."""
    plan = _plan(p)
    if isinstance(plan, str):
        raise ValueError(plan)
    M, N = p.dy.shape
    gradients = Gradients()
    if M == 0:
        _nothing(p, plan.K, gradients)
    else:
        _launch(p, plan, M, N, gradients)
    add_weight_gradient(gradients, p)
    if p.need_dbias:
        gradients.dbias = p.dy.sum(0)
    return gradients


def _launch(p: BackwardProblem, plan: _Plan, M: int, N: int, gradients: Gradients) -> None:
    """dX, dA and dB, those that are wanted. In fp32 dA and dB are the sums themselves, and share one storage."""
    launch, K, R, P, sets, size, scratch_size = plan
    dtype = p.dy.dtype
    dy, x = _rows(p.dy), _rows(_sized(p.x, M * K)) if p.need_dA else None
    left = right = lora_A = lora_B = xa = dx = workspace = scratch = dA = dB = None
    if p.need_dx:
        left, right = _packed(_sized(p.left, N * R), dtype), _packed(_sized(p.right, R * K), dtype)
        lora_A = _packed(_sized(p.lora_A, P * K), dtype) if P else None
        gradients.dx = dx = dy.new_empty((M, K))  # 1 us less than torch.empty
    if P and (p.need_dx or p.need_dA):
        lora_B = _packed(_sized(p.lora_B, N * P), dtype)
    if p.need_dB:
        xa = _packed(_sized(p.xa, M * P), dtype)
    if size:
        workspace = dy.new_empty(size, dtype=torch.float32)
    if scratch_size:  # apart from the sums, which may be the gradients and would keep it
        scratch = dy.new_empty(scratch_size, dtype=torch.float32)
    if not sets:
        if p.need_dA and p.lora_A.dtype == dtype:  # type: ignore[union-attr]
            gradients.dA = dA = dy.new_empty((P, K))
        if p.need_dB and p.lora_B.dtype == dtype:  # type: ignore[union-attr]
            gradients.dB = dB = dy.new_empty((N, P))
    operands = (dy, x, xa, left, right, lora_A, lora_B, dx, dA, dB, workspace, scratch)
    x_stride = K if x is None else x.stride(0)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
    launch(*addresses, dy.stride(0), x_stride, p.scaling, _stream(dy.device.index))

    if workspace is None:
        return
    # A kernel without atomics may leave a set of sums for each slab. torch.sum's order is fixed for a shape.
    sums = workspace.view(sets, -1).sum(0) if sets else workspace
    if p.need_dA and dA is None:
        gradients.dA = _as(p.lora_A, sums.as_strided((P, K), (K, 1)))
    if p.need_dB and dB is None:
        gradients.dB = _as(p.lora_B, sums.as_strided((N, P), (P, 1), P * K if p.need_dA else 0))


def _as(parameter: Tensor | None, sums: Tensor) -> Tensor:
    """The sums in the parameter's dtype: only where they are deterministic is there something to do."""
    assert parameter is not None
    return sums if parameter.dtype == sums.dtype else sums.to(parameter.dtype)


def _nothing(p: BackwardProblem, K: int, gradients: Gradients) -> None:
    """The gradients of no rows."""
    if p.need_dx:
        gradients.dx = p.dy.new_empty(0, K)
    if p.need_dA and p.lora_A is not None:
        gradients.dA = torch.zeros_like(p.lora_A)
    if p.need_dB and p.lora_B is not None:
        gradients.dB = torch.zeros_like(p.lora_B)


def _plan(p: BackwardProblem) -> _Plan | str:
    """What is decided for this problem's shape, or the reason why the kernels cannot run it."""
    dy, left, lora_A, lora_B = p.dy, p.left, p.lora_A, p.lora_B
    like_x = p.x if p.x is not None else p.right if p.right is not None else lora_A
    key = (
        *dy.shape,
        # Without anything as wide as x only dB is wanted, which does not depend on it.
        8 if like_x is None else like_x.shape[1],
        0 if left is None else left.shape[1],
        0 if lora_B is None else lora_B.shape[1],
        dy.dtype,
        dy.device,
        None if lora_A is None else lora_A.dtype,
        None if lora_B is None else lora_B.dtype,
        p.need_dx,
        p.need_dA,
        p.need_dB,
        p.deterministic,
    )
    plan = _plans.get(key)
    if plan is None:
        reason = why_not_here()  # not kept: it is not the shape's
        if reason is not None:
            return reason
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _make_plan(*key)
    return plan


def _make_plan(
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    dtype: torch.dtype,
    device: torch.device,
    A_dtype: torch.dtype | None,
    B_dtype: torch.dtype | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    deterministic: bool,
) -> _Plan | str:
    extension = _extension()
    assert not isinstance(extension, str)
    if dtype not in _CODES:
        return f"dtype {dtype} is not supported; float16 and bfloat16 are"
    for name, given in (("lora_A", A_dtype), ("lora_B", B_dtype)):
        if given not in (None, dtype, torch.float32):
            return f"{name} is {given}; {dtype} or torch.float32 is supported"
    target = _target(extension, device)
    if isinstance(target, str):
        return target
    sizes = {"M": M, "N": N, "K": K, "R": R, "P": P}
    needs = {"need_dx": need_dx, "need_dA": need_dA, "need_dB": need_dB, "deterministic": deterministic}
    try:
        made = extension.plan(**target, **sizes, **needs, dtype=getattr(extension, _CODES[dtype]))
    except ValueError as error:
        return str(error)
    return _Plan(made.launch, K, R, P, made.sets, made.workspace, made.scratch)


def _target(extension: ModuleType, device: torch.device) -> dict[str, Any] | str:
    """The kernel for a device, as arguments of the extension's `plan`, or why there is none."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "compute capability 8.0 or newer is needed"
    hopper = capability == (9, 0) and "sm90" in extension.kernels
    return {"kernel": "sm90" if hopper else "sm80", "device": device.index}


def _stream(device: int) -> int:
    """The current stream's handle, as Triton and Inductor ask for it: `torch.cuda.current_stream` makes an object of
    it, which costs 2 us."""
    return torch._C._cuda_getCurrentRawStream(device)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows start on 16-byte boundaries and are contiguous, or else a copy."""
    row, column = tensor.stride()
    one = tensor.shape[0] == 1
    fits = column == 1 and (one or (row % 8 == 0 and row >= tensor.shape[1])) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, on a 16-byte boundary, in `dtype`."""
    if tensor.dtype != dtype:  # by name: `to` takes 2 us longer
        tensor = tensor.bfloat16() if dtype == torch.bfloat16 else tensor.half()
    fits = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _sized(tensor: Tensor | None, size: int) -> Tensor:
    """The tensor, of `size` elements: the kernels take pointers, and would read or write beyond a smaller one."""
    if tensor is None or tensor.numel() != size:
        has = 0 if tensor is None else tensor.numel()
        raise ValueError(f"an operand of the backward pass has {has} elements where {size} are needed")
    return tensor
