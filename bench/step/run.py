"""Seconds per training step of a LLaMA-shaped model: PEFT's exact LoRA, the same through this package's op, policies.

The model is a `transformers` LlamaForCausalLM with random weights and LoRA on every linear of its blocks. All policies
share the frozen weights and start from the same adapters; a round is one step (forward, backward, AdamW) of each.
Random weights have flat spectra, which changes what is learnt and not how long it takes, and low-rank factors are those
of a random subspace, for which no weight is decomposed.

Defaults: the dimensions of a 1.1B LLaMA (hidden 2048, 32 heads) cut from 22 to 4 layers. With the full vocabulary of
32,000 the head would do a quarter of the flops of so shallow a model, against 6 % in the whole one, and no policy
touches it; so the vocabulary is cut in the same proportion, to 32,000 · 4/22 ≈ 5,824.

With `on_paper` nothing is measured: `on_paper.run` predicts the step of a named model on a named GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Option

from loge_kernels.command_line import WHOLE, Device, Json
from loge_kernels.machine import DTYPES, choose_device, dtype_name

from ..measure import output
from ..measure.environment import describe
from ..measure.memory import with_peak_memory
from ..measure.roofline import Ceilings, measure_ceilings
from ..measure.timing import Timing, TimingOptions, clock_for, interleave
from ..paper import run as on_paper
from ..policies import PEFT, Policy, parse, parse_all
from .trainer import PHASES, Trainer, build

RIVALS = (PEFT, "exact")
DEFAULTS = ("apply", "rank=1/16")
CHECKPOINTING = {"off": (False,), "on": (True,), "both": (False, True)}
_COMPARED = (*RIVALS, "apply")  # in the table; the file compares all with all
# Allowed relative errors of the first gradients: rounding of activations through a few layers (0.064 on an H200 where y
# is rounded once and by PEFT three times), and in 8 bits the rounding of each dY and weight, which adds up from layer
# to layer: 0.05 after 4 layers in int8, and with x in a forward 0.12, in float8 0.34. An error in a formula is of the
# order of 1.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_EIGHT_BIT_TOLERANCE = 0.15
_EIGHT_BIT_FORWARD_TOLERANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """The model, the batch and how long to measure."""

    policies: Annotated[
        Sequence[str],
        Option(
            "--policy",
            help='What to compare with peft and exact, repeated: apply, or arguments of apply ("rank=1/8,'
            'exact_layers=0.5"); default: apply and rank=1/16, on paper a list of all kinds.',
        ),
        WHOLE,
    ] = ()
    hidden: Annotated[int, Option(help="Width of the model.")] = 2048
    intermediate: Annotated[int, Option(help="Width of its MLP.")] = 5632
    layers: Annotated[int, Option(help="Blocks.")] = 4
    heads: Annotated[int, Option(help="Attention heads.")] = 32
    kv_heads: Annotated[int | None, Option(help="Heads of keys and values; default: as many.")] = None
    vocab: Annotated[int, Option(help="Size of the vocabulary.")] = 5824
    batch: Annotated[int, Option(help="Sequences a step.")] = 2
    seq: Annotated[int | None, Option(help="Tokens a sequence; default: 512, on paper 4096.")] = None
    lora_rank: Annotated[int, Option("--lora-rank", "-P", help="P, on every linear of the blocks; alpha = 2P.")] = 16
    checkpointing: Annotated[str, Option(help="Compute blocks again in backward: off, on, or both, in turn.")] = "off"
    dtypes: Annotated[Sequence[str], Option("--dtype", help="float32, bfloat16, float16: a list.")] = (
        "float32",
        "bfloat16",
    )
    adapter_dtype: Annotated[
        str, Option(help="same as the model, the stricter comparison, or float32, PEFT's default for 16-bit models.")
    ] = "same"
    backend: Annotated[str | None, Option(help="Of this package's op; default: the one in force.")] = None
    device: Device = "auto"
    budget: Annotated[float, Option(help="Seconds of measured rounds for each dtype.")] = 120.0
    slow_limit: Annotated[float, Option(help="Leave PEFT out above this many predicted seconds a step.")] = 180.0
    seed: Annotated[int, Option(help="Of weights, adapters and tokens.")] = 0
    on_paper: Annotated[str | None, Option(help="Instead: predict the step on this GPU (H100, H200, A100, B200).")] = (
        None
    )
    model: Annotated[str, Option(help="With --on-paper: LLaMA-2-7B, LLaMA-3-8B or LLaMA-3-70B.")] = "LLaMA-3-8B"
    json: Json = None

    def check(self) -> list[Policy]:
        """The policies, the rivals first. Raises ValueError where a value cannot work."""
        for name in ("hidden", "intermediate", "layers", "heads", "vocab", "batch", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.seq is not None and self.seq < 1:
            raise ValueError(f"seq={self.seq!r} must be at least 1")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if self.hidden % (2 * self.heads) or kv_heads < 1 or self.heads % kv_heads:
            raise ValueError(
                f"hidden={self.hidden}, heads={self.heads}, kv_heads={kv_heads}: "
                "hidden must be a multiple of 2 * heads, and heads of kv_heads"
            )
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing={self.checkpointing!r} is unknown; choose {', '.join(CHECKPOINTING)}")
        if not self.dtypes:
            raise ValueError("dtypes must not be empty")
        if self.adapter_dtype not in ("same", "float32"):
            raise ValueError(f"adapter_dtype={self.adapter_dtype!r} is unknown; choose 'same' or 'float32'")
        for name in ("budget", "slow_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive (seconds)")
        output.check_writable(self.json)
        return parse_all((*RIVALS, *(self.policies or DEFAULTS)))

    @property
    def tokens(self) -> tuple[int, int]:
        """Sequences a step, and tokens a sequence."""
        return self.batch, self.seq or (512 if self.on_paper is None else 4096)


@dataclass(slots=True)
class StepRow:
    """One policy in one dtype; `status` is "ok", "wrong result" or "not run"."""

    policy: str
    dtype: str
    checkpointing: bool
    status: str = "not run"
    note: str = ""
    runs: int = 0
    seconds: float | None = None  # of a step, median
    p10: float | None = None
    p90: float | None = None
    phases: dict[str, float] = field(default_factory=dict)  # median seconds of forward, backward, optimizer
    speedup: dict[str, float] = field(default_factory=dict)  # over the other policies
    # Of all cores, on a CPU: where other work takes turns with this one they say more than the clock.
    cpu_seconds: float | None = None
    cpu_speedup: dict[str, float] = field(default_factory=dict)
    loss: float | None = None  # of the first step
    error: float | None = None  # largest relative difference of its first gradients, as far as compared, from PEFT's
    peak_bytes: int | None = None  # of the first step, above weights and adapters
    held_bytes: int = 0  # factors and 8-bit copies of weights
    layers: str = ""  # what `apply` said


def run(options: StepOptions, console: Console | None = None) -> dict[str, Any]:
    """Measure every dtype, print a table for each, write the file asked for; the JSON-able report is returned.

    "rows" holds `StepRow`s as dicts; "passed" is False when a policy gave a wrong result. Raises ValueError, with the
    argument named, before anything is measured.
    """
    console = console or Console()
    policies = options.check()
    if options.on_paper is not None:
        return predict(options, console)
    device = choose_device(options.device)
    report: dict[str, Any] = {
        "benchmark": "step",
        "environment": describe(device),
        "options": output.without_files(asdict(options)),
        "factors": "random subspace",
        "ceilings": {},
        "rows": [],
    }
    with output.spinner(console, "measuring the ceilings of this device") as tell:
        dtypes = [dtype_name(name) for name in options.dtypes]
        ceilings = {dtype: measure_ceilings(device, DTYPES[dtype]) for dtype in dtypes}
        report["ceilings"] = {dtype: ceiling.to_dict() for dtype, ceiling in ceilings.items()}
        output.print_heading(console, report)
        for dtype in dtypes:
            for again in CHECKPOINTING[options.checkpointing]:
                rows = measure(options, policies, dtype, again, device, ceilings[dtype], tell)
                _print(console, options, rows)
                report["rows"] += [asdict(row) for row in rows]
                report["passed"] = all(row["status"] != "wrong result" for row in report["rows"])
                output.write(report, options.json)
    return report


def predict(options: StepOptions, console: Console) -> dict[str, Any]:
    """The step on paper: the policies asked for, or those of `on_paper` where none were."""
    assert options.on_paper is not None
    sequences, length = options.tokens
    return on_paper.run(
        model=options.model,
        gpu=options.on_paper,
        policies=[parse(text).on_paper() for text in options.policies],
        tokens=sequences * length,
        sequences=sequences,
        lora_rank=options.lora_rank,
        console=console,
        json=options.json,
    )


def measure(
    options: StepOptions,
    policies: Sequence[Policy],
    dtype: str,
    checkpointing: bool,
    device: torch.device,
    ceilings: Ceilings,
    progress: Callable[[str], None] | None = None,
) -> list[StepRow]:
    """The rows of one dtype, in the order of `policies`."""
    tell = progress or (lambda message: None)
    tell(f"{dtype}: building the model")
    trainers = build(options, policies, DTYPES[dtype], checkpointing, device)
    rows = {policy.text: StepRow(policy.text, dtype, checkpointing) for policy in policies}
    predicted = _predicted_peft_seconds(options, ceilings)
    if predicted > options.slow_limit:
        rows[PEFT].note = (
            f"about {predicted:.0f} s a step with torch's own {dtype} products, "
            f"over the limit of {options.slow_limit:.0f} s"
        )
        del trainers[PEFT]
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}

    def around_first(name: str, call: Callable[[], Any]) -> Any:
        result, peaks[name] = with_peak_memory(call, device)
        return result

    timings = interleave(
        {name: trainer.run for name, trainer in trainers.items()},
        clock_for(device),
        TimingOptions(budget_seconds=options.budget, slow_seconds=options.budget / 4),
        around_first=around_first,
        inspect=losses.__setitem__,
        progress=lambda message: tell(f"{dtype}: {message}"),
    )
    for name, trainer in trainers.items():
        row, timing = rows[name], timings[name]
        if timing.failure:
            row.note = timing.failure
            continue
        timing.seconds = [seconds / trainer.steps for seconds in timing.seconds]
        _fill(row, trainer, timing)
        row.loss, row.peak_bytes = losses[name], peaks[name]
    _verify(rows, trainers, DTYPES[dtype])
    _compare(rows, timings, "speedup")
    if device.type == "cpu":
        used = {name: Timing(trainers[name].processor[-timings[name].runs :]) for name in trainers}
        for name, row in rows.items():
            row.cpu_seconds = used[name].median if row.status == "ok" else None
        _compare(rows, used, "cpu_speedup")
    return list(rows.values())


def _compare(rows: dict[str, StepRow], timings: dict[str, Timing], field: str) -> None:
    """Of each policy that gave a right result, how many times faster it is than each other."""
    done = [name for name, row in rows.items() if row.status == "ok"]
    for name in done:
        setattr(
            rows[name], field, {other: timings[name].faster_than(timings[other]) for other in done if other != name}
        )


def _fill(row: StepRow, trainer: Trainer, timing: Timing) -> None:
    row.status = "ok"
    row.runs, row.seconds = timing.runs, timing.median
    row.p10, row.p90 = timing.quantile(0.1), timing.quantile(0.9)
    if timing.cold:
        row.note = "1 run, no warm-up"
    steps = torch.tensor(trainer.phases[-timing.runs * trainer.steps :], dtype=torch.float64)
    steps = steps.view(timing.runs, trainer.steps, len(PHASES)).mean(1)
    row.phases = dict(zip(PHASES, steps.quantile(0.5, dim=0).tolist(), strict=True))
    row.held_bytes = trainer.held_bytes
    row.layers = "" if trainer.report is None else trainer.report.summary()


def _predicted_peft_seconds(options: StepOptions, ceilings: Ceilings) -> float:
    """A rough step time of PEFT from the measured rates of torch's own products; attention is left out."""
    kv = options.hidden * (options.kv_heads or options.heads) // options.heads
    block = 2 * options.hidden * (options.hidden + kv) + 3 * options.hidden * options.intermediate
    weights = options.layers * block + options.vocab * options.hidden
    flops = 2 * math.prod(options.tokens) * weights
    return flops / ceilings.plain_nt + flops / ceilings.plain_nn


