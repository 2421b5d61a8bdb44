"""One frozen linear layer's backward on paper: what the cost model predicts for each way to compute it.

Nothing is measured. The counts are those of the kernels (`triton_kernels.cost_*`), the rates those of
`triton_kernels.rates`, or of this GPU where `bench linear` has measured them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import loge_kernels as loge
from loge_kernels.machine import DTYPES
from loge_kernels.triton_kernels.devices import device_spec
from loge_kernels.triton_kernels.explanation import Explanation
from loge_kernels.triton_kernels.phases import Estimate, Phase
from loge_kernels.triton_kernels.rates import KNOWN

from ..measure.output import print_wide, write
from .rows import Case, Row

# The forms that a backend may take with factors, of which it takes the cheapest; the precisions of an exact backward.
_FORMS = {"reference": ("torch",), "triton": ("one_launch", "two_launch"), "cuda": ("cuda sm90", "cuda sm80")}
_PRECISIONS = {"float8": ("float8", "float8 fast"), "int8": ("int8",)}

_SHOWN = 6  # of the exact backwards, cheapest first; of those with factors there are no more


def gpu_named(name: str) -> str:
    """The full name of a GPU that the model knows, by a part of it. Raises ValueError with the names that there are."""
    found = [known for known in KNOWN if name.lower() in known.lower()]
    if not found:
        raise ValueError(f"on_paper={name!r} is not a GPU that the cost model knows; choose from {', '.join(KNOWN)}")
    return found[0]


def explained(case: Case, R: int | None, device: str) -> Explanation:
    return loge.explain(case.M, case.shape.N, case.shape.K, R, case.P, DTYPES[case.dtype], device)


def add_predictions(rows: Sequence[Row], device: torch.device) -> None:
    """Fills in `predicted_seconds` of the rows of one case that the model knows: backwards on a GPU."""
    name = torch.cuda.get_device_name(device)
    for row in rows:
        words = row.candidate.split()
        forms: tuple[str, ...] = ()
        precisions: tuple[str, ...] = ("",)
        if words[0] == "loge":
            forms = _FORMS.get(words[1], ())
        elif words[0] == "exact":
            forms = ("fused",) if "triton" in words else ("torch",)  # which a named backend takes
            precisions = next((_PRECISIONS[word] for word in words if word in _PRECISIONS), ("16-bit",))
        found = explained(row.case, row.rank, name).candidates
        fitting = [c.predicted_us for c in found if c.form in forms and c.precision in precisions]
        row.predicted_seconds = min(fitting) * 1e-6 if fitting else None


def run(cases: Sequence[Case], gpu: str, console: Console, json: Path | None = None) -> dict[str, Any]:
    """Predict every case, each rank's candidates and the exact backwards, print a table for each case, write the file
    asked for; the JSON-able report is returned."""
    name = gpu_named(gpu)
    spec = device_spec(name)
    report: dict[str, Any] = {
        "benchmark": "linear on paper",
        "device": name,
        "rates": loads(dumps(asdict(spec))),
        "rows": [],
    }
    for case in cases:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("R", justify="right")
        table.add_column("candidate", no_wrap=True)
        for heading in ("us", "x PyTorch", "% roof"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("by phase: us, and what holds it", no_wrap=True)
        for R in (None, *case.ranks):
            found = explained(case, R, name)
            plain = next(c for c in found.candidates if c.name in ("torch", "torch 16-bit"))
            for candidate in found.candidates[:_SHOWN]:
                row = _row(case, R, candidate, plain, found, spec)
                report["rows"].append(row)
                phases = ", ".join(f"{phase} {text}" for phase, text in row["phases"].items())
                numbers = [f"{row['us']:.1f}", f"{row['speedup']:.2f}", f"{100 * row['roofline']:.0f}"]
                table.add_row("exact" if R is None else str(R), candidate.name, *numbers, phases)
        console.print(f"\n[bold]{name}, predicted: {case.title}, backward[/bold]", highlight=False, soft_wrap=True)
        print_wide(console, table)
    write(report, json)
    return report


def _row(
    case: Case, R: int | None, candidate: Estimate, plain: Estimate, found: Explanation, spec: Any
) -> dict[str, Any]:
    """roofline: what dY, x, dX, factors and adapter, each moved once, or the flops that are asked for, take at the copy
    rate and at the matrix units' rate, whichever is longer, as a share of the prediction."""
    M, N, K, P = case.M, case.shape.N, case.shape.K, case.P
    itemsize = DTYPES[case.dtype].itemsize
    factors = (R or 0) * (N + K) if R else N * K
    moved = itemsize * (M * (N + 2 * K) + factors + 2 * P * (N + K))
    tflops = spec.tflops_16 if itemsize == 2 else spec.tflops_32
    floor_us = max(moved / (spec.hbm_gbs * 1e3), found.useful_flops / (tflops * 1e6))
    return {
        "shape": case.shape.name,
        "M": M,
        "N": N,
        "K": K,
        "P": P,
        "R": R,
        "dtype": case.dtype,
        "candidate": candidate.name,
        "us": round(candidate.predicted_us, 2),
        "speedup": round(plain.predicted_us / candidate.predicted_us, 3),
        "roofline": round(floor_us / candidate.predicted_us, 3),
        "hbm_bytes": candidate.hbm_bytes,
        "l2_bytes": candidate.l2_bytes,
        "flops": candidate.flops,
        "kernels": candidate.kernels,
        "phases": _phases(candidate),
    }


def _phases(candidate: Estimate) -> dict[str, str]:
    """Microseconds of each phase, those of the same name together, and what holds the longest of them."""
    named: dict[str, list[Phase]] = {}
    for phase in candidate.phases:
        named.setdefault(phase.name, []).append(phase)
    return {
        name: f"{sum(phase.us for phase in same):.1f} {max(same, key=lambda phase: phase.us).limit}"
        for name, same in named.items()
    }
