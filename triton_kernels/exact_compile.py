"""The exact kernels as `compile_check` compiles them: what a configuration can be launched as, in the form that needs
most registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .configs import PrepareConfig, ProductConfig
from .cost_model import Flags
from .devices import DeviceSpec
from .exact_plan import Scales, prepare_constants, product_constants, quantize_constants

_FLOAT8, _INT8 = torch.float8_e4m3fn, torch.int8
_POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", _FLOAT8: "fp8e4nv", _INT8: "i8"}
# By the name of the variant: how dY is scaled, in which 8 bits, with dropout, with fast accumulation.
_VARIANTS: dict[str, tuple[Scales, torch.dtype | None, bool, bool]] = {
    "plain": ("none", None, False, True),
    "dropout": ("none", None, True, True),
    "row float8": ("row", _FLOAT8, False, True),
    "row float8 dropout, full accumulation": ("row", _FLOAT8, True, False),
    "row int8": ("row", _INT8, False, True),
    "row int8 dropout": ("row", _INT8, True, True),
    "block float8": ("block", _FLOAT8, True, True),
}


def variants(kernel: str, bits: int, device: DeviceSpec) -> Iterator[str]:
    """The variants of a configuration's kernel for operands of `bits` bits on a device."""
    for name, (scales, eight_bits, dropout, _) in _VARIANTS.items():
        if eight_bits == _FLOAT8 and device.capability < (8, 9):
            continue
        serves = {
            "exact_product": (bits == 8) == (scales != "none"),
            "exact_prepare": name != "dropout" and not (scales == "row" and dropout),
            "exact_quantize": scales == "row" and not dropout,
        }
        if serves[kernel]:
            yield name


def source(
    kernel: str, variant: str, config: object, bits: int, P: int, aligned: bool, device: DeviceSpec
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the element type behind each pointer, and the constexpr arguments of a variant."""
    from .exact_prepare import exact_prepare, exact_quantize
    from .exact_product import exact_product

    scales, eight_bits, dropout, fast_accumulation = _VARIANTS[variant]
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    name = _POINTERS[dtype]
    q = name if eight_bits is None else _POINTERS[eight_bits]
    types = dict.fromkeys(("dy_ptr", "xa_ptr", "x_ptr", "dx_ptr"), name) | {"amax_ptr": "i32", "seed_ptr": "i64"}
    types |= dict.fromkeys(("t_ptr", "dA_ptr", "dB_ptr", "db_ptr", "lora_A_ptr", "lora_B_ptr"), "fp32")
    types |= dict.fromkeys(("scale_ptr", "dy_scale_ptr", "weight_scale_ptr"), "fp32") | {"q_ptr": q}
    flags = Flags(need_dbias=True, dropout=dropout)
    if kernel == "exact_product":
        assert isinstance(config, ProductConfig)
        types |= {"dy_ptr": q, "weight_ptr": q}
        constants = product_constants(
            P, eight_bits or dtype, dtype, flags, scales, fast_accumulation, aligned, config, device
        )
        return exact_product, types, constants
    if kernel == "exact_quantize":
        assert eight_bits is not None
        return exact_quantize, types, {**quantize_constants(eight_bits, aligned), "num_stages": 1}
    assert isinstance(config, PrepareConfig)
    return exact_prepare, types, prepare_constants(P, dtype, True, flags, eight_bits, scales, aligned, config, device)
