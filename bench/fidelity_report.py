"""What the runs of `bench fidelity` say together: means over the seeds, the table, the plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import output
from .fidelity_policies import EXACT, parse, total_time

_LEGEND = (
    "cost: backward flops of the frozen products against dense, 8 bits counted half. total: time against exact LoRA's, "
    "the forward counted. cosine, norm: of the gradient of a step through the factors, against the exact one. "
    "recovered: share of exact LoRA's gain in held-out loss, mean and range of the seeds. exact in: what exact LoRA "
    "recovers with fewer steps in the same total time. reaches: the total time at which the held-out loss was first "
    "found at or below exact LoRA's last. CPU: seconds of all cores in a step, which other work on the machine changes "
    "less than the clock's."
)
_MAX_CURVES = 8  # lines that a panel of losses can hold


def summarise(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a policy, means over its seeds. "recovered" is the share of the gain that exact LoRA makes with the
    same seed, null where the run diverged; "control" is what exact LoRA recovers in the same total time."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["policy"], []).append(row)
    entries = [_entry(policy, own, result) for policy, own in rows.items()]
    exact = [entry for entry in entries if parse(entry["policy"]).same_cost is not None or entry["policy"] == EXACT]
    points = sorted((entry["total_time"], entry["recovered"]) for entry in exact if entry["recovered"] is not None)
    for entry in entries:
        entry["control"] = _interpolated(points, entry["total_time"])
    return entries


def csv_lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary as flat lines, with what identifies the runs on each."""
    settings = result["settings"]
    names = ("batch", "seq", "lr", "schedule", "warmup", "lora_rank", "dtype")
    about = {name: settings[name] for name in names} | output.identity(result["environment"])
    about = {"model": result["model"], "heldout_before": result["heldout_before"], **about}
    return [{**entry, "seeds": " ".join(map(str, entry["seeds"])), **about} for entry in result["summary"]]


