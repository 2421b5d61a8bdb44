"""Everything that only a GPU can show, in one offline run: the correctness ladder's last step, then the benchmarks.

`make gpu RESULTS=dir` calls it with whatever torch and Triton the Python has. Each step is a process of its own with a
time limit, so that a kernel that hangs or corrupts its context costs that step alone; what a step prints goes to the
log and to the screen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from .environment import describe

_CLI = (sys.executable, "-m", "loge_kernels")
_SHAPES = ("LLaMA-3-8B", "LLaMA-2-7B")


@dataclass(frozen=True, slots=True)
class Step:
    """A command with its limit in seconds; `quick` ones are run with QUICK=1 too."""

    name: str
    command: tuple[str, ...]
    limit: int
    quick: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status` is "passed", "failed", "timed out" or, where the machine lacks a tool, "not run"."""

    name: str
    status: str
    seconds: float
    note: str = ""


def steps(results: Path, device: str, quick: bool) -> list[Step]:
    """The steps in order: correctness first, so that a wrong kernel is known before its time is read."""
    shapes = _SHAPES[:1] if quick else _SHAPES
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9")
    small_check = (*_CLI, "check", "--device", device, "--backend", "triton", "--dtype", "float16", "--sample", "12")
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    bench = (*_CLI, "bench", "linear", *shapes, "--device", device, "--direction", "backward", "--dtype", "bfloat16")
    sweep = ("--rows", "8192" if quick else "4096,8192,16384", "--rank", "256" if quick else "64,128,256,512")
    files = ("--json", str(results / "linear.json"), "--csv", str(results / "linear.csv"))
    picture = ("--png", str(results / "linear.png"))
    return [
        Step("check", (*_CLI, "check", "--device", device, "--json", str(results / "check.json")), 180),
        Step("tests", (sys.executable, "-m", "pytest", "-q", "-m", "gpu", tests), 120),
        Step("memcheck", (*sanitizer, "--tool", "memcheck", *small_check), 120, quick=False),
        Step("racecheck", (*sanitizer, "--tool", "racecheck", *small_check), 120, quick=False),
        Step("linear", (*bench, *sweep, "--budget", "1" if quick else "3", *files, *picture), 60 if quick else 240),
        Step(
            "step", (*_CLI, "bench", "step", "--device", device, "--json", str(results / "step.json")), 90, quick=False
        ),
    ]


def run(results: Path, device: str = "cuda", quick: bool = False, chosen: Sequence[Step] | None = None) -> bool:
    """Run every step, write `log` and `summary.json` under `results`, and say whether all passed."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA device here")
    results.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with (results / "log").open("w") as log:
        for step in steps(results, device, quick) if chosen is None else chosen:
            if quick and not step.quick:
                continue
            outcome = _run(step, log)
            outcomes.append(outcome)
            print(f"== {step.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.note}", flush=True)
    passed = all(outcome.status in ("passed", "not run") for outcome in outcomes)
    summary = {
        "environment": describe(torch.device(device)),
        "quick": quick,
        "passed": passed,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    (results / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return passed


def _run(step: Step, log: IO[str]) -> Outcome:
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, "not run", 0.0, f"{step.command[0]} is not installed")
    started = time.perf_counter()
    with subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=step.limit)
            status = "passed" if process.returncode == 0 else "failed"
            note = "" if process.returncode == 0 else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            status, note = "timed out", f"limit {step.limit} s"
    print(output, flush=True)
    print(f"== {step.name}\n{output}", file=log, flush=True)
    return Outcome(step.name, status, time.perf_counter() - started, note)


def main() -> int:
    """`python -m loge_kernels.bench.gpu --results DIR [--quick]`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, required=True, help="folder for JSON, CSV, PNG and the log")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="within 3 minutes instead of 10")
    options = parser.parse_args()
    try:
        return 0 if run(options.results, options.device, options.quick) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