def _verify(rows: dict[str, StepRow], trainers: dict[str, Trainer], dtype: torch.dtype) -> None:
    """No figure for a wrong step. The first loss must be that of PEFT for every policy, and so must every gradient of
    the exact ones, those of 8-bit ones within the looser tolerance. Of low-rank ones, and of those whose forward is in
    8 bits, the gradients above the first approximated product count: those of the last block's down projection."""
    done = [name for name in rows if rows[name].status == "ok"]
    if not done:
        return
    base = done[0]
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in trainers[base].adapters)
    top = f".layers.{last}.mlp.down_proj."
    expected_loss = rows[base].loss or 0.0
    for name in done:
        strict, kinds = _TOLERANCE[dtype], trainers[name].kinds
        at_top = _EIGHT_BIT_FORWARD_TOLERANCE if "8-bit forward" in kinds else strict
        only_top = bool(kinds & {"low rank", "8-bit forward"})
        found = rows[name].loss or math.nan
        errors = [("loss", abs(found - expected_loss) / max(abs(expected_loss), 1e-30), strict)]
        for key, gradient in trainers[name].first_gradients.items():
            if top in key or not only_top:
                expected = trainers[base].first_gradients[key]
                elsewhere = max(strict, _EIGHT_BIT_TOLERANCE) if "8 bits" in kinds else strict
                allowed = at_top if top in key else elsewhere
                errors.append((f"gradient of {key}", ((gradient - expected).norm() / expected.norm()).item(), allowed))
        where, worst, allowed = max(errors, key=lambda error: math.inf if math.isnan(error[1]) else error[1] / error[2])
        rows[name].error = None if math.isnan(worst) else max(error for _, error, _ in errors)
        if not worst <= allowed:
            rows[name].status = "wrong result"
            rows[name].note = f"{where}: differs from {base} by {worst:.1e}, allowed {allowed:.0e}"


