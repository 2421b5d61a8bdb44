"""The rates of the cost model, measured on a GPU: what `bench linear` keeps in the user's cache, beside the tuned
configurations.

copy rate, matrix rate     a large copy, a large product
skinny, narrow             products with one side of 16 columns, and of each width class of `rates.DeviceSpec.narrow`
gap                        from a small kernel's end to the next one's start, in a queue that is never empty
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loge_kernels.triton_kernels import tuning
from loge_kernels.triton_kernels.configs import device_slug
from loge_kernels.triton_kernels.devices import device_spec
from loge_kernels.triton_kernels.rates import DEFAULT, KERNEL_US

from ..measure.timing import Clock, TimingOptions, clock_for, interleave

_ADAPTER = 16
_KERNELS = 128  # small ones behind each other
_HELD_CYCLES = 4_000_000  # about 2 ms, in which the host issues them all


def measure_rates(
    device: torch.device,
    M: int = 8192,
    N: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    clock: Clock | None = None,
    hold: Callable[[], Any] | None = None,
    budget: float = 10.0,
) -> dict[str, Any]:
    """Rates of `device` by their names in `rates.MEASURED`: GB/s, TFLOP/s, shares and microseconds.

    M, N: rows and columns of the wide operand.   hold: keeps the queue busy while the host issues small kernels; None:
    a wait on the GPU.   budget: seconds of measured rounds.
    """
    wide, square = torch.randn(M, N, device=device).to(dtype), torch.randn(N, N, device=device).to(dtype)
    beside, dot = torch.empty_like(wide), torch.zeros(1, device=device)
    sides = {width: square[:, :width].contiguous() for width, _ in DEFAULT.narrow[:-1] if width < N}
    thin = wide[:, :_ADAPTER].t()  # [16, M]
    hold = hold or partial(torch.cuda._sleep, _HELD_CYCLES)
    calls: dict[str, Callable[[], Any]] = {
        "copy": partial(beside.copy_, wide),
        "dense": partial(torch.matmul, wide, square),
        "skinny": partial(torch.matmul, thin.contiguous(), wide),
        **{f"narrow {width}": partial(torch.matmul, wide, side) for width, side in sides.items()},
        "one": partial(_in_turn, hold, dot, 1),
        "many": partial(_in_turn, hold, dot, 1 + _KERNELS),
    }
    timings = interleave(calls, clock or clock_for(device), TimingOptions(budget_seconds=budget))
    for name, timing in timings.items():
        if timing.failure:
            raise RuntimeError(f"the rate of {name!r} cannot be measured: {timing.failure}")
    seconds = {name: timing.median for name, timing in timings.items()}
    hbm = 2 * wide.nbytes / seconds["copy"]
    flops = 2 * M * N * N / seconds["dense"]
    shares = [(width, 2 * M * N * width / seconds[f"narrow {width}"] / flops) for width in sides]
    between = 1e6 * (seconds["many"] - seconds["one"]) / _KERNELS - KERNEL_US
    return {
        "hbm_gbs": round(hbm / 1e9, 1),
        "tflops_16": round(flops / 1e12, 2),
        "skinny": round(wide.nbytes / seconds["skinny"] / hbm, 3),
        "narrow": [*([width, round(share, 3)] for width, share in shares), [N, 1.0]],
        "gap_us": round(max(0.05, between), 3),
    }


def keep(device: torch.device, environment: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The rates of `device`, measured now and written where the cost model reads them, and that file; None where there
    is no cache, or none that can be written."""
    slug, found = device_slug(device_spec(device).name), measure_rates(device)
    try:
        return found, str(tuning.write_rates(slug, found, source_of(environment)))
    except (OSError, ValueError):
        return found, None


def source_of(environment: dict[str, Any]) -> str:
    """What a table says of where its numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"bench linear, {environment['date']}: {versions}"


def _in_turn(hold: Callable[[], Any], dot: Tensor, kernels: int) -> None:
    hold()
    for _ in range(kernels):
        dot.add_(1.0)
