"""Whether the exact kernels can run a problem, and in which form it runs fastest; importable without Triton."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from . import availability
from .cost_exact import FAST, estimate_exact, precisions
from .devices import DeviceSpec, device_spec
from .dispatch import config_for
from .exact_plan import product_takes_dA
from .phases import Flags

# "torch": PyTorch's composition; "prepared": `exact_prepare`, then PyTorch's products; "fused": `exact_product` too.
ExactForm = Literal["torch", "prepared", "fused"]


def takes_dA(eight_bits: torch.dtype | None, dropout: float, device: torch.device) -> bool:
    """Whether dA is to come from `product` as well, or from PyTorch (`exact_plan.product_takes_dA`)."""
    return product_takes_dA(eight_bits, dropout > 0.0, device_spec(device))


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


@functools.lru_cache(maxsize=4096)
def choose_exact(
    M: int,
    N: int,
    K: int,
    P: int,
    dtype: torch.dtype,
    eight_bits: torch.dtype | str | None,
    device: torch.device | str | DeviceSpec | None,
    flags: Flags,
    fast_accumulation: bool = False,
) -> ExactForm:
    """How an exact backward takes least predicted time.

    dY [M, N] in `dtype`, dX [M, K], an adapter of rank P. `eight_bits`: what the product runs in, float8_e4m3fn (with
    `fast_accumulation` or without) or int8, or by name "float8" or "int8"; None: `dtype`.
    """
    spec = device if isinstance(device, DeviceSpec) else device_spec(device)
    name = {torch.float8_e4m3fn: "float8", torch.int8: "int8"}.get(eight_bits, eight_bits)  # type: ignore[arg-type]
    precision = FAST if name == "float8" and fast_accumulation else name
    if dtype not in availability.DTYPES or P > availability.MAX_ADAPTER:
        return "torch"
    if precision is not None and (precision not in precisions(N, K, spec) or dtype == torch.float32):
        return "torch"
    forms: tuple[ExactForm, ...] = ("torch", "prepared", "fused")
    estimates = {
        form: estimate_exact(form, precision, M, N, K, P, flags, spec, dtype.itemsize, dtype == torch.bfloat16)
        for form in (forms if flags.need_dx and fuses(dtype) else forms[:2])
    }
    return min(estimates, key=lambda form: estimates[form].predicted_us)
