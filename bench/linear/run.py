"""The microbenchmark of one frozen linear layer with LoRA: every candidate of `baselines.py`, interleaved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Argument, Option

from loge_kernels.backend.choice import check_name
from loge_kernels.check.accuracy import Verdict
from loge_kernels.command_line import WHOLE, Device, Json
from loge_kernels.factors.factors import resolve_rank
from loge_kernels.machine import DTYPES, choose_device, dtype_name
from loge_kernels.numerics.matmul import slow_on_cpu

from ..measure import output
from ..measure.environment import describe
from ..measure.memory import with_peak_memory
from ..measure.roofline import Ceilings, measure_ceilings, plain_rates, speedup_ceiling
from ..measure.shapes import parse_shapes
from ..measure.timing import Timing, TimingOptions, captured, clock_for, interleave, own_stream
from . import on_paper, rates
from .baselines import BASELINES, DIRECTIONS, Candidate, candidates, check_baselines
from .device_rates import keep
from .gate import Gate
from .operands import Operands, make_operands
from .rows import Case, Row

RANKS = (1 / 16, 1 / 8, 1 / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroOptions:
    """What to measure, or with `tune` what to tune for (`tune`).

    shapes: as `measure.shapes` reads them.   adapter_dtype: "same" as the layer, the stricter comparison, or "float32",
    PEFT's default for 16-bit models.   backends: names to measure; None for all that are available.   baselines: any
    of "dense", "peft", "exact", "unfused".   seed: of the operands.
    """

    shapes: Annotated[
        Sequence[str],
        Argument(
            help="Model names (SmolLM2-135M, LLaMA-2-7B, LLaMA-3-8B, Qwen2.5-7B), model:projections or M,N,K; default: "
            "SmolLM2-135M on a CPU, LLaMA-2-7B on a GPU."
        ),
        WHOLE,
    ] = ()
    rows: Annotated[
        Sequence[int], Option("--rows", "-M", help="M, tokens: a list, for shapes that do not carry their own.")
    ] = (2048,)
    ranks: Annotated[
        Sequence[int | float] | None,
        Option(
            "--rank",
            "-R",
            help="R: ints, or shares of min(N, K); default: 1/16, 1/8 and 1/4, with --tune 64, 128 and 256.",
        ),
    ] = None
    lora_ranks: Annotated[Sequence[int], Option("--lora-rank", "-P", help="P: a list.")] = (16,)
    dtypes: Annotated[Sequence[str], Option("--dtype", help="float32, bfloat16, float16, float64: a list.")] = (
        "bfloat16",
    )
    device: Device = "auto"
    direction: Annotated[str, Option(help="forward+backward, or backward; the forward then is not timed.")] = (
        "forward+backward"
    )
    adapter_dtype: str = "same"
    backends: Sequence[str] | None = None
    baselines: Sequence[str] = BASELINES
    budget: Annotated[
        float,
        Option(
            help="Seconds of measured rounds for each case: one shape, M, P and dtype with every R; three rounds at "
            "least, and one of what takes longer than a quarter of this."
        ),
    ] = 20.0
    slow_limit: Annotated[
        float, Option(help="Leave out a baseline predicted to take longer than this many seconds a call.")
    ] = 180.0
    seed: int = 0
    tune: Annotated[
        bool,
        Option(
            "--tune",
            help="Instead: measure the Triton configurations for these problems and keep the best in the user's cache.",
        ),
    ] = False
    on_paper: Annotated[
        str | None,
        Option(help="Instead: predict the backward on this GPU (H100, H200, A100), each candidate by phase."),
    ] = None
    json: Json = None
    csv: Annotated[Path | None, Option(help="Also write the rows to this file, as CSV.")] = None
    png: Annotated[Path | None, Option(help="Draw speed-up against R into this file.")] = None

    def with_ranks(self, ranks: Sequence[int | float]) -> MicroOptions:
        """These options, with `ranks` where they name none."""
        return replace(self, ranks=ranks) if self.ranks is None else self


def run(options: MicroOptions, console: Console | None = None) -> dict[str, Any]:
    """Measure every case, print a table for each, write the files asked for; the JSON-able report is returned. With
    `on_paper` nothing is measured: `on_paper.run`.

    Its "rows" are `Row.to_dict()`; "passed" is False when a candidate gave a wrong result. Raises ValueError, with the
    argument named, before anything is measured.
    """
    console = console or Console()
    options = options.with_ranks(RANKS)
    device = choose_device(options.device)
    cases = plan(options, device)
    output.check_writable(options.json, options.csv, options.png)
    if options.on_paper is not None:
        return on_paper.run(cases, options.on_paper, console, options.json)
    report: dict[str, Any] = {
        "benchmark": "linear",
        "environment": describe(device),
        "options": output.without_files(asdict(options)),
        "ceilings": {},
        "rates": [],
        "rows": [],
    }
    rows: list[Row] = []
    with output.spinner(console, "measuring the ceilings of this device") as tell, own_stream(device):
        ceilings = {name: measure_ceilings(device, DTYPES[name]) for name in dict.fromkeys(c.dtype for c in cases)}
        report["ceilings"] = {name: ceiling.to_dict() for name, ceiling in ceilings.items()}
        output.print_heading(console, report)
        if device.type == "cuda":
            tell("measuring the rates of the cost model")
            report["device_rates"], report["device_rates_kept_in"] = keep(device, report["environment"])
        for number, case in enumerate(cases, 1):
            label = f"case {number} of {len(cases)}, {case.title}: "
            operands = operands_of(case, options, device)
            if device.type == "cuda":
                tell(f"{label}the rates of its products")
                limits = TimingOptions(budget_seconds=options.budget / 4)
                report["rates"] += rates.measure(case, operands, clock_for(device), limits)
            rows_of_case = measure(case, options, operands, ceilings[case.dtype], partial(_tell, tell, label))
            if device.type == "cuda" and options.direction == "backward":
                on_paper.add_predictions(rows_of_case, device)
            output.print_case(console, case.title, options.direction, rows_of_case)
            rows += rows_of_case
            report["rows"] = [row.to_dict() for row in rows]
            report["passed"] = all(row.status != "wrong result" for row in rows)
            output.write(report, options.json, options.csv)
    if options.png:
        output.plot(report, options.png)
    return report


def _tell(tell: Callable[[str], None], label: str, message: str) -> None:
    tell(label + message)


def plan(options: MicroOptions, device: torch.device) -> list[Case]:
    """The cases of `options`, checked: ValueError names the argument that cannot be."""
    if options.direction not in DIRECTIONS:
        raise ValueError(f"direction={options.direction!r} is unknown; choose one of {', '.join(DIRECTIONS)}")
    for name in ("rows", "ranks", "lora_ranks", "dtypes"):
        if not getattr(options, name):
            raise ValueError(f"{name} is empty; give at least one value")
    for name in ("rows", "lora_ranks"):
        for value in getattr(options, name):
            if value < 1:
                raise ValueError(f"{name}: {value} must be at least 1")
    for name in ("budget", "slow_limit"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}={getattr(options, name)!r} must be positive (seconds)")
    check_baselines(options.baselines)
    for name in options.backends or ():
        check_name(name, "backends")
    if options.adapter_dtype not in ("same", "float32"):
        raise ValueError(f"adapter_dtype={options.adapter_dtype!r} is unknown; choose 'same' or 'float32'")
    dtypes = [dtype_name(name) for name in options.dtypes]
    default = "LLaMA-2-7B" if device.type == "cuda" else "SmolLM2-135M"
    cases = []
    for shape in parse_shapes(options.shapes or (default,)):
        ranks = tuple(dict.fromkeys(resolve_rank(R, shape.N, shape.K, "ranks") for R in options.ranks or ()))
        for M in (shape.rows,) if shape.rows else options.rows:
            cases += [Case(shape, M, P, dtype, ranks) for P in options.lora_ranks for dtype in dtypes]
    return cases


def operands_of(case: Case, options: MicroOptions, device: torch.device) -> Operands:
    """The operands of one case."""
    adapter = torch.float32 if options.adapter_dtype == "float32" else None
    N, K, dtype = case.shape.N, case.shape.K, DTYPES[case.dtype]
    return make_operands(case.M, N, K, case.ranks, case.P, dtype, device, adapter, options.seed)


def measure(
    case: Case,
    options: MicroOptions,
    operands: Operands,
    ceilings: Ceilings,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """The rows of one case, baselines first. Everything is timed in turn in one loop and checked by the gate."""
    found = candidates(operands, options.direction, options.backends, options.baselines)
    return measure_candidates(case, options, operands, found, ceilings, progress)


def measure_candidates(
    case: Case,
    options: MicroOptions,
    operands: Operands,
    found: Sequence[Candidate],
    ceilings: Ceilings,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """`measure` for a given list of candidates."""
    device = operands.dy.device
    tell = progress or (lambda message: None)
    if device.type == "cpu" and slow_on_cpu(operands.dtype):
        plain_nn, plain_nt = plain_rates(operands.weight)
        ceilings = replace(ceilings, plain_nn=plain_nn, plain_nt=plain_nt)
    gate = Gate(operands)
    by_name = {candidate.name: candidate for candidate in found}
    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    for candidate in found:
        predicted = candidate.predicted_seconds(ceilings, options.direction, operands)
        if predicted > options.slow_limit:
            refused[candidate.name] = (
                f"about {predicted:.0f} s a call with torch's own {case.dtype} products, "
                f"over the limit of {options.slow_limit:.0f} s"
            )
            continue
        tell(f"{candidate.name}: preparing" + (f", then about {predicted:.0f} s a call" if predicted > 5 else ""))
        try:
            calls[candidate.name] = candidate.prepare()
        except (RuntimeError, ValueError, TypeError) as error:
            refused[candidate.name] = str(error).splitlines()[0]
    peaks: dict[str, int] = {}
    verdicts: dict[str, dict[str, Verdict]] = {}

    def around_first(name: str, call: Callable[[], Any]) -> Any:
        result, peaks[name] = with_peak_memory(call, device)
        return result

    def inspect(name: str, results: Any) -> None:
        candidate = by_name[name]
        found = gate.check(results, candidate.rank, candidate.adapter, candidate.eight_bits)
        before = verdicts.get(name, found)  # of the eager call, where this is a replay
        verdicts[name] = {key: max(verdict, before[key], key=lambda v: v.ratio) for key, verdict in found.items()}

    if has_graphs(device):  # what is compiled at a first call is no part of a time
        for call in calls.values():
            with contextlib.suppress(RuntimeError, ValueError, TypeError):  # which come again when it is timed
                call()
    clock = clock_for(device)
    budget = options.budget / 2 if has_graphs(device) else options.budget
    limits = TimingOptions(budget_seconds=budget, slow_seconds=max(1.0, options.budget / 4))
    eager = interleave(calls, clock, limits, around_first=around_first, inspect=inspect, progress=tell)
    timings: dict[str, dict[str, Timing]] = {"eager": eager, "graph": {}}
    no_graph: dict[str, str] = {}
    if has_graphs(device):
        sound = [candidate for candidate in found if candidate.name in eager and not eager[candidate.name].failure]
        replays, no_graph = _captured(sound, device, tell)
        timings["graph"] = interleave(replays, clock, limits, inspect=inspect, progress=tell)
    rows = []
    for candidate in found:
        name = candidate.name
        row = Row(case, name, candidate.kind, candidate.rank, "not run", refused.get(name, ""))
        row.factor_bytes = candidate.factor_bytes
        row.graph_note = no_graph.get(name, "")
        if name in eager:
            own = {mode: timed[name] for mode, timed in timings.items() if name in timed}
            _fill(row, candidate, own, verdicts.get(name, {}), ceilings, options.direction)
            row.peak_bytes = peaks.get(name)
        rows.append(row)
    _compare(rows, timings)
    return rows


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _captured(
    found: Sequence[Candidate], device: torch.device, tell: Callable[[str], None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """A replay of a CUDA graph of each candidate's call, or why there is none."""
    replays: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for candidate in found:
        tell(f"{candidate.name}: capturing")
        try:
            replays[candidate.name] = captured(candidate.prepare, device)
        except (RuntimeError, ValueError, TypeError) as error:
            first: BaseException = error
            while first.__context__ is not None:  # the end of a capture that has failed raises an error of its own
                first = first.__context__
            reasons[candidate.name] = f"{type(first).__name__}: {first}".splitlines()[0]
    return replays, reasons


