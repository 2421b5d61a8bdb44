"""How soon each policy of `loge.apply` reaches exact LoRA's held-out loss, on a real model and real text.

Every policy of a seed starts from the same adapters and sees the same batches in the same order; seeds differ in both
and in the choice of text. A step of each policy is taken in turn, so that whatever else the machine does slows all of
them alike. Read off each held-out curve is when it first comes to 50, 75, 90 and 100 % of the gain that exact LoRA
makes in the whole run: in measured seconds, in seconds of all cores, and in seconds that a named GPU is predicted to
need (`on_paper`). Beside it: the cosine and norm of the gradient of a low-rank backward with the exact one, and the
share of exact LoRA's gain at the end, which says little of time.

A file given as `json` is kept up to date after every seed, and what it holds is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Option

from loge_kernels.command_line import WHOLE, Device, Resumed, Text, check_counts
from loge_kernels.finetune import FinetuneOptions
from loge_kernels.machine import choose_device, choose_dtype

from ..measure import output
from ..measure.environment import describe
from ..measure.resuming import begin
from ..policies import LONGEST, PEFT, Policy, parse_all
from . import hopper, report
from .training import Workbench

DEFAULTS = (
    PEFT,
    "apply",
    "exact",
    "base_dtype=int8",
    "rank=1/16,exact_layers=0.75",
    "rank=1/4,exact_layers=0.5",
    "rank=1/4",
)
SCHEDULES = ("constant", "cosine")
VERSION = 2  # of the file; 1 had policies that are no more
_OLDER = {"fast_accumulation": False}  # which older files do not name


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityOptions:
    """What is compared, on what, for how long."""

    policies: Annotated[
        Sequence[str],
        Option(
            "--policy",
            help='What to compare with peft, repeated: apply, exact, arguments of apply ("rank=1/8,exact_layers=0.5"), '
            'or the controls random:rank=1/8 and dropped; ",steps=1.2" at the end for more steps. Default: a list.',
        ),
        WHOLE,
    ] = ()
    seeds: Annotated[Sequence[int], Option("--seed", help="Of adapters, batches and choice of text: a list.")] = (
        0,
        1,
        2,
    )
    model: Annotated[
        str | None, Option(help="A directory, a .gguf file or a hub id; default: SmolLM2-135M-Instruct.")
    ] = None
    text: Text = ()
    steps: Annotated[int, Option(help="Optimizer steps of each run.")] = 50
    batch: Annotated[int, Option(help="Sequences a step.")] = 4
    seq: Annotated[int, Option(help="Tokens a sequence.")] = 256
    lr: Annotated[float, Option(help="AdamW's learning rate.")] = 5e-4
    schedule: Annotated[str, Option(help="Of the learning rate: constant, or cosine to zero.")] = "constant"
    warmup: Annotated[int, Option(help="Steps in which the learning rate rises.")] = 0
    lora_rank: Annotated[int, Option(help="Rank of the adapters, on every linear of the blocks.")] = 8
    checkpoints: Annotated[int, Option(help="How often the held-out loss is taken in a run, early on more often.")] = 12
    heldout: Annotated[int, Option(help="Held-out sequences.")] = 16
    calibration: Annotated[int, Option(help="Sequences to calibrate on.")] = 8
    gradient_steps: Annotated[int, Option(help="Exact steps before the gradients are compared.")] = 5
    dtype: Annotated[str, Option(help="auto, float32 or bfloat16.")] = "auto"
    device: Device = "auto"
    together: Annotated[
        bool,
        Option(
            "--together/--apart",
            help="A step of every policy in turn, each with what it adds to the model in memory, or one after the "
            "other, whose seconds do not compare.",
        ),
    ] = True
    fast_accumulation: Annotated[
        bool,
        Option(
            "--fast-accumulation",
            help="Take float8 products on a CPU as Hopper's tensor cores do with use_fast_accum; slow, and for its "
            "learning alone.",
        ),
    ] = False
    gpu: Annotated[str, Option(help="Whose seconds are predicted: H100, H200, A100 or B200.")] = "H100"
    paper_model: Annotated[
        str | None,
        Option(help="Predict for this model (LLaMA-3-8B), 2 x 4096 tokens a step; default: for the one trained."),
    ] = None
    json: Resumed = None
    csv: Annotated[Path | None, Option(help="Also write the means over the seeds to this file, as CSV.")] = None
    png: Annotated[Path | None, Option(help="Draw held-out loss against time, measured and predicted.")] = None

    def check(self) -> None:
        """Raise ValueError where a value cannot work, whatever the model."""
        if not self.seeds:
            raise ValueError("--seed names no seed; give at least one")
        check_counts(self, "checkpoints", "heldout", "calibration", "gradient_steps")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"--schedule {self.schedule!r}: choose {' or '.join(SCHEDULES)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: give a number of steps in [0, {self.steps})")
        training = self.training()
        training.check()
        if self.fast_accumulation and training.device != "cpu":
            raise ValueError(f"--fast-accumulation is emulated on a CPU, and --device is {training.device}")
        report.predicted_step(self.gpu, self.paper_model or "LLaMA-3-8B", PEFT)
        output.check_writable(self.json, self.csv, self.png)

    def training(self) -> FinetuneOptions:
        """What of it a training run takes; the seed is replaced run by run."""
        names = ("model", "text", "steps", "batch", "seq", "lr", "lora_rank")
        device = choose_device(self.device, "--device ")
        dtype = str(choose_dtype(self.dtype, device)).removeprefix("torch.")
        values = {name: getattr(self, name) for name in names}
        return FinetuneOptions(**values, dtype=dtype, device=str(device), seed=min(self.seeds, default=0))

    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to stand in one table, as JSON values."""
        settings = output.without_files(dataclasses.asdict(self))
        for name in ("policies", "seeds", "together", "gpu", "paper_model"):
            del settings[name]
        training = self.training()
        return settings | {
            "text": [str(path) for path in self.text],
            "dtype": training.dtype,
            "device": torch.device(training.device).type,
        }


