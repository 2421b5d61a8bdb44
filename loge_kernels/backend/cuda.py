"""The adapter between a backward problem and the CUDA C++ kernels, which know pointers, sizes and a stream."""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .problem import BackwardProblem, Gradients
from .reference import add_weight_gradient

_CODES = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


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
    extension, reason = _extension(), why_not_here()
    if reason is not None or isinstance(extension, str):
        return reason
    if p.dy.device.type != "cuda":
        return f"tensors are on {p.dy.device.type}, the kernels run on CUDA"
    if p.kind == "mixed":
        return "exact_fraction needs dense products, which PyTorch computes"
    if p.left_scale is not None:
        return "the low-rank product is in 8 bits, which PyTorch computes"
    if p.dropout > 0.0:
        return "the CUDA kernels regenerate no dropout mask"
    if p.dy.dtype not in _CODES:
        return f"dtype {p.dy.dtype} is not supported; float16 and bfloat16 are"
    if p.need_dx and p.left is None:
        return "without factors dX is the dense product, which PyTorch computes"
    properties = torch.cuda.get_device_properties(p.dy.device)
    if properties.major < 8:
        return "compute capability 8.0 or newer is needed"
    try:
        plan = extension.plan(_target(extension, p.dy.device)[0], **_sizes(p), **_needs(p))
    except ValueError as error:
        return str(error)
    limit = getattr(properties, "shared_memory_per_block_optin", plan["shared_bytes"])
    if plan["shared_bytes"] > limit:
        return f"{plan['shared_bytes']} bytes of shared memory are needed, {properties.name} has {limit} for a block"
    return None


def backward(p: BackwardProblem) -> Gradients:
    """All gradients: dX, dA and dB from one launch; dW and db, where asked for, are PyTorch's."""
    extension = _extension()
    assert not isinstance(extension, str)
    device, dtype = p.dy.device, p.dy.dtype
    (kernel, sm_count), sizes, needs = _target(extension, device), _sizes(p), _needs(p)
    M, N, K, P = sizes["M"], sizes["N"], sizes["K"], sizes["P"]

    dy = _rows(p.dy)
    x = _rows(p.x) if needs["need_dA"] and p.x is not None else None
    operands = {"dy": dy, "x": x}
    for name in ("xa", "left", "right", "lora_A", "lora_B"):
        tensor = getattr(p, name)
        operands[name] = None if tensor is None else _packed(tensor.to(dtype))
    dx = torch.empty(M, K, dtype=dtype, device=device) if needs["need_dx"] else None
    slabs: tuple[int, ...] = ()
    if p.deterministic:
        slabs = (extension.plan(kernel, **sizes, **needs, sm_count=sm_count)["slabs"],)
    # Partials are written whole; atomics add to zeros.
    make = torch.empty if p.deterministic else torch.zeros
    dA = make(*slabs, P, K, dtype=torch.float32, device=device) if needs["need_dA"] else None
    dB = make(*slabs, N, P, dtype=torch.float32, device=device) if needs["need_dB"] else None
    extension.backward(
        kernel,
        **{name: _address(tensor) for name, tensor in operands.items()},
        **{name: _address(tensor) for name, tensor in (("dx", dx), ("dA", dA), ("dB", dB))},
        **sizes,
        dy_stride=dy.stride(0),
        x_stride=K if x is None else x.stride(0),
        scaling=p.scaling,
        dtype=getattr(extension, _CODES[dtype]),
        deterministic=p.deterministic,
        sm_count=sm_count,
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    if p.deterministic:
        dA, dB = (None if partials is None else partials.sum(0) for partials in (dA, dB))
    gradients = Gradients(dx=dx)
    if dA is not None and p.lora_A is not None:
        gradients.dA = dA.to(p.lora_A.dtype)
    if dB is not None and p.lora_B is not None:
        gradients.dB = dB.to(p.lora_B.dtype)
    add_weight_gradient(gradients, p)
    if p.need_dbias:
        gradients.dbias = p.dy.sum(0)
    return gradients


def _target(extension: ModuleType, device: torch.device) -> tuple[str, int]:
    """The kernel for a device, and its count of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    hopper = (properties.major, properties.minor) == (9, 0) and "sm90" in extension.kernels
    return "sm90" if hopper else "sm80", properties.multi_processor_count


def _sizes(p: BackwardProblem) -> dict[str, int]:
    M, N = p.dy.shape
    like_x = next((t for t in (p.x, p.right, p.lora_A) if t is not None), None)
    return {
        "M": M,
        "N": N,
        # Without anything as wide as x only dB is wanted, which does not depend on it.
        "K": 8 if like_x is None else like_x.shape[1],
        "R": 0 if p.left is None else p.left.shape[1],
        "P": 0 if p.lora_B is None else p.lora_B.shape[1],
    }


def _needs(p: BackwardProblem) -> dict[str, bool]:
    return {"need_dx": p.need_dx, "need_dA": p.need_dA, "need_dB": p.need_dB}


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows start on 16-byte boundaries and are contiguous, or else a copy."""
    row, column = tensor.stride()
    one = tensor.shape[0] == 1
    fits = column == 1 and (one or (row % 8 == 0 and row >= tensor.shape[1])) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _packed(tensor: Tensor) -> Tensor:
    """Contiguous, on a 16-byte boundary."""
    fits = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