def _fill(
    row: Row,
    candidate: Candidate,
    timings: dict[str, Timing],
    verdicts: dict[str, Verdict],
    ceilings: Ceilings,
    direction: str,
) -> None:
    """A graph's replay is what is shown where there is one: the host is not in it."""
    timing = timings["eager"]
    if timing.failure:
        row.note = timing.failure
        return
    row.eager_seconds = timing.median
    replay = timings.get("graph")
    if replay is not None and replay.failure:
        row.graph_note = replay.failure
    elif replay is not None:
        row.mode, timing, row.graph_seconds = "graph", replay, replay.median
    row.verdicts = verdicts
    row.runs = timing.runs
    row.seconds, row.p10, row.p90 = timing.median, timing.quantile(0.1), timing.quantile(0.9)
    if timing.cold:
        row.note = "1 run, no warm-up"
    wrong = {result: verdict.ratio for result, verdict in verdicts.items() if not verdict.passed}
    if wrong:
        row.status = "wrong result"
        row.note = "; ".join(f"{result}: {ratio:.1e} times the allowed error" for result, ratio in wrong.items())
        return
    row.status = "ok"
    row.tflops = candidate.work.flops / timing.median / 1e12
    row.gbytes_per_second = candidate.work.moved_bytes / timing.median / 1e9
    row.roofline = ceilings.seconds(candidate.work) / timing.median
    if candidate.rank is not None:
        row.ceiling = speedup_ceiling(direction, row.case.shape.N, row.case.shape.K, candidate.rank)


def _compare(rows: list[Row], timings: dict[str, dict[str, Timing]]) -> None:
    """Fill in the speed-ups: between results that passed the gate, never for a baseline over itself, and between two
    replays or two eager calls, never one of each."""
    sound = [row for row in rows if row.status == "ok"]
    for row in sound:
        for baseline in sound:
            # A low-rank baseline is compared with its own rank.
            if baseline.kind in BASELINES and baseline is not row and baseline.rank in (None, row.rank):
                both = timings["graph" if row.mode == baseline.mode == "graph" else "eager"]
                row.speedup[baseline.kind] = both[row.candidate].faster_than(both[baseline.candidate])
