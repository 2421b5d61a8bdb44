"""Seconds per training step of a LLaMA-shaped model: PEFT's exact LoRA, the same through this package's op, LoGE.

The model is a `transformers` LlamaForCausalLM with random weights and LoRA on every linear of its blocks. The three
share the frozen weights and start from the same adapters; a round is one step (forward, backward, AdamW) of each.
Random weights have flat spectra, which changes what is learnt and not how long it takes; the factors are those of a
random subspace, which takes seconds where a decomposition takes minutes.

Defaults: the dimensions of a 1.1B LLaMA (hidden 2048, 32 heads) cut from 22 to 4 layers. With the full vocabulary of
32,000 the head would do a quarter of the flops of so shallow a model, against 6 % in the whole one, and neither method
touches it; so the vocabulary is cut in the same proportion, to 32,000 · 4/22 ≈ 5,824.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import loge_kernels as loge

from . import output
from .environment import describe
from .memory import with_peak_memory
from .micro import DTYPES, pick_device, resolve_dtype
from .roofline import Ceilings, measure_ceilings
from .timing import Timing, TimingOptions, clock_for, interleave

METHODS = ("peft", "exact", "loge")
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The model, the batch and how long to measure.

    hidden, intermediate, layers, heads, kv_heads, vocab: the LLaMA configuration; kv_heads None for as many as heads.
    batch, seq: sequences a step and tokens a sequence.
    rank: R of the low-rank backward, an int or a share in (0, 1] of min(N, K).
    lora_rank: P, on every linear of the blocks; alpha = 2P, no dropout.
    dtypes: of weights and activations, each measured on its own.
    adapter_dtype: "same" as the model, the stricter comparison, or "float32", PEFT's default for 16-bit models.
    methods: any of "peft" (exact LoRA), "exact" (the same through this package's op), "loge".
    backend: of this package's op; None for the one in force.
    device: "auto", "cpu", "cuda", "cuda:1", …
    budget: seconds of measured rounds per dtype; at least three rounds are run, and a method whose step takes longer
        than a quarter of this runs a single one.
    slow_limit: PEFT is not run where its step is predicted to take longer than this many seconds.
    seed: of weights, adapters and tokens.
    json: file to write.
    """

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 4
    heads: int = 32
    kv_heads: int | None = None
    vocab: int = 5824
    batch: int = 2
    seq: int = 512
    rank: int | float = 1 / 16
    lora_rank: int = 16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    adapter_dtype: str = "same"
    methods: tuple[str, ...] = METHODS
    backend: str | None = None
    device: str = "auto"
    budget: float = 120.0
    slow_limit: float = 180.0
    seed: int = 0
    json: Path | None = None


@dataclass(slots=True)
class StepRow:
    """One method in one dtype; `status` is "ok", "wrong result" or "not run"."""

    method: str
    dtype: str
    status: str
    note: str = ""
    runs: int = 0
    seconds: float | None = None  # of a step, median
    p10: float | None = None
    p90: float | None = None
    phases: dict[str, float] = field(default_factory=dict)  # median seconds of forward, backward, optimizer
    speedup: dict[str, float] = field(default_factory=dict)  # over the other methods
    loss: float | None = None  # of the first step
    peak_bytes: int | None = None  # of the first step, above weights and adapters
    factor_bytes: int = 0


