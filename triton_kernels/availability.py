"""Whether these kernels can run, and if not, why; importable without Triton."""

from __future__ import annotations

import functools
import os
from importlib import metadata

import torch

OLDEST_TRITON = (3, 6)
# Widths the shipped tables hold: beyond, T of a slab or the adapter's tile does not fit on chip.
MAX_ONE_LAUNCH_RANK = 256
MAX_RANK = 8192
MAX_ADAPTER = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def triton_missing() -> str | None:
    """The reason why Triton itself cannot be used, or None."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_TRITON:
        return f"Triton {version} is too old: {'.'.join(map(str, OLDEST_TRITON))} or newer is needed"
    return None


@functools.cache
def interpreter_broken() -> str | None:
    """The reason why Triton's interpreter cannot run a loop here, or None: before Triton 3.9 it takes the int of an
    array of one dimension for every loop bound, which NumPy 2.4 refuses."""
    import numpy

    try:
        int(numpy.ones(1))
    except TypeError:
        version = metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < (3, 9):
            return f"the interpreter of Triton {version} needs NumPy older than 2.4, here is {numpy.__version__}"
    return None


def why_not_here() -> str | None:
    """The reason why nothing here can run on this machine, or None."""
    reason = triton_missing()
    if reason is not None:
        return reason
    if interpreted():
        return interpreter_broken()
    if not torch.cuda.is_available():
        return "no CUDA GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def why_not(
    *,
    dtype: torch.dtype,
    device: torch.device,
    R: int,
    P: int,
    need_dx: bool = True,
    lora_dtype: torch.dtype | None = None,
) -> str | None:
    """The reason why `backward` cannot run such a problem, or None. R = 0 without factors, P = 0 without adapter."""
    reason = why_not_here()
    if reason is not None:
        return reason
    if interpreted() and device.type == "cpu":
        if dtype == torch.bfloat16 or lora_dtype == torch.bfloat16:
            return "Triton's interpreter does not multiply bfloat16; float32 and float16 it does"
    elif device.type != "cuda":
        return f"tensors are on {device.type}, the kernels run on CUDA (on the CPU with TRITON_INTERPRET=1)"
    elif torch.version.hip is not None:
        return "only NVIDIA GPUs are supported"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability 8.0 or newer is needed"
    elif dtype == torch.float32:  # summed in one chain, with up to three times cuBLAS's error, and no faster
        return "on a GPU products of float32 are PyTorch's"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not supported; float32, float16 and bfloat16 are"
    if lora_dtype is not None and lora_dtype not in (dtype, torch.float32):
        return f"lora_A and lora_B are {lora_dtype}; {dtype} or torch.float32 is supported"
    if need_dx and R == 0:
        return "without factors dX is the dense product, which PyTorch computes"
    if R > MAX_RANK:
        return f"rank R={R} is larger than {MAX_RANK}"
    if P > MAX_ADAPTER:
        return f"adapter rank P={P} is larger than {MAX_ADAPTER}"
    return None
