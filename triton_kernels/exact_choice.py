"""Whether the exact kernels can run a problem; importable without Triton."""

from __future__ import annotations

from typing import Literal

import torch

from . import availability
from .devices import device_spec
from .dispatch import config_for

# "torch": PyTorch's composition; "prepared": `exact_prepare`, then PyTorch's products; "fused": `exact_product` too.
ExactForm = Literal["torch", "prepared", "fused"]


def fuses(dtype: torch.dtype) -> bool:
    """Whether `product` takes dX in `dtype`: no tensor core multiplies float32, and without one its epilogue spills."""
    return dtype.itemsize == 2 or availability.interpreted()


def why_not_exact(
    *,
    dtype: torch.dtype,
    device: torch.device,
    P: int,
    eight_bits: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
) -> str | None:
    """The reason why `prepare` and `product` cannot run such a problem, or None. P = 0 without an adapter; `eight_bits`
    is float8_e4m3fn or int8 where dY is to be quantised."""
    reason = availability.why_not(
        dtype=dtype, device=device, R=0, P=P, need_dx=False, lora_dtype=lora_dtype if P else None
    )
    if reason is not None:
        return reason
    spec = device_spec(device)
    if eight_bits == torch.float8_e4m3fn and not availability.interpreted() and spec.capability < (8, 9):
        return f"float8 needs compute capability 8.9, {spec.name} has {'.'.join(map(str, spec.capability))}"
    wanted = [("exact_prepare", dtype)] + [("exact_product", eight_bits or dtype)] * fuses(dtype)
    for kernel, operands in wanted:
        if any(config_for(kernel, operands, 16, P, aligned, spec) is None for aligned in (True, False)):
            return f"no tile of {kernel} for P={P} fits the {spec.shared_bytes} bytes of shared memory of {spec.name}"
    return None
