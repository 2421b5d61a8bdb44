"""How much a cheap gradient teaches: policies of `loge.apply` against exact LoRA on a real model and real text.

Every policy of a seed starts from the same adapters and sees the same batches in the same order; seeds differ in both
and in the choice of text. Of each it is measured: the cosine and the norm ratio of the adapters' gradient with the
exact one on a held-out batch, whole and layer by layer; the held-out loss over the steps, and what share of exact
LoRA's gain that is; the backward flops of the frozen products, and the seconds.

With the forward counted as much as the exact backward of the frozen products, a step of cost c takes (1 + c) / 2 of an
exact one: the control is exact LoRA with so many fewer steps, its schedule shortened with them.

A file given as `json` is kept up to date after every run, and what it holds is not run again; several processes may
work on one file, each with its own seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loge_kernels.command_line import check_counts
from loge_kernels.finetune import FinetuneOptions
from loge_kernels.finetune.options import choose_device, choose_dtype
from loge_kernels.finetune.training import PARTS

from . import fidelity_file as file
from . import fidelity_report as report
from . import output
from .environment import describe
from .fidelity_policies import DEFAULTS, EXACT, FidelityPolicy, parse
from .fidelity_training import Workbench

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityOptions:
    """What is compared, on what, for how long.

    policies: as in `fidelity_policies`; empty: its list; exact LoRA is always run.   seeds: each policy is trained once
    with each.
    model, text, steps, batch, seq, lr, lora_rank, dtype, device: as in `FinetuneOptions`.
    schedule: "constant" or "cosine", which ends at zero; warmup: steps before the learning rate is all there.
    checkpoints: how often, evenly, the held-out loss is taken.   heldout, calibration: sequences of each.
    gradient_steps: exact steps, at the whole learning rate, before the gradients are compared.
    together: a step of every policy in turn instead of one run after the other, so that their seconds compare.
    json: the file of results, gone on with if it is there.   csv: file for the means over the seeds, a line a policy.
    png: file to draw into.
    """

    policies: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    model: str | None = None
    text: Sequence[Path] = ()
    steps: int = 50
    batch: int = 4
    seq: int = 256
    lr: float = 5e-4
    schedule: str = "constant"
    warmup: int = 0
    lora_rank: int = 8
    checkpoints: int = 5
    heldout: int = 16
    calibration: int = 8
    gradient_steps: int = 5
    dtype: str = "auto"
    device: str = "auto"
    together: bool = False
    json: Path | None = None
    csv: Path | None = None
    png: Path | None = None

    def check(self) -> None:
        """Raise ValueError where a value cannot work, whatever the model."""
        if not self.seeds:
            raise ValueError("--seed names no seed; give at least one")
        check_counts(self, "checkpoints", "heldout", "calibration", "gradient_steps")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"--schedule {self.schedule!r}: choose {' or '.join(SCHEDULES)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: give a number of steps in [0, {self.steps})")
        self.training().check()
        output.check_writable(self.json, self.csv, self.png)

    def training(self) -> FinetuneOptions:
        """What of it a training run takes; the seed is replaced run by run."""
        names = ("model", "text", "steps", "batch", "seq", "lr", "lora_rank")
        device = choose_device(self.device)
        dtype = str(choose_dtype(self.dtype, device)).removeprefix("torch.")
        values = {name: getattr(self, name) for name in names}
        return FinetuneOptions(**values, dtype=dtype, device=str(device), seed=min(self.seeds, default=0))

    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to stand in one table, as JSON values."""
        settings = output.without_files(dataclasses.asdict(self))
        for name in ("policies", "seeds", "together"):
            del settings[name]
        training = self.training()
        return settings | {
            "text": [str(path) for path in self.text],
            "dtype": training.dtype,
            "device": torch.device(training.device).type,
        }