def recovered(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """The share of exact LoRA's gain; None where either has no end."""
    exact = _exact(row, result)
    if exact is None or any(each["status"] != "ok" for each in (row, exact)):
        return None
    before = result["heldout_before"]
    gain = before - exact["curve"][-1]["heldout"]
    return (before - row["curve"][-1]["heldout"]) / gain if gain > 0 else None


def reaches(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """The total time, in exact LoRA's, at which the held-out loss was first found at or below exact LoRA's last one of
    the same seed; None where it never was."""
    exact = _exact(row, result)
    if exact is None or exact["status"] != "ok":
        return None
    last = exact["curve"][-1]["heldout"]
    found = (point["step"] for point in row["curve"] if point["heldout"] <= last)
    step = next(found, None)
    return None if step is None else step * total_time(row["cost"]) / result["settings"]["steps"]


def _exact(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any] | None:
    return next((each for each in result["rows"] if (each["policy"], each["seed"]) == (EXACT, row["seed"])), None)


def _entry(policy: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
    shares = [share for row in rows if (share := recovered(row, result)) is not None]
    there = [time for row in rows if (time := reaches(row, result)) is not None]
    ended = [row["curve"][-1]["heldout"] for row in rows if row["status"] == "ok"]
    medians = [row["typical_seconds"] for row in rows if "typical_seconds" in row]
    gradients = [row["gradient"]["all"] for row in rows]
    return {
        "policy": policy,
        "family": rows[0]["family"],
        "seeds": [row["seed"] for row in rows],
        "diverged": sum(row["status"] != "ok" for row in rows),
        "steps": rows[0]["steps"],
        "cost": _mean([row["cost"] for row in rows]),
        "total_time": _mean([row["total_time"] for row in rows]),
        "cosine": _mean([gradient["cosine"] for gradient in gradients]),
        "norm_ratio": _mean([gradient["norm_ratio"] for gradient in gradients]),
        "heldout": _mean(ended),
        "recovered": _mean(shares),
        "recovered_min": min(shares, default=None),
        "recovered_max": max(shares, default=None),
        # Of the seeds that got there; the others say so by being fewer.
        "reaches": _mean(there),
        "reached_by": len(there),
        **{f"{part}_seconds": _mean([each[part] for each in medians]) for part in ("backward", "step")},
        "cpu_seconds": _mean([statistics.median(row["cpu_seconds"]) for row in rows if row["cpu_seconds"]]),
        "training_seconds": _mean([row["curve"][-1]["seconds"] for row in rows if row["curve"]]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _interpolated(points: list[tuple[float, float]], x: float) -> float | None:
    """Between two neighbours of sorted `points`; None outside."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def print_table(console: Console, result: dict[str, Any]) -> None:
    """The means, in the order of the backward's cost."""
    settings = result["settings"]
    environment = result["environment"]
    console.print(
        f"[bold]{result['model']}[/bold], LoRA rank {settings['lora_rank']}, {settings['steps']} steps of "
        f"{settings['batch']} x {settings['seq']} tokens, AdamW {settings['lr']:g} ({settings['schedule']}), "
        f"{settings['dtype']} on {environment['device']}; text: {result['text']}; held-out loss before: "
        f"{result['heldout_before']:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    headings = (
        "cost",
        "total",
        "cosine",
        "norm",
        "held-out",
        "recovered",
        "seeds",
        "exact in",
        "reaches",
        "backward",
        "step",
        "CPU",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in sorted(result["summary"], key=lambda entry: (entry["cost"], entry["total_time"])):
        spread = ""
        if entry["recovered"] is not None and len(entry["seeds"]) > 1:
            spread = f"{entry['recovered_min']:.1%} to {entry['recovered_max']:.1%}"
        share = _percent(entry["recovered"])
        if entry["diverged"]:
            share += f" [red]{entry['diverged']} diverged[/red]"
        table.add_row(
            entry["policy"],
            f"{entry['cost']:.2f}",
            f"{entry['total_time']:.2f}",
            f"{entry['cosine']:.3f}",
            f"{entry['norm_ratio']:.2f}",
            "" if entry["heldout"] is None else f"{entry['heldout']:.4f}",
            share,
            spread,
            _percent(entry["control"]),
            _reached(entry),
            output.duration(entry["backward_seconds"]),
            output.duration(entry["step_seconds"]),
            output.duration(entry["cpu_seconds"]),
        )
    output.print_wide(console, table)
    console.print(_LEGEND, style="dim", highlight=False, soft_wrap=True)


def _reached(entry: dict[str, Any]) -> str:
    if entry["reaches"] is None:
        return ""
    few = f" ({entry['reached_by']} of {len(entry['seeds'])})" if entry["reached_by"] < len(entry["seeds"]) else ""
    return f"{entry['reaches']:.2f}{few}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def plot(result: dict[str, Any], path: Path) -> None:
    """The frontier, learning recovered against backward flops, and the loss against seconds, measured and counted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    frontier, measured, counted = figure.subplots(1, 3)
    _frontier(frontier, result)
    chosen = _curves(result["summary"])
    for axes, unit in ((measured, "seconds"), (counted, "exact steps")):
        for number, policy in enumerate(chosen):
            _curve(axes, result, policy, f"C{number}", unit)
        axes.set(ylabel="held-out loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    apart = "" if all(row.get("together") for row in result["rows"] if row["policy"] in chosen) else ", run by run"
    measured.set(xlabel="seconds of training, measured", title=f"by time on this machine{apart}")
    counted.set(xlabel="time in exact LoRA's steps: (1 + cost) / 2 a step", title="by flops, forward and backward")
    settings = result["settings"]
    figure.suptitle(
        f"{result['model']}, LoRA rank {settings['lora_rank']}, {settings['steps']} steps of {settings['batch']} x "
        f"{settings['seq']} tokens, {settings['dtype']} on {result['environment']['device']}",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _frontier(axes: Any, result: dict[str, Any]) -> None:
    """Each seed a dot, the means joined within a family. Exact LoRA with fewer steps stands at the cost of the policies
    that take the same total time."""
    families: dict[str, list[dict[str, Any]]] = {}
    for entry in result["summary"]:
        families.setdefault(entry["family"], []).append(entry)
    lowest = 0.0
    for number, (family, entries) in enumerate(families.items()):
        style = {"color": f"C{number % 10}", "marker": "os^D"[number // 10 % 4]}
        policies = {entry["policy"]: _position(entry) for entry in entries}
        dots = [
            (policies[row["policy"]], share)
            for row in result["rows"]
            if row["policy"] in policies and (share := recovered(row, result)) is not None
        ]
        if not dots:
            continue
        lowest = min(lowest, *(share for _, share in dots))
        axes.scatter(*zip(*dots, strict=True), s=14, alpha=0.5, **style)
        means = sorted((_position(entry), entry["recovered"]) for entry in entries if entry["recovered"] is not None)
        axes.plot(*zip(*means, strict=True), linewidth=1.2, markersize=4, label=family, **style)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_ylim(max(lowest, -0.5) - 0.05, None)
    axes.set(xlabel="backward flops of the frozen products, dense = 1", ylabel="share of exact LoRA's gain")
    axes.set_title("learning recovered")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _position(entry: dict[str, Any]) -> float:
    cost = parse(entry["policy"]).same_cost
    return float(entry["cost"] if cost is None else cost)


def _curves(summary: list[dict[str, Any]]) -> list[str]:
    """Exact LoRA, then the policies that recover most, each above what exact LoRA makes of the same time first."""
    ranked = [entry for entry in summary if entry["recovered"] is not None and entry["policy"] != EXACT]
    ranked = [entry for entry in ranked if parse(entry["policy"]).same_cost is None]
    ranked.sort(key=lambda entry: entry["recovered"] - (entry["control"] or 0.0), reverse=True)
    return [EXACT, *(entry["policy"] for entry in ranked[: _MAX_CURVES - 1])]


def _curve(axes: Any, result: dict[str, Any], policy: str, colour: str, unit: str) -> None:
    """Every seed thin, the mean of those with all points thick."""
    rows = [row for row in result["rows"] if row["policy"] == policy and row["status"] == "ok"]
    lines = []
    for row in rows:
        scale = total_time(row["cost"])
        x = [0.0] + [point["seconds"] if unit == "seconds" else point["step"] * scale for point in row["curve"]]
        lines.append((x, [result["heldout_before"], *(point["heldout"] for point in row["curve"])]))
        axes.plot(*lines[-1], color=colour, linewidth=0.6, alpha=0.4)
    steps = {tuple(point["step"] for point in row["curve"]) for row in rows}
    if len(steps) == 1:
        x, y = ([statistics.fmean(values) for values in zip(*part, strict=True)] for part in zip(*lines, strict=True))
        axes.plot(x, y, color=colour, marker=".", label=policy)
