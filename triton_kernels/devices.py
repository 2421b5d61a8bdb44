"""Which row of the cost model's table a device has. One that is not listed is described by its own properties."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from . import tuning
from .configs import device_slug
from .rates import DEFAULT, KNOWN, DeviceSpec

__all__ = ["DEFAULT", "KNOWN", "DeviceSpec", "device_spec", "from_properties", "measured"]


@functools.cache
def device_spec(device: torch.device | str | None = None) -> DeviceSpec:
    """The spec of a torch device, or of a name in KNOWN; of an H200 where neither is to be had. Rates that `bench
    linear --tune` has measured there come first. Never raises."""
    if isinstance(device, str) and device in KNOWN:
        return measured(KNOWN[device])
    try:
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, ValueError):  # no CUDA in this torch, no driver, no such device
        return DEFAULT
    known = KNOWN.get(properties.name)
    return measured(known if known is not None else from_properties(properties))


def measured(spec: DeviceSpec) -> DeviceSpec:
    """`spec` with the rates of the user's table for that device; as it is where there are none."""
    rates = tuning.read_rates(device_slug(spec.name))
    if not rates:
        return spec
    # Measured in a short run; what lasts keeps its share of that.
    lasting = spec.tflops_16_sustained / spec.tflops_16 * rates.get("tflops_16", spec.tflops_16)
    return replace(spec, **rates, tflops_16_sustained=lasting)


def from_properties(properties: object) -> DeviceSpec:
    """A spec from whatever `torch.cuda.get_device_properties` offers; what is missing comes from the default's rates
    per SM, which errs for old cards but keeps the order of the candidates."""

    def read(name: str, default: float) -> float:
        value = getattr(properties, name, None)
        return float(value) if isinstance(value, (int, float)) and value > 0 else default

    capability = (int(read("major", 8)), int(getattr(properties, "minor", 0) or 0))
    per_sm = KNOWN["NVIDIA A100-SXM4-80GB"] if capability[0] < 9 else DEFAULT
    float8 = DEFAULT if capability >= (8, 9) else per_sm
    sms = int(read("multi_processor_count", per_sm.sms))
    share = sms / per_sm.sms
    # kHz and bits: two transfers a clock, 0.9 of the peak attainable.
    bus = read("memory_clock_rate", 0.0) * read("memory_bus_width", 0.0) * 2 / 8 * 1e-6 * 0.9
    return DeviceSpec(
        name=str(getattr(properties, "name", "unknown")),
        capability=capability,
        sms=sms,
        hbm_gbs=bus if bus > 50.0 else per_sm.hbm_gbs * share,
        l2_gbs=per_sm.l2_gbs * share,
        l2_bytes=int(read("L2_cache_size", per_sm.l2_bytes * share)),
        shared_bytes=int(read("shared_memory_per_block_optin", 101376)),
        tflops_16=per_sm.tflops_16 * share,
        tflops_16_sustained=per_sm.tflops_16_sustained * share,
        tflops_32=per_sm.tflops_32 * share,
        clock_ghz=per_sm.clock_ghz,
        skinny=per_sm.skinny,
        int8=per_sm.int8,
        float8=float8.float8,
        float8_fast=float8.float8_fast,
    )