def run(options: FidelityOptions, console: Console | None = None, progress: Console | None = None) -> dict[str, Any]:
    """Run what `options.json` does not hold yet, print the table, write the files, and return what the JSON holds.

    Raises:
        ValueError, TypeError: an argument that cannot work, named; a policy that `loge.apply` refuses; a file with
            other settings. What was measured before stays in the file.
    """
    # Exact LoRA comes first, asked for or not: the others are measured by it.
    parsed = [parse(text) for text in (EXACT, *(options.policies or DEFAULTS))]
    policies = list({policy.text: policy for policy in parsed}.values())
    options.check()
    result = file.begin(options.json, options.settings())
    pending = [
        (seed, policy) for seed in options.seeds for policy in policies if file.find(result, policy.text, seed) is None
    ]
    if pending:
        with torch.random.fork_rng([] if options.training().device == "cpu" else None):
            _measure(options, result, policies, pending, progress or Console(stderr=True))
    result["summary"] = report.summarise(result)
    report.print_table(console or Console(), result)
    if options.csv is not None:
        output.write_csv(report.csv_lines(result), options.csv)
    if options.png is not None:
        report.plot(result, options.png)
    return result


def _measure(
    options: FidelityOptions,
    result: dict[str, Any],
    policies: list[FidelityPolicy],
    pending: list[tuple[int, FidelityPolicy]],
    console: Console,
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
    result["model"] = bench.name
    result["text"] = bench.source
    if "heldout_before" not in result:
        result["heldout_before"] = bench.before()
    whole = _checkpoints(options)
    controls = [policy.steps(options.steps) for policy in policies if policy.same_cost is not None]
    number = 0
    for seed, group in _groups(pending, options.together):
        file.take_over(result, options.json)
        # What another process has run in the meantime is left out.
        group = [policy for policy in group if file.find(result, policy.text, seed) is None]
        copied = {policy.text: row for policy in group if (row := _prefix(policy, result, seed, options)) is not None}
        trained = [policy for policy in group if policy.text not in copied]
        if trained:
            console.print(f"run {number + 1} of {len(pending)}:", highlight=False, end=" ")
            # At a constant rate fewer steps are the first steps of the whole run.
            more = controls if _prefixes(options) and any(policy.text == EXACT for policy in trained) else []
            copied |= {row["policy"]: row for row in bench.run(trained, seed, {*whole, *more})}
        number += len(group)
        result["calibration_seconds"] |= bench.calibration_seconds
        for policy in group:
            row = copied[policy.text] | {"family": policy.family}
            file.add(result, row, options.json)
            after = f"{row['curve'][-1]['heldout']:.4f}" if row["curve"] else row["note"]
            console.print(f"{policy.text}, seed {seed}: held-out loss {after}", highlight=False, markup=False)


def _groups(pending: list[tuple[int, FidelityPolicy]], together: bool) -> Iterator[tuple[int, list[FidelityPolicy]]]:
    """The runs of each seed that take turns, or every run by itself."""
    for seed, runs in itertools.groupby(pending, key=lambda run: run[0]):
        policies = [policy for _, policy in runs]
        yield from [(seed, policies)] if together else ((seed, [policy]) for policy in policies)


def _checkpoints(options: FidelityOptions) -> set[int]:
    """Evenly spread, the last step among them."""
    count = min(options.checkpoints, options.steps)
    return {math.ceil(options.steps * (i + 1) / count) for i in range(count)}


def _prefixes(options: FidelityOptions) -> bool:
    return options.schedule == "constant" and options.warmup == 0


def _prefix(
    policy: FidelityPolicy, result: dict[str, Any], seed: int, options: FidelityOptions
) -> dict[str, Any] | None:
    """The control `policy` as the first steps of exact LoRA, where those are the same and were evaluated."""
    exact = file.find(result, EXACT, seed)
    if policy.same_cost is None or exact is None:
        return None
    steps = policy.steps(options.steps)
    curve = [point for point in exact["curve"] if point["step"] <= steps]
    if not _prefixes(options) or exact["status"] != "ok" or not curve or curve[-1]["step"] != steps:
        return None
    return exact | {
        "policy": policy.text,
        "note": f"the first {steps} steps of {EXACT}",
        "total_time": steps / options.steps,
        "steps": steps,
        "curve": curve,
        **{name: exact[name][:steps] for name in ("losses", "cpu_seconds", *(f"{part}_seconds" for part in PARTS))},
    }
