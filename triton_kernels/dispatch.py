"""What runs a problem: the configuration of a kernel on a device, and the form with the least predicted time."""

from __future__ import annotations

import functools

import torch

from . import availability, compile_check, tuning
from .configs import (
    INTERPRETER_TABLE,
    Config,
    Entry,
    ForwardConfig,
    OneLaunchConfig,
    TwoLaunchConfig,
    architecture,
    best_entry,
    device_slug,
    padded,
    shipped,
)
from .cost_model import (
    Flags,
    estimate_forward,
    estimate_one_launch,
    estimate_two_launch,
)
from .devices import DeviceSpec, device_spec
from .library import estimate_torch_forward


@functools.cache
def _tables(device: DeviceSpec) -> tuple[tuple[Entry, ...], ...]:
    """The user's own table first, then the one measured for this device, then the architecture's."""
    slug = device_slug(device.name)
    arch = architecture(device.capability)
    return tuning.read_table(slug), shipped(slug), compile_check.entries_within(arch, device.shared_bytes)


def config_for(kernel: str, dtype: torch.dtype, R: int, P: int, aligned: bool, device: DeviceSpec) -> Config | None:
    """The configuration of `kernel` for these ranks, or None where its tiles cannot hold them."""
    tables = (INTERPRETER_TABLE,) if availability.interpreted() else _tables(device)
    entry = best_entry(tables, kernel, 8 * dtype.itemsize, padded(R), padded(P), aligned)
    return None if entry is None else entry.config


@functools.cache
def form_configs(
    dtype: torch.dtype, R: int, P: int, aligned: bool, device: DeviceSpec
) -> tuple[OneLaunchConfig | None, TwoLaunchConfig | None]:
    one = config_for("one_launch", dtype, R, P, aligned, device) if R <= availability.MAX_ONE_LAUNCH_RANK else None
    two = config_for("two_launch", dtype, R, P, aligned, device)
    assert one is None or isinstance(one, OneLaunchConfig)
    assert two is None or isinstance(two, TwoLaunchConfig)
    return one, two


def choose_config(
    M: int, N: int, K: int, R: int, P: int, dtype: torch.dtype, flags: Flags, aligned: bool, device: DeviceSpec
) -> OneLaunchConfig | TwoLaunchConfig:
    """The configuration, and by its type the form, with the least predicted time. Each form has one configuration a
    (R, P, dtype, aligned), so that sizes choose between two compiled kernels and never ask for a third."""
    one, two = form_configs(dtype, R, P, aligned, device)
    if one is None or two is None:
        chosen = one or two
        if chosen is None:
            raise ValueError(f"no configuration for {device.name} holds R={R}, P={P} in {dtype}")
        return chosen
    size = dtype.itemsize
    first = estimate_one_launch(M, N, K, R, P, one, flags, device, size)
    second = estimate_two_launch(M, N, K, R, P, two, flags, device, size)
    return one if first.predicted_us <= second.predicted_us else two


def why_not(
    *,
    dtype: torch.dtype,
    device: torch.device,
    R: int,
    P: int,
    need_dx: bool = True,
    lora_dtype: torch.dtype | None = None,
) -> str | None:
    """The reason why `backward` cannot run such a problem, or None. R = 0 without factors, P = 0 without adapter;
    `lora_dtype` where it is not `dtype`."""
    reason = availability.why_not(dtype=dtype, device=device, R=R, P=P, need_dx=need_dx, lora_dtype=lora_dtype)
    if reason is None:
        spec = device_spec(device)
        rank = R if need_dx else 0
        if any(form_configs(dtype, rank, P, aligned, spec) == (None, None) for aligned in (True, False)):
            reason = f"no tile for R={R}, P={P} fits the {spec.shared_bytes} bytes of shared memory of {spec.name}"
    return reason


@functools.lru_cache(maxsize=4096)
def forward_wins(
    M: int, N: int, K: int, P: int, dtype: torch.dtype, device: torch.device | str | None, dropout: bool = False
) -> bool:
    """Whether the fused forward is predicted to beat cuBLAS's three products. It has to earn what a Triton loop loses
    to cuBLAS on the frozen product, so it wins where that one is bound by memory: few rows, or a small layer."""
    spec = device_spec(device)
    config = config_for("forward", dtype, 16, P, K % 8 == 0, spec) if dtype in availability.DTYPES else None
    if not isinstance(config, ForwardConfig):
        return False
    fused = estimate_forward(M, N, K, P, config, spec, dtype.itemsize)
    return fused.predicted_us < estimate_torch_forward(M, N, K, P, spec, dropout, dtype.itemsize).predicted_us