def _print(console: Console, options: StepOptions, rows: list[StepRow]) -> None:
    again = ", activation checkpointing" if rows[0].checkpointing else ""
    console.print(
        f"\n[bold]LLaMA-shaped: hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocab}, "
        f"{' x '.join(map(str, options.tokens))} tokens, P = {options.lora_rank}, {rows[0].dtype}{again}[/bold]",
        highlight=False,
        soft_wrap=True,
    )
    others = [policy for policy in _COMPARED if any(policy in row.speedup for row in rows)]
    compared = [f"x {name}" for name in others]
    processor = ["CPU", *compared] if any(row.cpu_seconds is not None for row in rows) else []
    headings = ("step", "p10-p90", "runs", *PHASES, *compared, *processor, "peak", "held")
    table = output.table(("policy",), headings)
    for row in rows:
        if row.status != "ok":
            table.add_row(row.policy, f"[red]{row.status}[/red]")
            continue
        spread = f"{output.duration(row.p10)}-{output.duration(row.p90)}" if row.runs > 1 else "cold"
        table.add_row(
            row.policy,
            output.duration(row.seconds),
            spread,
            str(row.runs),
            *(output.duration(row.phases[phase]) for phase in PHASES),
            *(f"{row.speedup[name]:.2f}" if name in row.speedup else "" for name in others),
            *([output.duration(row.cpu_seconds)] if processor else []),
            *(f"{row.cpu_speedup[name]:.2f}" if name in row.cpu_speedup else "" for name in others if processor),
            output.size(row.peak_bytes),
            output.size(row.held_bytes) if row.held_bytes else "",
        )
    output.print_wide(console, table)
    for row in rows:
        if row.status != "ok":
            console.print(f"  {row.policy} {row.status}: {row.note}", style="red", highlight=False, soft_wrap=True)
        elif row.layers:
            console.print(f"  {row.policy}: {row.layers}", style="dim", highlight=False, soft_wrap=True)
