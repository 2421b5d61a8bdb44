"""The exact kernels as `compile_check` compiles them: what a configuration can be launched as, in the form that needs
most registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .configs import PrepareConfig, ProductConfig
from .cost_model import Flags
from .devices import DeviceSpec
from .exact_plan import (
    prepare_constants,
    product_constants,
    product_takes_dA,
    quantize_constants,
    quantize_rows_constants,
)

_FLOAT8, _INT8 = torch.float8_e4m3fn, torch.int8
_POINTERS = {_FLOAT8: "fp8e4nv", _INT8: "i8"}
# By the name of the variant: in which 8 bits, with scales of columns, with dropout, with fast accumulation.
_VARIANTS: dict[str, tuple[torch.dtype | None, bool, bool, bool]] = {
    "plain": (None, False, False, True),
    "dropout": (None, False, True, True),
    "float8": (_FLOAT8, False, False, True),
    "float8 base": (_FLOAT8, True, False, True),
    "float8 dropout, full accumulation": (_FLOAT8, False, True, False),
    "int8": (_INT8, False, False, True),
    "int8 base": (_INT8, True, False, True),
    "int8 dropout": (_INT8, False, True, True),
}


def variants(kernel: str, bits: int, device: DeviceSpec) -> Iterator[str]:
    """The variants of a configuration's kernel for operands of `bits` bits on a device."""
    for name, (eight_bits, column_scales, dropout, _) in _VARIANTS.items():
        if eight_bits == _FLOAT8 and device.capability < (8, 9):
            continue
        serves = {
            "exact_product": (bits == 8) == (eight_bits is not None),
            "exact_prepare": not dropout,
            "exact_quantize": eight_bits is not None and not dropout,
            "exact_quantize_rows": column_scales,
        }
        if serves[kernel]:
            yield name


def source(
    kernel: str, variant: str, config: object, bits: int, P: int, aligned: bool, device: DeviceSpec
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the element type behind each pointer, and the constexpr arguments of a variant."""
    from .exact_prepare import exact_prepare, exact_quantize, exact_quantize_rows
    from .exact_product import exact_product

    eight_bits, column_scales, dropout, fast_accumulation = _VARIANTS[variant]
    dtype, name = torch.bfloat16, "bf16"
    q = name if eight_bits is None else _POINTERS[eight_bits]
    types = dict.fromkeys(("dy_ptr", "xa_ptr", "x_ptr", "dx_ptr"), name) | {"amax_ptr": "i32", "seed_ptr": "i64"}
    types |= dict.fromkeys(("t_ptr", "dA_ptr", "dB_ptr", "db_ptr", "lora_A_ptr", "lora_B_ptr"), "fp32")
    types |= dict.fromkeys(("scale_ptr", "dy_scale_ptr", "weight_scale_ptr", "column_scale_ptr"), "fp32") | {"q_ptr": q}
    flags = Flags(need_dbias=True, dropout=dropout)
    if kernel == "exact_product":
        assert isinstance(config, ProductConfig)
        types |= {"dy_ptr": q, "weight_ptr": q}
        # The scales of a base's rows are multiplied into dY.
        scaled = eight_bits is not None and not column_scales
        rotation = rotation_of(eight_bits, column_scales)
        flags = replace(flags, need_dA=product_takes_dA(eight_bits, dropout, device))
        constants = product_constants(
            P, eight_bits or dtype, dtype, flags, scaled, rotation, fast_accumulation, aligned, config, device
        )
        return exact_product, types, constants
    if kernel == "exact_quantize":
        assert eight_bits is not None
        return exact_quantize, types, {**quantize_constants(eight_bits, column_scales, aligned), "num_stages": 1}
    if kernel == "exact_quantize_rows":
        assert eight_bits is not None
        constants = quantize_rows_constants(eight_bits, rotation_of(eight_bits, column_scales), dtype, aligned)
        return exact_quantize_rows, types, {**constants, "num_stages": 1}
    assert isinstance(config, PrepareConfig)
    constants = prepare_constants(P, dtype, True, flags, eight_bits, column_scales, aligned, config, device)
    return exact_prepare, types, constants


def rotation_of(eight_bits: torch.dtype | None, base: bool) -> int:
    """The most columns that are rotated together: of a base in int8."""
    return 64 if base and eight_bits == _INT8 else 1
