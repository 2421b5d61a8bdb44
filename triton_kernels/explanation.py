"""The candidates for a backward problem, side by side: what each moves and multiplies, what holds it, and its time.

Predictions alone, for a GPU that may not be there; which backends are installed or verified is not asked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import availability, cost_cuda
from .cost_exact import FORMS, estimate_exact, precisions
from .cost_model import estimate_one_launch, estimate_two_launch, useful_flops
from .devices import DEFAULT, DeviceSpec, device_spec
from .dispatch import form_configs
from .exact_choice import fuses
from .library import estimate_torch
from .phases import BOUNDS, Estimate, Flags

_BACKENDS = {"torch": "reference", "one_launch": "triton", "two_launch": "triton"}


@dataclass(frozen=True, slots=True)
class Explanation:
    """The candidates for one backward problem, cheapest first, what was passed over and why, and the choice.

    exact: the cheapest exact backward of the same layer in each precision: another gradient, so never the choice.
    """

    device: str
    useful_flops: int
    candidates: tuple[Estimate, ...]
    passed_over: dict[str, str]
    choice: str
    exact: tuple[Estimate, ...] = ()

    def by_backend(self) -> dict[str, float]:
        """The least predicted microseconds of each backend that has a candidate: "reference", "triton", "cuda"."""
        times: dict[str, float] = {}
        for candidate in self.candidates:
            times.setdefault(_BACKENDS.get(candidate.form, "cuda"), candidate.predicted_us)
        return times

    def __str__(self) -> str:
        heads = [*("µs", "HBM", "L2", "tensor", "shared", "latency", "launches"), "HBM MB", "L2 MB", "GFLOP", "waves"]
        lines = [
            f"{self.device}: {self.useful_flops / 1e9:.2f} GFLOP without padding; predicted, not measured",
            f"  {'':<22}" + "".join(f"{head:>9}" for head in heads),
        ]
        lines += [self._line(c, "*" if c.name == self.choice else " ") for c in self.candidates]
        lines += [f"  {form:<22} {reason}" for form, reason in self.passed_over.items()]
        if self.exact:
            lines.append("  the exact gradient, another one than that of the factors:")
            lines += [self._line(c, " ") for c in self.exact]
        lines.append(
            f"host: about {self.candidates[0].host_us:.0f} µs a call of {self.choice}, if nothing hides it; "
            "HBM to latency: µs of each bound, summed over the phases"
        )
        return "\n".join(lines)

    @staticmethod
    def _line(c: Estimate, mark: str) -> str:
        times = [c.predicted_us, *(c.bound_us(bound) for bound in BOUNDS), c.launch_us]
        sizes = [c.hbm_bytes / 1e6, c.l2_bytes / 1e6, c.flops / 1e9]
        numbers = "".join(f"{value:9.1f}" for value in (*times, *sizes))
        return f"{mark} {c.name:<22}{numbers}" + (f"{c.waves:9.2f}" if c.waves else "")


@functools.lru_cache(maxsize=4096)
def explain(
    M: int,
    N: int,
    K: int,
    R: int | None,
    P: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    flags: Flags = Flags(),  # noqa: B008 (frozen)
) -> Explanation:
    """Every way to run this backward on `device` (a torch device, a name such as "NVIDIA H200", or None: the current
    GPU, or an H200 where there is none): predicted time, the bounds it rests on, bytes and flops.

    M tokens, N out, K in, factors of rank R and an adapter of rank P, in `dtype`. With factors the candidates are the
    PyTorch composition, Triton's one and two launches and the CUDA kernel; exact backwards are shown beside them. With
    R = 0 or None, a layer without factors, they are the candidates: by PyTorch, with dY prepared in one read, or with
    the product fused as well, each in `dtype` and in the 8 bits that the device multiplies. Predicts also for GPUs that
    are not there; never raises for lack of one.
    """
    spec = device_spec(device) if device is not None or torch.cuda.is_available() else DEFAULT
    exact = _exact(M, N, K, P, dtype, flags, spec)
    if not R:
        adapter = useful_flops(M, N, K, 0, P, flags) if P else 0
        useful = 2 * M * N * K * flags.need_dx + adapter
        return Explanation(spec.name, useful, exact, {}, exact[0].name)
    candidates = [estimate_torch(M, N, K, R, P, flags, spec, dtype.itemsize)]
    passed_over: dict[str, str] = {}
    if dtype not in availability.DTYPES:
        passed_over["one_launch"] = passed_over["two_launch"] = f"dtype {dtype} is not supported"
    elif P > availability.MAX_ADAPTER or R > availability.MAX_RANK:
        reason = f"R={R}, P={P} exceed {availability.MAX_RANK}, {availability.MAX_ADAPTER}"
        passed_over["one_launch"] = passed_over["two_launch"] = reason
    else:
        one, two = form_configs(dtype, R, P, N % 8 == 0 and K % 8 == 0, spec)
        if one is not None:
            candidates.append(estimate_one_launch(M, N, K, R, P, one, flags, spec, dtype.itemsize))
        else:
            passed_over["one_launch"] = f"no tile holds R={R}, P={P} in {dtype}"
        if two is not None:
            candidates.append(estimate_two_launch(M, N, K, R, P, two, flags, spec, dtype.itemsize))
        else:
            passed_over["two_launch"] = f"no tile holds R={R}, P={P} in {dtype}"
    refused = cost_cuda.why_not(N, K, R, P, dtype.itemsize, flags, spec.capability)
    if refused is None:
        candidates.append(cost_cuda.estimate_cuda(M, N, K, R, P, flags, spec, dtype.itemsize))
    else:
        passed_over[cost_cuda.kernel_for(spec.capability)] = refused
    candidates.sort(key=lambda candidate: candidate.predicted_us)
    useful = useful_flops(M, N, K, R, P, flags)
    cheapest = {estimate.precision: estimate for estimate in reversed(exact)}
    others = tuple(estimate for estimate in exact if cheapest[estimate.precision] is estimate)
    return Explanation(spec.name, useful, tuple(candidates), passed_over, candidates[0].name, others)


def _exact(
    M: int, N: int, K: int, P: int, dtype: torch.dtype, flags: Flags, device: DeviceSpec
) -> tuple[Estimate, ...]:
    """The candidates for an exact backward, cheapest first. Our kernels take what `exact_prepare` has tiles for."""
    ours = dtype in availability.DTYPES and P <= availability.MAX_ADAPTER
    eight = precisions(N, K, device) if dtype in (torch.float16, torch.bfloat16) and flags.need_dx else ()
    pairs = [
        (form, precision)
        for form in (FORMS if ours and flags.need_dx and fuses(dtype) else FORMS[:2] if ours else FORMS[:1])
        for precision in (None, *eight)
    ]
    estimates = [
        estimate_exact(form, precision, M, N, K, P, flags, device, dtype.itemsize, dtype == torch.bfloat16)
        for form, precision in pairs
    ]
    return tuple(sorted(estimates, key=lambda estimate: estimate.predicted_us))