class Trainer:
    """One method's model and optimizer; `step()` is what is timed."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor) -> None:
        self.model = model
        self._tokens = tokens
        self.adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self.adapters.values(), lr=1e-4)
        self.phases: list[tuple[float, ...]] = []  # seconds, one entry a step
        self.first_gradients: dict[str, torch.Tensor] = {}

    def step(self) -> float:
        """One training step; its loss. A step is long: waiting for the device between its phases costs nothing."""
        marks = [self._now()]
        loss = self.model(input_ids=self._tokens, labels=self._tokens).loss
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self._optimizer.step()
        if not self.phases:
            self.first_gradients = {name: p.grad for name, p in self.adapters.items() if p.grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        marks.append(self._now())
        self.phases.append(tuple(b - a for a, b in pairwise(marks)))
        return loss.item()

    def _now(self) -> float:
        if self._tokens.device.type == "cuda":
            torch.cuda.synchronize(self._tokens.device)
        return time.perf_counter()


def run(options: StepOptions, console: Console | None = None) -> dict[str, Any]:
    """Measure every dtype, print a table for each, write the file asked for; the JSON-able report is returned.

    "rows" holds `StepRow`s as dicts; "passed" is False when a method gave a wrong result. Raises ValueError, with the
    argument named, before anything is measured.
    """
    console = console or Console()
    device = pick_device(options.device)
    _check(options)
    output.check_writable(options.json)
    report: dict[str, Any] = {
        "benchmark": "step",
        "environment": describe(device),
        "options": output.without_files(asdict(options)),
        "factors": "random subspace",
        "ceilings": {},
        "rows": [],
    }
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring the ceilings of this device", total=None)
        dtypes = [resolve_dtype(name) for name in options.dtypes]
        ceilings = {dtype: measure_ceilings(device, DTYPES[dtype]) for dtype in dtypes}
        report["ceilings"] = {dtype: ceiling.to_dict() for dtype, ceiling in ceilings.items()}
        output.print_heading(console, report)
        for dtype in dtypes:
            tell = partial(_describe, progress, task)
            rows = measure(options, dtype, device, ceilings[dtype], tell)
            _print(console, options, dtype, rows)
            report["rows"] += [asdict(row) for row in rows]
            report["passed"] = all(row["status"] != "wrong result" for row in report["rows"])
            output.write(report, options.json)
    return report


def _describe(progress: Progress, task: TaskID, message: str) -> None:
    progress.update(task, description=message)


def _check(options: StepOptions) -> None:
    for name in ("hidden", "intermediate", "layers", "heads", "vocab", "batch", "seq", "lora_rank"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)!r} must be at least 1")
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    if options.hidden % (2 * options.heads) or kv_heads < 1 or options.heads % kv_heads:
        raise ValueError(
            f"hidden={options.hidden}, heads={options.heads}, kv_heads={kv_heads}: "
            "hidden must be a multiple of 2 * heads, and heads of kv_heads"
        )
    for name in options.methods:
        if name not in METHODS:
            raise ValueError(f"methods: {name!r} is unknown; choose from {', '.join(METHODS)}")
    if not options.methods or not options.dtypes:
        raise ValueError("methods and dtypes must not be empty")
    if options.adapter_dtype not in ("same", "float32"):
        raise ValueError(f"adapter_dtype={options.adapter_dtype!r} is unknown; choose 'same' or 'float32'")
    for name in ("budget", "slow_limit"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}={getattr(options, name)!r} must be positive (seconds)")


def build(options: StepOptions, dtype: torch.dtype, device: torch.device) -> dict[str, Trainer]:
    """A trainer per method: frozen weights shared, adapters equal, B not zero so that every gradient counts."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ValueError(
            f"bench step needs PEFT and transformers (pip install 'loge_kernels[peft]'): {error}"
        ) from error
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=max(2048, options.seq),
        use_cache=False,
        tie_word_embeddings=False,
    )
    lora = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules=_TARGETS)
    base = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    first: nn.Module = get_peft_model(base, lora, autocast_adapter_dtype=options.adapter_dtype == "float32")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    first.train()
    frozen = {id(p): p for p in first.parameters() if not p.requires_grad}
    tokens = torch.randint(options.vocab, (options.batch, options.seq), device=device)
    trainers = {}
    for method in options.methods:
        model = copy.deepcopy(first, dict(frozen))
        if method != "peft":
            # At full rank the dense product is cheaper in every layer, and `apply` keeps it: the exact mode.
            rank = options.rank if method == "loge" else 1.0
            loge.apply(model, rank=rank, subspace="random", backend=options.backend)
        trainers[method] = Trainer(model, tokens)
    return trainers


