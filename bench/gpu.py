"""Everything that only a GPU can show, in one offline run: the correctness ladder's last step, then the benchmarks.

`make gpu RESULTS=dir` calls it with whatever torch and Triton the Python has. Each step is a process of its own with a
time limit, so that a kernel that hangs or corrupts its context costs that step alone; what a step prints goes to the
log and to the screen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from .measure.environment import describe

_CLI = (sys.executable, "-m", "loge_kernels")
_SHAPES = ("LLaMA-3-8B", "LLaMA-2-7B")


@dataclass(frozen=True, slots=True)
class Step:
    """Commands that run side by side, with one limit in seconds; the step passes when all of them do."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status` is "passed", "failed", "timed out" or, where the machine lacks a tool, "not run"."""

    name: str
    status: str
    seconds: float
    note: str = ""


def steps(results: Path, device: str, quick: bool) -> list[Step]:
    """The steps in order: correctness first, so that a wrong kernel is known before its time is read. The limits add up
    to 3 minutes (quick) or 10."""
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    check = (*_CLI, "check", "--device", device)
    parts = max(1, min(12, (os.cpu_count() or 2) - 1))
    compiling = tuple((*check, "--backend", "triton", "--part", f"{part}/{parts}") for part in range(1, parts + 1))
    bench = (*_CLI, "bench", "linear", *_SHAPES[: 1 if quick else None], "--device", device, "--dtype", "bfloat16")
    sweep = ("--rows", "8192" if quick else "4096,8192,16384", "--rank", "256" if quick else "64,128,256,512")
    options = ("--direction", "backward", "--budget", "0.3" if quick else "1.5")
    files = tuple(part for kind in ("json", "csv", "png") for part in (f"--{kind}", str(results / f"linear.{kind}")))
    correctness = [
        # Each of these compiles its share of the kernels into Triton's cache; the whole grid then runs from there.
        Step("compile", compiling, 70 if quick else 90),
        Step("check", ((*check, "--json", str(results / "check.json")),), 40 if quick else 60),
        Step("tests", ((sys.executable, "-m", "pytest", "-q", "-m", "gpu", tests),), 30 if quick else 60),
    ]
    linear = Step("linear", ((*bench, *sweep, *options, *files),), 40 if quick else 190)
    if quick:
        return [*correctness, linear]
    sanitized = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    sample = ("--backend", "triton", "--dtype", "float16", "--sample", "12")
    watched: list[tuple[str, ...]] = [(*check, *sample)]
    if find_spec("loge_kernels._C") is not None:
        few = (
            "-q",
            "-m",
            "gpu",
            "-k",
            "test_cuda_kernels and not bfloat16",
            str(Path(tests, "kernels", "test_gpu.py")),
        )
        watched.append((sys.executable, "-m", "pytest", *few))
    step = (*_CLI, "bench", "step", "--device", device, "--dtype", "bfloat16", "--budget", "30")
    return [
        *correctness,
        *(
            Step(tool, tuple((*sanitized, tool, *command) for command in watched), 60)
            for tool in ("memcheck", "racecheck")
        ),
        linear,
        Step("step", ((*step, "--json", str(results / "step.json")),), 80),
    ]


def run(results: Path, device: str = "cuda", quick: bool = False, chosen: Sequence[Step] | None = None) -> bool:
    """Run every step, write `log` and `summary.json` under `results`, and say whether all passed."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA device here")
    results.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with (results / "log").open("w") as log:
        for step in steps(results, device, quick) if chosen is None else chosen:
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
    program = step.commands[0][0]
    print(f"== {step.name}: {' '.join(step.commands[0])}", flush=True)
    if shutil.which(program) is None:
        return Outcome(step.name, "not run", 0.0, f"{program} is not installed")
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in step.commands]
        processes = [
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            for command, output in zip(step.commands, outputs, strict=True)
        ]
        late = False
        for process in processes:
            try:
                process.wait(max(0.0, started + step.limit - time.perf_counter()))
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
                process.wait()
        for output in outputs:
            output.seek(0)
            text = output.read()
            print(text, flush=True)
            print(f"== {step.name}\n{text}", file=log, flush=True)
    seconds = time.perf_counter() - started
    if late:
        return Outcome(step.name, "timed out", seconds, f"limit {step.limit} s")
    statuses = {process.returncode for process in processes} - {0}
    return Outcome(
        step.name, "failed" if statuses else "passed", seconds, f"exit status {statuses}" if statuses else ""
    )


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
