"""What the runs of `bench classify` say together: means over the seeds, their standard errors, the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..measure import output
from ..policies import PEFT
from .options import WARMUP

_LEGEND = (
    "accuracy: in %, of held-out snippets, mean of the seeds ± its standard error. to peft: points of accuracy above "
    "exact LoRA with the same seed, likewise. step, CPU (of all cores): median seconds of a step. x peft: PEFT's CPU "
    "seconds over the policy's, median of the steps. set-up: seconds of calibration and factors."
)


def conclude(result: dict[str, Any], chance: float) -> None:
    """Add to `result` the summary, and whether it "passed": every loss is finite, and exact LoRA came a quarter of the
    way at least from `chance` to all."""
    rows = result["rows"]
    exact = {row["seed"]: row for row in rows if row["policy"] == PEFT}
    policies = dict.fromkeys(row["policy"] for row in rows)
    result["chance"] = chance
    result["summary"] = [_entry([row for row in rows if row["policy"] == policy], exact) for policy in policies]
    learnt = statistics.fmean(row["accuracy"] for row in exact.values()) > chance + (1 - chance) / 4
    result["passed"] = learnt and all(math.isfinite(row["loss"]) for row in rows)


def _entry(rows: list[dict[str, Any]], exact: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One policy, over its seeds."""
    ratios = [
        theirs / ours
        for row in rows
        if PEFT in row["beside"]
        for theirs, ours in zip(_timed(exact[row["seed"]], "cpu_seconds"), _timed(row, "cpu_seconds"), strict=True)
    ]
    return {
        "policy": rows[0]["policy"],
        "seeds": [row["seed"] for row in rows],
        "accuracy": mean_and_error([row["accuracy"] for row in rows]),
        "difference": mean_and_error([row["accuracy"] - exact[row["seed"]]["accuracy"] for row in rows]),
        "loss": statistics.fmean(row["loss"] for row in rows),
        "seconds": statistics.median(value for row in rows for value in _timed(row, "seconds")),
        "cpu_seconds": statistics.median(value for row in rows for value in _timed(row, "cpu_seconds")),
        "speedup": statistics.median(ratios) if ratios else None,  # of steps in turn with PEFT's
        "set_up_seconds": statistics.fmean(row["set_up_seconds"] for row in rows),
    }


def _timed(row: dict[str, Any], name: str) -> list[float]:
    return list(row[name][WARMUP:])


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its standard error; None for one value, which has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}


def print_table(console: Console, result: dict[str, Any]) -> None:
    """One line a policy, then what `apply` said of each."""
    settings, names = result["settings"], ", ".join(result["packages"])
    question = {
        "package": f"which of {names} a snippet is from",
        "follows": f"whether a piece of code follows another in {names}",
    }[settings["task"]]
    seeds = ", ".join(map(str, dict.fromkeys(row["seed"] for row in result["rows"])))
    console.print(
        f"[bold]{result['model']}[/bold], {question} (chance: {result['chance']:.0%}); {settings['steps']} steps of "
        f"{settings['batch']} x {settings['seq']} tokens, LoRA rank {settings['lora_rank']}; seeds {seeds}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)  # within 80 columns
    table.add_column("policy", no_wrap=True)
    for heading in ("accuracy", "to peft", "loss", "step", "CPU", "x peft", "set-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in result["summary"]:
        table.add_row(
            entry["policy"],
            _percent(entry["accuracy"], ".1f"),
            "" if entry["policy"] == PEFT else _percent(entry["difference"], "+.1f"),
            f"{entry['loss']:.3f}",
            f"{entry['seconds']:.3g}",
            f"{entry['cpu_seconds']:.3g}",
            "" if entry["speedup"] is None else f"{entry['speedup']:.2f}",
            f"{entry['set_up_seconds']:.3g}",
        )
    output.print_wide(console, table)
    console.print(_LEGEND, style="dim", highlight=False)
    said = {row["policy"]: row["summary"] for row in result["rows"] if row["summary"]}
    for policy, summary in said.items():
        console.print(f"  {policy}: {summary}", style="dim", highlight=False, soft_wrap=True)


def _percent(value: dict[str, Any], form: str) -> str:
    error = "" if value["error"] is None else f" ± {100 * value['error']:.1f}"
    return f"{100 * value['mean']:{form}}{error}"
