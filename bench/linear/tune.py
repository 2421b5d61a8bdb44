"""`bench --tune`: measure the tile configurations of each class of problems, and keep the fastest in the user's table;
on a GPU, measure the rates of the cost model first, and keep them beside.

A class is an entry of the shipped tables: a kernel, the size of an element, the ranks and adapter ranks it serves,
aligned rows or not. Its candidates are run interleaved on every given problem that falls into it. One that fails or
gives a wrong result is dropped; of the others, the one with the smallest geometric mean of times is the winner if it
also runs at the largest ranks of the class, which later calls will ask of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from loge_kernels import triton_kernels as tk
from loge_kernels.backend import reference
from loge_kernels.backend.problem import BackwardProblem
from loge_kernels.check.accuracy import judge
from loge_kernels.machine import DTYPES, choose_device
from loge_kernels.triton_kernels import availability, compile_check, dispatch, explanation, tuning
from loge_kernels.triton_kernels.configs import (
    Config,
    Entry,
    OneLaunchConfig,
    TwoLaunchConfig,
    architecture,
    best_entry,
    device_slug,
    padded,
    shipped,
)
from loge_kernels.triton_kernels.devices import DeviceSpec, device_spec
from loge_kernels.triton_kernels.exact_choice import choose_exact

from ..measure import output
from ..measure.environment import describe
from ..measure.timing import Clock, TimingOptions, clock_for, interleave
from .device_rates import keep, source_of
from .gate import Gate
from .operands import Operands, make_operands
from .run import MicroOptions, plan

# Times of the interpreter must not become the table of a GPU.
INTERPRETER = "Triton interpreter"
RANKS = (64, 128, 256)  # where the options name none
Candidates = Callable[[str, int, int, int], Iterable[Config]]  # of kernel, bits, rank and adapter of a class


@dataclass(frozen=True, slots=True)
class Problem:
    """One layer, M, R, P and dtype."""

    shape: str
    M: int
    N: int
    K: int
    R: int
    P: int
    dtype: str

    def __str__(self) -> str:
        return f"M={self.M} N={self.N} K={self.K} R={self.R} P={self.P} {self.dtype}"


@dataclass(slots=True)
class Measured:
    """A candidate, its times on the problems of its class so far, and why it was dropped ("": it was not)."""

    config: OneLaunchConfig | TwoLaunchConfig
    times: list[dict[str, float]] = field(default_factory=list)
    dropped: str = ""

    @property
    def seconds(self) -> float:
        """The geometric mean of its medians."""
        return math.exp(sum(math.log(time["median"]) for time in self.times) / len(self.times))

    def to_dict(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "times": self.times, "dropped": self.dropped or None}


def run(
    options: MicroOptions, console: Console | None = None, candidates: Candidates = tuning.search_space
) -> dict[str, Any]:
    """Measure, write each class's winner to the user's table as soon as it is known, print a table; the JSON-able
    report is returned. Calls of this process use the new configurations from then on.

    `candidates` replaces the search space; the shipped configuration of a class is always measured with it. "passed"
    in the report is False when a class has no winner or when a shipped configuration was dropped. Raises ValueError,
    with the reason, where Triton's kernels cannot run and for options that cannot be, before anything is measured.
    """
    console = console or Console()
    reason = tk.why_not_here()
    if reason is not None:
        raise ValueError(f"nothing can be tuned here: {reason}")
    options = options.with_ranks(RANKS)
    device = choose_device(options.device)
    problems = problems_of(options, device)
    spec = device_spec(device)
    if availability.interpreted():
        spec = replace(spec, name=INTERPRETER)
    slug = device_slug(spec.name)
    table = tuning.table_path(slug)
    if table is None:
        raise ValueError(
            "there is no cache to write tuned configurations to (LOGE_CACHE=off, or a user without a home directory): "
            "set LOGE_CACHE to a folder"
        )
    output.check_writable(options.json, table)
    classes = classes_of(problems, spec)

    environment = describe(device)
    source = source_of(environment)
    report: dict[str, Any] = {
        "benchmark": "tune",
        "environment": environment,
        "options": output.without_files(asdict(options)),
        "device_table": slug,
        "written": str(table),
        "classes": [],
        "passed": True,
    }
    if device.type == "cuda":
        report["rates"], _ = keep(device, environment)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            spaces = {entry: _space(entry, candidates) for entry in classes}
            total = sum((len(spaces[entry]) + 1) * len(classes[entry]) for entry in classes)
            task = progress.add_task("", total=total)
            for number, (entry, members) in enumerate(classes.items(), 1):
                tell = partial(_advance, progress, task, f"class {number} of {len(classes)}, {_title(entry)}: ")
                measured = measure(spaces[entry], members, device, options.budget, tell)
                winner = _winner(entry, measured, members[0].dtype, device)
                if winner is not None:
                    tuning.write_entries(slug, [replace(entry, config=winner.config)], source)
                report["classes"].append(_class_report(entry, members, measured, winner))
                report["passed"] &= winner is not None and not measured[0].dropped
                output.write(report, options.json)
    finally:
        _forget_choices()
    print_report(console, report)
    return report


def _advance(progress: Progress, task: TaskID, label: str, message: str, steps: int = 0) -> None:
    progress.update(task, description=escape(label + message), advance=steps)


def problems_of(options: MicroOptions, device: torch.device) -> list[Problem]:
    """The problems of `options`, checked: ValueError names the argument that cannot be, or why it cannot run."""
    problems = []
    for case in plan(options, device):
        for R in case.ranks:
            reason = availability.why_not(dtype=DTYPES[case.dtype], device=device, R=R, P=case.P)
            if reason is not None:
                raise ValueError(f"cannot tune for R={R}, P={case.P} in {case.dtype} on {device}: {reason}")
            problems.append(Problem(case.shape.name, case.M, case.shape.N, case.shape.K, R, case.P, case.dtype))
    return problems


def classes_of(problems: Iterable[Problem], spec: DeviceSpec) -> dict[Entry, list[Problem]]:
    """The shipped entries that the problems fall into. ValueError where there is none at all."""
    # As `dispatch` reads them, without the user's own.
    arch = compile_check.entries_within(architecture(spec.capability), spec.shared_bytes)
    tables = (shipped(device_slug(spec.name)), arch)
    classes: dict[Entry, list[Problem]] = {}
    for problem in problems:
        bits = torch.finfo(DTYPES[problem.dtype]).bits
        aligned = problem.N % 8 == 0 and problem.K % 8 == 0
        for kernel in ("one_launch", "two_launch"):
            if kernel == "one_launch" and problem.R > availability.MAX_ONE_LAUNCH_RANK:
                continue
            entry = best_entry(tables, kernel, bits, padded(problem.R), padded(problem.P), aligned)
            if entry is not None:
                classes.setdefault(entry, []).append(problem)
    if not classes:
        raise ValueError(f"no shipped configuration for {spec.name} holds any of these problems")
    return classes


def _space(entry: Entry, candidates: Candidates) -> list[Measured]:
    """The candidates of a class, the shipped configuration first: of two equally fast ones it stays."""
    configs = dict.fromkeys((entry.config, *candidates(entry.kernel, entry.bits, entry.rank, entry.adapter)))
    return [Measured(config) for config in configs if isinstance(config, (OneLaunchConfig, TwoLaunchConfig))]


def measure(
    measured: list[Measured],
    problems: Sequence[Problem],
    device: torch.device,
    budget: float,
    tell: Callable[..., None],
) -> list[Measured]:
    """Fill in `measured`: on every problem each candidate is checked, and those that pass are timed in turn."""
    clock: Clock = clock_for(device)
    options = TimingOptions(budget_seconds=budget, slow_seconds=max(1.0, budget / 4))
    for problem in problems:
        operands = make_operands(problem.M, problem.N, problem.K, [problem.R], problem.P, DTYPES[problem.dtype], device)
        gate = Gate(operands)
        xa = (operands.x.detach().float() @ operands.lora_A.detach().float().t()).to(operands.dtype)
        calls: dict[str, Callable[[], Any]] = {}
        by_name = {config_text(one.config): one for one in measured}
        for name, one in by_name.items():
            tell(f"{problem}, checking {name}", steps=1)
            if not one.dropped:
                calls[name] = partial(_backward, operands, xa, problem.R, config=one.config)
                one.dropped = _tried(device, partial(_wrong, gate, calls[name], problem.R))
                if one.dropped:
                    del calls[name]
        tell(f"{problem}, timing {len(calls)} candidates", steps=1)
        for name, timing in interleave(calls, clock, options).items():
            if timing.failure:
                by_name[name].dropped = timing.failure
            else:
                by_name[name].times.append(
                    {
                        "median": timing.median,
                        "p10": timing.quantile(0.1),
                        "p90": timing.quantile(0.9),
                        "runs": timing.runs,
                    }
                )
    return measured


def _backward(o: Operands, xa: Tensor, R: int, config: OneLaunchConfig | TwoLaunchConfig) -> dict[str, Tensor]:
    factors, A, B = o.factors[R], o.lora_A.detach(), o.lora_B.detach()
    outputs = tk.backward(o.dy, o.x.detach(), xa, factors.left, factors.right, A, B, o.scaling, config=config)
    return dict(zip(("dx", "dA", "dB"), outputs[:3], strict=True))


def _wrong(gate: Gate, call: Callable[[], dict[str, Tensor]], R: int) -> str:
    ratios = {name: v.ratio for name, v in gate.check(call(), R).items() if not v.passed}
    return _wrong_text(ratios)


def _wrong_text(ratios: dict[str, float]) -> str:
    listed = ", ".join(f"{name} {ratio:.1e}" for name, ratio in ratios.items())
    return f"wrong result: {listed} times the allowed error" if ratios else ""


def _tried(device: torch.device, check: Callable[[], str]) -> str:
    """What `check` says, or the error it raised: compilers and drivers have many, and none is a reason to stop."""
    try:
        return check()
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises again after an error that ends every later call too
        text = " ".join(str(error).split())
        # A compiler quotes the source first and says what is wrong last.
        return f"{type(error).__name__}: {text if len(text) <= 200 else '… ' + text[-200:]}"


def _winner(entry: Entry, measured: Sequence[Measured], dtype: str, device: torch.device) -> Measured | None:
    """The fastest candidate that also serves the largest ranks of the class."""
    for one in sorted((one for one in measured if not one.dropped), key=lambda one: one.seconds):
        one.dropped = _tried(device, partial(_fails_at_most, entry, one.config, DTYPES[dtype], device))
        if not one.dropped:
            return one
    return None


@torch.no_grad()
def _fails_at_most(
    entry: Entry, config: OneLaunchConfig | TwoLaunchConfig, dtype: torch.dtype, device: torch.device
) -> str:
    """What is wrong with the results at the largest ranks, with what needs most on chip: every gradient, a fp32
    adapter, with dropout, which halves some tiles, and without. Few rows and columns: tiles do not depend on them."""
    # A two-launch configuration has two ways to expand: T kept on chip, at most project_r wide, and in tiles.
    ranks = [entry.rank]
    if isinstance(config, TwoLaunchConfig):
        ranks = [min(rank, entry.rank) for rank in (config.project_r, 2 * config.project_r)]
    M, N, K = config.block_m + 16, *((136, 72) if entry.aligned else (131, 67))
    for R, dropout in itertools.product(dict.fromkeys(ranks), (0.0, 0.5)):
        o = make_operands(M, N, K, [R], entry.adapter, dtype, device, torch.float32)
        p = BackwardProblem(
            dy=o.dy,
            x=o.x.detach(),
            xa=torch.randn(M, entry.adapter, device=device).to(dtype),
            weight=None,
            left=o.factors[R].left,
            right=o.factors[R].right,
            lora_A=o.lora_A.detach(),
            lora_B=o.lora_B.detach(),
            scaling=o.scaling,
            dropout=dropout,
            seed=torch.tensor([7, 11], device=device),
            exact_fraction=0.0,
            need_dx=True,
            need_dweight=False,
            need_dbias=True,
            need_dA=True,
            need_dB=True,
            deterministic=False,
        )
        outputs = tk.backward(
            *(p.dy, p.x, p.xa, p.left, p.right, p.lora_A, p.lora_B, p.scaling),
            dropout=p.dropout,
            seed=p.seed,
            need_dbias=True,
            config=config,
        )
        plain, exact = reference.backward(p), reference.backward(_in_double(p))
        ratios = {}
        for name, value in zip(("dx", "dA", "dB", "dbias"), outputs, strict=True):
            verdict = judge(value, getattr(plain, name), getattr(exact, name))
            if not verdict.passed:
                ratios[f"{name} at R={R}, P={entry.adapter}"] = verdict.ratio
        if ratios:
            return _wrong_text(ratios)
    return ""


def _in_double(problem: BackwardProblem) -> BackwardProblem:
    values: dict[str, Any] = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            values[name] = value.double()
    return BackwardProblem(**values)


def _forget_choices() -> None:
    """Have the dispatcher read the tables again: this process holds choices made before the new one was written."""
    from loge_kernels.triton_kernels import launch

    choices = (dispatch.form_configs, dispatch.forward_wins, choose_exact, explanation.explain)
    for cached in (device_spec, dispatch._tables, *choices):
        cached.cache_clear()
    launch._plans.clear()
    launch._forward_constants.clear()


def config_text(config: OneLaunchConfig | TwoLaunchConfig) -> str:
    """The values of a configuration in the order of its fields."""
    return " ".join(str(value) for value in asdict(config).values())


def _title(entry: Entry) -> str:
    aligned = "aligned" if entry.aligned else "unaligned"
    return f"{entry.kernel} {entry.bits}-bit R≤{entry.rank} P≤{entry.adapter} {aligned}"


def _class_report(
    entry: Entry, problems: Sequence[Problem], measured: Sequence[Measured], winner: Measured | None
) -> dict[str, Any]:
    """JSON-able; the ratio is how many times faster the winner is than the shipped configuration."""
    own = measured[0]
    own_seconds = None if own.dropped else own.seconds
    return {
        **{name: value for name, value in asdict(entry).items() if name != "config"},
        "title": _title(entry),
        "problems": [asdict(problem) for problem in problems],
        "shipped": {"config": asdict(own.config), "text": config_text(own.config), "seconds": own_seconds},
        "best": None
        if winner is None
        else {"config": asdict(winner.config), "text": config_text(winner.config), "seconds": winner.seconds},
        "ratio": None if winner is None or own_seconds is None else own_seconds / winner.seconds,
        "candidates": [one.to_dict() for one in measured],
    }


def print_report(console: Console, report: dict[str, Any]) -> None:
    """A row per class, what was wrong, and where the winners lie."""
    orders = [
        f"{kind}: {' '.join(f.name for f in dataclasses.fields(config))}"
        for kind, config in (("one_launch", OneLaunchConfig), ("two_launch", TwoLaunchConfig))
    ]
    table = Table(title=f"{report['environment']['device']}: geometric means over the problems of each class")
    for name in ("class", "shipped", "time", "best", "time", "ratio", "dropped"):
        table.add_column(name, justify="right" if name in ("time", "ratio", "dropped") else "left", no_wrap=True)
    lines = []
    for row in report["classes"]:
        own, best, ratio = row["shipped"], row["best"], row["ratio"]
        dropped = [one for one in row["candidates"] if one["dropped"]]
        table.add_row(
            row["title"],
            own["text"],
            output.duration(own["seconds"]) or "dropped",
            best["text"] if best else "none",
            output.duration(best["seconds"]) if best else "",
            f"{ratio:.2f}x" if ratio else "",
            f"{len(dropped)} of {len(row['candidates'])}",
        )
        for one in dropped:
            if one["config"] == own["config"] or one["dropped"].startswith("wrong result"):
                values = " ".join(str(value) for value in one["config"].values())
                lines.append(f"  {row['title']}: {values} dropped: {one['dropped']}")
    output.print_wide(console, table)
    console.print(f"[dim]{'; '.join(orders)}[/dim]", highlight=False, soft_wrap=True)
    if "rates" in report:
        measured = ", ".join(f"{name} {value}" for name, value in report["rates"].items())
        console.print(escape(f"rates of the cost model: {measured}"), highlight=False, soft_wrap=True)
    for line in lines:
        console.print(escape(line), style="red", highlight=False, soft_wrap=True)
    if any(row["best"] for row in report["classes"]):
        console.print(f"written to {escape(report['written'])}", highlight=False, soft_wrap=True)
