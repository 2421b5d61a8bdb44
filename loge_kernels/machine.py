"""What this machine has, by the names that users give: devices, dtypes, versions of packages."""

from __future__ import annotations

from collections.abc import Collection
from importlib import metadata
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def choose_device(name: str, argument: str = "device=") -> torch.device:
    """The torch device for "auto", which is CUDA where there is one, "cpu", "cuda", "cuda:1", ….

    Raises ValueError for any other and for one that is not here; the message names the argument, as in "--device ".
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not (device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count)):
        have = ", ".join(("auto", "cpu", *(f"cuda:{i}" for i in range(count))))
        raise ValueError(f"{argument}{name!r} is not available; choose {have} (torch sees {count} CUDA devices)")
    return device


def dtype_name(name: str, known: Collection[str] = tuple(DTYPES)) -> str:
    """The name in DTYPES of a dtype that may be given in short ("bf16"). Raises ValueError for one not in `known`."""
    full = SHORT.get(name, name)
    if full not in known:
        short = ", ".join(short for short, long in SHORT.items() if long in known)
        raise ValueError(f"dtype={name!r} is unknown; choose one of {', '.join(known)} (or {short})")
    return full


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name for frozen weights. "auto" is bfloat16 where it is fast: otherwise a CPU step in bfloat16
    takes many times as long as in float32."""
    if name != "auto":
        return DTYPES[dtype_name(name)]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bfloat16_instructions()
    return torch.bfloat16 if fast else torch.float32


def _has_bfloat16_instructions() -> bool:
    """oneDNN takes bfloat16 on any x86 CPU with AVX-512 and multiplies it in float32 where there are none."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        return True
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2"))


def version_of(package: str) -> str | None:
    """The version of an installed package, or None. Torch's own names the build, which its package does not always."""
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