def measure(
    options: StepOptions,
    dtype: str,
    device: torch.device,
    ceilings: Ceilings,
    progress: Callable[[str], None] | None = None,
) -> list[StepRow]:
    """The rows of one dtype, in the order of `options.methods`."""
    tell = progress or (lambda message: None)
    tell(f"{dtype}: building the model")
    trainers = build(options, DTYPES[dtype], device)
    rows = {method: StepRow(method, dtype, "not run") for method in options.methods}
    predicted = _predicted_peft_seconds(options, ceilings)
    if "peft" in trainers and predicted > options.slow_limit:
        rows["peft"].note = (
            f"about {predicted:.0f} s a step with torch's own {dtype} products, "
            f"over the limit of {options.slow_limit:.0f} s"
        )
        del trainers["peft"]
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}

    def around_first(name: str, call: Callable[[], Any]) -> Any:
        result, peaks[name] = with_peak_memory(call, device)
        return result

    timings = interleave(
        {name: trainer.step for name, trainer in trainers.items()},
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
        _fill(row, trainer, timing)
        row.loss, row.peak_bytes = losses[name], peaks[name]
    _verify(rows, trainers, losses, DTYPES[dtype])
    for name, row in rows.items():
        others = [other for other in rows if other != name and rows[other].status == "ok"]
        if row.status == "ok":
            row.speedup = {other: timings[name].faster_than(timings[other]) for other in others}
    return list(rows.values())


def _fill(row: StepRow, trainer: Trainer, timing: Timing) -> None:
    row.status = "ok"
    row.runs, row.seconds = timing.runs, timing.median
    row.p10, row.p90 = timing.quantile(0.1), timing.quantile(0.9)
    if timing.cold:
        row.note = "1 run, no warm-up"
    steps = torch.tensor(trainer.phases[-timing.runs :], dtype=torch.float64)
    row.phases = dict(zip(_PHASES, steps.quantile(0.5, dim=0).tolist(), strict=True))
    held = {id(p): p for m in trainer.model.modules() if isinstance(m, loge.Factors) for p in m.parameters()}
    row.factor_bytes = sum(p.numel() * p.element_size() for p in held.values())


def _predicted_peft_seconds(options: StepOptions, ceilings: Ceilings) -> float:
    """A rough step time of PEFT from the measured rates of torch's own products; attention is left out."""
    kv = options.hidden * (options.kv_heads or options.heads) // options.heads
    block = 2 * options.hidden * (options.hidden + kv) + 3 * options.hidden * options.intermediate
    weights = options.layers * block + options.vocab * options.hidden
    flops = 2 * options.batch * options.seq * weights
    return flops / ceilings.plain_nt + flops / ceilings.plain_nn


def _verify(
    rows: dict[str, StepRow], trainers: dict[str, Trainer], losses: dict[str, float], dtype: torch.dtype
) -> None:
    """No figure for a wrong step: the first loss must be the same for every method, for the forward is exact; and so
    must the adapter gradients above the first approximated product: those of the last block's down projection, or all
    of them for the exact methods."""
    done = [name for name in rows if rows[name].status == "ok"]
    if not done:
        return
    base = done[0]
    # Relative: rounding of activations through a few layers.
    tolerance = 0.03 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in trainers[base].adapters)
    for name in done:
        everything = "loge" not in (name, base)
        worst, where = abs(losses[name] - losses[base]) / max(abs(losses[base]), 1e-30), "loss"
        if not math.isfinite(losses[name]):
            worst = math.inf
        for key, parameter in trainers[name].first_gradients.items():
            if everything or f".layers.{last}.mlp.down_proj." in key:
                expected = trainers[base].first_gradients[key]
                error = ((parameter - expected).norm() / expected.norm()).item()
                if not error <= worst:
                    worst, where = error, f"gradient of {key}"
        if not worst <= tolerance:
            rows[name].status = "wrong result"
            rows[name].note = f"{where}: differs from {base} by {worst:.1e}, allowed {tolerance:.0e}"


def _print(console: Console, options: StepOptions, dtype: str, rows: list[StepRow]) -> None:
    console.print(
        f"\n[bold]LLaMA-shaped: hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocab}, "
        f"{options.batch} x {options.seq} tokens, R = {options.rank:g}, P = {options.lora_rank}, {dtype}[/bold]",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    others = [method for method in METHODS if any(method in row.speedup for row in rows)]
    for heading in ("step", "p10-p90", "runs", *_PHASES, *(f"x {name}" for name in others), "peak", "factors"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.status != "ok":
            table.add_row(row.method, f"[red]{row.status}[/red]")
            continue
        spread = f"{output.duration(row.p10)}-{output.duration(row.p90)}" if row.runs > 1 else "cold"
        table.add_row(
            row.method,
            output.duration(row.seconds),
            spread,
            str(row.runs),
            *(output.duration(row.phases[phase]) for phase in _PHASES),
            *(f"{row.speedup[name]:.2f}" if name in row.speedup else "" for name in others),
            output.size(row.peak_bytes),
            output.size(row.factor_bytes) if row.factor_bytes else "",
        )
    output.print_wide(console, table)
    for row in rows:
        if row.status != "ok":
            console.print(f"  {row.method} {row.status}: {row.note}", style="red", highlight=False, soft_wrap=True)
