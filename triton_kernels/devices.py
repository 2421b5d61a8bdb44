"""What the cost model knows of a device. A device that is not listed is described by its own properties."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Attainable rates, not peak ones: bandwidths in GB/s, matrix rates in TFLOP/s, sizes in bytes."""

    name: str
    capability: tuple[int, int]
    sms: int
    hbm_gbs: float
    l2_gbs: float
    l2_bytes: int
    shared_bytes: int  # per block, opt-in
    tflops_16: float
    tflops_32: float
    launch_us: float = 4.0  # from one kernel's end to the next one's start, as PyTorch issues them


# H200: 790 TFLOP/s and 4.3 TB/s measured; the others scaled from data sheets by the same fractions (0.80, 0.90).
KNOWN: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        DeviceSpec("NVIDIA H200", (9, 0), 132, 4300.0, 5500.0, 50 << 20, 232448, 790.0, 50.0),
        DeviceSpec("NVIDIA H100 80GB HBM3", (9, 0), 132, 3000.0, 5500.0, 50 << 20, 232448, 790.0, 50.0),
        DeviceSpec("NVIDIA H100 PCIe", (9, 0), 114, 1800.0, 4400.0, 50 << 20, 232448, 600.0, 40.0),
        DeviceSpec("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1800.0, 4000.0, 40 << 20, 166912, 250.0, 16.0),
        DeviceSpec("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1400.0, 4000.0, 40 << 20, 166912, 250.0, 16.0),
    )
}
# What explain() describes where there is no GPU, and what a device without readable properties is taken for.
DEFAULT = KNOWN["NVIDIA H200"]


@functools.cache
def device_spec(device: torch.device | str | None = None) -> DeviceSpec:
    """The spec of a torch device, or of a name in KNOWN; of an H200 where neither is to be had. Never raises."""
    if isinstance(device, str) and device in KNOWN:
        return KNOWN[device]
    try:
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, ValueError):  # no CUDA in this torch, no driver, no such device
        return DEFAULT
    known = KNOWN.get(properties.name)
    return known if known is not None else from_properties(properties)


def from_properties(properties: object) -> DeviceSpec:
    """A spec from whatever `torch.cuda.get_device_properties` offers; what is missing comes from the default's rates
    per SM, which errs for old cards but keeps the order of the candidates."""

    def read(name: str, default: float) -> float:
        value = getattr(properties, name, None)
        return float(value) if isinstance(value, (int, float)) and value > 0 else default

    capability = (int(read("major", 8)), int(getattr(properties, "minor", 0) or 0))
    per_sm = KNOWN["NVIDIA A100-SXM4-80GB"] if capability[0] < 9 else DEFAULT
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
        tflops_32=per_sm.tflops_32 * share,
    )