def run(options: FidelityOptions, console: Console | None = None, progress: Console | None = None) -> dict[str, Any]:
    """Run what `options.json` does not hold yet, print the tables, write the files, and return what the JSON holds.

    Raises:
        ValueError, TypeError: an argument that cannot work, named; a policy that `loge.apply` refuses; a file with
            other settings. What was measured before stays in the file.
    """
    # PEFT's exact LoRA comes first, asked for or not: the others are measured by it.
    policies = parse_all((PEFT, *(options.policies or DEFAULTS)))
    options.check()
    result = begin("fidelity", VERSION, options.json, options.settings(), _OLDER)
    result.setdefault("calibration_seconds", {})
    done = {(row["policy"], row["seed"]) for row in result["rows"]}
    pending = [(seed, policy) for seed in options.seeds for policy in policies if (policy.text, seed) not in done]
    if pending:
        accumulation = hopper.emulated() if options.fast_accumulation else contextlib.nullcontext()
        with torch.random.fork_rng([] if options.training().device == "cpu" else None), accumulation:
            _measure(options, result, pending, progress or Console(stderr=True))
    report.conclude(result, options.gpu, options.paper_model)
    output.write(result, options.json)
    report.print_tables(console or Console(), result)
    if options.csv is not None:
        output.write_csv(report.csv_lines(result), options.csv)
    if options.png is not None:
        report.plot(result, options.png)
    return result


def _measure(
    options: FidelityOptions, result: dict[str, Any], pending: list[tuple[int, Policy]], console: Console
) -> None:
    console.print(f"{len(pending)} runs; loading the model ...", highlight=False)
    bench = Workbench(
        options.training(),
        options.schedule,
        options.warmup,
        options.heldout,
        options.calibration,
        options.gradient_steps,
        console,
    )
    text = bench.fingerprint()
    if result.setdefault("text_sha256", text) != text:
        raise ValueError(f"--json {options.json}: the text has changed since its runs; choose another file")
    result["environment"] = describe(bench.device)
    result["model"], result["sizes"] = bench.name, bench.sizes()
    result["text"] = bench.source
    if "heldout_before" not in result:
        result["heldout_before"] = bench.before()
    for seed, runs in itertools.groupby(pending, key=lambda each: each[0]):
        policies = [policy for _, policy in runs]
        for group in [policies] if options.together else [[policy] for policy in policies]:
            result["rows"] += bench.run(group, seed, _checkpoints(options))
            result["calibration_seconds"] |= bench.calibration_seconds
            output.write(result, options.json)
            for row in result["rows"][-len(group) :]:
                after = f"{row['curve'][-1]['heldout']:.4f}" if row["curve"] else row["note"]
                console.print(f"{row['policy']}, seed {seed}: held-out loss {after}", highlight=False, markup=False)


def _checkpoints(options: FidelityOptions) -> set[int]:
    """The last step among them, and closer together early, where the loss falls fast."""
    count = min(options.checkpoints, options.steps)
    whole = range(1, math.ceil(count * math.sqrt(LONGEST)) + 1)
    return {math.ceil(options.steps * (i / count) ** 2) for i in whole}
