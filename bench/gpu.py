"""Everything that only a GPU can show, in one offline run that can be stopped and gone on with.

`make gpu RESULTS=dir` calls it with whatever torch and Triton the Python has. What an emulator cannot show comes first,
then the figures of `bench linear`, then the rest of the correctness ladder. Each step is a process of its own with a
time limit, so that a kernel that hangs or corrupts its context costs that step alone. When one ends, `log` has what it
printed and `summary.json` its outcome; a step that has passed with the same sources, versions and device is not run
again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from .measure.environment import describe
from .measure.output import replace_file

_CLI = (sys.executable, "-m", "loge_kernels")
_SHAPES = ("LLaMA-3-8B", "LLaMA-2-7B")
_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("loge_kernels", "triton_kernels", "bench", "csrc", "tests")
_FINE = ("passed", "not run")
_TAIL = 30  # lines that are shown of a step that failed
# Tests of tests/kernels/test_gpu.py for what the emulated kernels leave open, by the name of their step.
HARDWARE = {
    "narrow-adapter": "test_adapter_tile_of_16",
    "left-order": "test_order_of_the_boxes_of_left",
    "boxes-outside": "test_boxes_out_of_bounds",
    "idle-blocks": "test_cluster_of_eight_with_idle_blocks",
    "ragged-slabs": "test_rows_beside_whole_slabs",
    "two-streams": "test_two_streams_at_once",
    "graph-capture": "test_graph_capture_and_side_stream",
    "determinism": "test_deterministic_mode_repeats_its_bits",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One command with a limit in seconds."""

    name: str
    command: tuple[str, ...]
    limit: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status` is "passed", "failed", "timed out", "not run" where the machine lacks a tool, or "not reached" where the
    run was stopped before. `identity` is of the command and of what the function `identity` finds."""

    name: str
    status: str
    seconds: float
    note: str = ""
    identity: str = ""


def steps(results: Path, device: str, quick: bool) -> list[list[Step]]:
    """The steps in order; those of one list run side by side. The limits of the lists add up to 5 minutes (quick) or
    11."""
    tests = _ROOT / "tests"
    check = (*_CLI, "check", "--device", device)
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
    on_gpu = str(tests / "kernels" / "test_gpu.py")
    parts = max(1, min(12, (os.cpu_count() or 2) - 1))
    bench = (*_CLI, "bench", "linear", *_SHAPES[: 1 if quick else None], "--device", device, "--dtype", "bfloat16")
    sweep = ("--rows", "8192" if quick else "4096,8192,16384", "--rank", "256" if quick else "64,128,256,512")
    options = ("--direction", "backward", "--budget", "0.5" if quick else "1.5")
    files = tuple(part for kind in ("json", "csv", "png") for part in (f"--{kind}", str(results / f"linear.{kind}")))
    hardware = [Step(name, (*pytest, f"{on_gpu}::{test}"), 50) for name, test in HARDWARE.items()]
    first = [
        hardware,
        [Step("linear", (*bench, *sweep, *options, *files), 45 if quick else 180)],
        # Each of these compiles its share of the kernels into Triton's cache, in 45 to 150 s on the 16 cores beside an
        # H200; the whole grid then runs from there.
        [
            Step(f"compile-{part}", (*check, "--backend", "triton", "--part", f"{part}/{parts}"), 130)
            for part in range(1, parts + 1)
        ],
        [Step("check", (*check, "--json", str(results / "check.json")), 60)],
    ]
    if quick:
        return first
    host = Step("host", (*_CLI, "bench", "host", "--device", device, "--json", str(results / "host.json")), 20)
    step = (*_CLI, "bench", "step", "--device", device, "--dtype", "bfloat16", "--budget", "30")
    return [
        *first,
        [host],
        [Step("tests", (*pytest, str(tests)), 60)],
        *([*_sanitized(tool, check, pytest, on_gpu)] for tool in ("memcheck", "racecheck")),
        [Step("step", (*step, "--json", str(results / "step.json")), 65)],
    ]


def _sanitized(tool: str, check: tuple[str, ...], pytest: tuple[str, ...], on_gpu: str) -> list[Step]:
    """A few cases of Triton's kernels and of the CUDA kernels under compute-sanitizer."""
    watched = ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool)
    sample = (*check, "--backend", "triton", "--dtype", "float16", "--sample", "12")
    found = [Step(f"{tool}-triton", (*watched, *sample), 45)]
    if find_spec("loge_kernels._C") is not None:
        # racecheck knows little of the copies between the blocks of a cluster: one block alone.
        which = "test_cuda_kernels and not bfloat16" + (" and (sm80-1x1- or sm90-1x1-)" if tool == "racecheck" else "")
        found.append(Step(f"{tool}-cuda", (*watched, *pytest, "-k", which, on_gpu), 45))
    return found


def identity(device: str) -> dict[str, Any]:
    """What makes an outcome the same again: the sources, the commit, the versions and the device."""
    environment = describe(torch.device(device))
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".h", ".cpp", ".cu", ".cuh", ".so"):
                digest.update(str(path.relative_to(_ROOT)).encode())
                digest.update(path.read_bytes())
    kept = {name: environment[name] for name in ("versions", "device", "cuda", "commit")}
    return kept | {"sources": digest.hexdigest()}


def run(results: Path, device: str = "cuda", quick: bool = False, chosen: Sequence[list[Step]] | None = None) -> bool:
    """Run every step that has not passed yet, print a table of all, and say whether all passed."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA device here")
    results.mkdir(parents=True, exist_ok=True)
    plan = steps(results, device, quick) if chosen is None else chosen
    this = identity(device)
    summary = Summary(results, {"environment": describe(torch.device(device)), "quick": quick})
    try:
        for beside in plan:
            marks = {step.name: _mark(step, this) for step in beside}
            _run([step for step in beside if not summary.has_passed(step.name, marks[step.name])], summary, marks)
    finally:
        names = [step.name for beside in plan for step in beside]
        passed = summary.close(names)
    return passed


class Summary:
    """`summary.json`, written anew at every outcome, and `log`."""

    def __init__(self, results: Path, heading: dict[str, Any]) -> None:
        self.results = results
        self.running = results / "running"  # what the steps that run now have printed
        shutil.rmtree(self.running, ignore_errors=True)
        self.running.mkdir()
        self._heading = heading
        self._outcomes: dict[str, Outcome] = {}
        try:
            before = json.loads((results / "summary.json").read_text())["steps"]
            self._outcomes = {row["name"]: Outcome(**row) for row in before}
        except (OSError, ValueError, TypeError, KeyError):
            pass  # there is none, or it cannot be read: everything is run

    def has_passed(self, name: str, mark: str) -> bool:
        """Whether the step passed as it would be run now."""
        before = self._outcomes.get(name)
        return before is not None and (before.status, before.identity) == ("passed", mark)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, and what its step printed."""
        self._outcomes[outcome.name] = outcome
        self._write(all(each.status in _FINE for each in self._outcomes.values()))
        print(f"== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.note}".rstrip(), flush=True)
        printed = self.running / outcome.name
        if printed.exists():
            text = printed.read_text(errors="replace")
            with (self.results / "log").open("a") as log:
                print(f"== {outcome.name}\n{text}", file=log)
            printed.unlink()
            if outcome.status not in _FINE:
                print("\n".join(text.splitlines()[-_TAIL:]), flush=True)

    def close(self, names: Sequence[str]) -> bool:
        """Print a line for each of these steps; whether all passed."""
        found = [self._outcomes.get(name) or Outcome(name, "not reached", 0.0) for name in names]
        for outcome in found:
            print(
                f"{outcome.name:16} {outcome.status:11} {outcome.seconds:6.1f} s  {outcome.note}".rstrip(), flush=True
            )
        self._outcomes = {outcome.name: outcome for outcome in found}
        passed = all(outcome.status in _FINE for outcome in found)
        self._write(passed)
        if not any(self.running.iterdir()):
            self.running.rmdir()
        return passed

    def _write(self, passed: bool) -> None:
        rows = [asdict(outcome) for outcome in self._outcomes.values()]
        report = self._heading | {"passed": passed, "steps": rows}
        replace_file(self.results / "summary.json", json.dumps(report, indent=1) + "\n")


def _mark(step: Step, this: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([this, step.command], sort_keys=True).encode()).hexdigest()


def _run(beside: list[Step], summary: Summary, marks: dict[str, str]) -> None:
    """Run steps side by side; each outcome is kept as soon as it is known."""
    running: dict[str, tuple[Step, subprocess.Popen[bytes], IO[bytes]]] = {}
    started = time.perf_counter()
    try:
        for step in beside:
            print(f"== {step.name}: {' '.join(step.command)}", flush=True)
            if shutil.which(step.command[0]) is None:
                note = f"{step.command[0]} is not installed"
                summary.add(Outcome(step.name, "not run", 0.0, note, marks[step.name]))
                continue
            log: IO[bytes] = (summary.running / step.name).open("wb")
            # A process group of its own: what a step has started ends with it.
            process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)
            running[step.name] = (step, process, log)
        while running:
            time.sleep(0.05)
            seconds = time.perf_counter() - started
            for name, (step, process, printed) in list(running.items()):
                code = process.poll()
                if code is None and seconds < step.limit:
                    continue
                _end(process, printed)
                del running[name]
                status, note = _judge(code, step.limit, summary.running / name)
                summary.add(Outcome(name, status, seconds, note, marks[name]))
    finally:
        for _, process, printed in running.values():
            _end(process, printed)


def _judge(code: int | None, limit: int, printed: Path) -> tuple[str, str]:
    """Status and note of a step that ended with `code`; None: it did not. pytest ends with 0 where it skipped all."""
    if code is None:
        return "timed out", f"limit {limit} s"
    if code != 0:
        return "failed", f"exit status {code}"
    lines = [line for line in printed.read_text(errors="replace").splitlines() if line.strip()]
    if lines and re.match(r"\d+ skipped", lines[-1].strip("= ")):
        return "not run", next((line for line in lines if line.startswith("SKIPPED")), lines[-1])
    return "passed", ""


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.close()


def main() -> int:
    """`python -m loge_kernels.bench.gpu --results DIR [--quick]`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, required=True, help="folder for JSON, CSV, PNG and the log")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="within 5 minutes instead of 11")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that steps end with this process
    try:
        return 0 if run(options.results, options.device, options.quick) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
