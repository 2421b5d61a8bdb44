"""What the runs of `bench fidelity` say together: the time to exact LoRA's loss, means over the seeds, the plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..measure import output
from ..paper.model import llama
from ..paper.run import step_seconds
from ..policies import PEFT, parse

SHARES = (0.5, 0.75, 0.9, 1.0)  # of exact LoRA's gain
_WHOLE = 0.995  # what counts as all of it: rounding alone moves the last loss by half a per cent of the gain
_UNITS = {
    "seconds": "measured seconds",
    "cpu_seconds": "measured seconds of all cores",
    "predicted_seconds": "predicted seconds",
}
_LEGEND = (
    "to 100%: to within half a per cent of the gain, which rounding moves. never: not within the run. cosine, norm: of "
    "the gradient of a step through the factors, against the exact one. recovered: share of exact LoRA's gain in "
    "held-out loss at the end, mean and range of the seeds; the loss falls fast and then slowly, so it says little of "
    "time. unrounded: the same with the 16-bit weights in the place of the 8 bits that the adapters were trained over. "
    "set-up: seconds of calibration and factors, which no other column counts."
)
_MAX_CURVES = 9  # lines that a panel of losses can hold


def conclude(result: dict[str, Any], gpu: str, paper_model: str | None) -> None:
    """Add to `result` the summary, and the step that each policy is predicted to take on `gpu`: of `paper_model`, or
    of the model trained."""
    settings = result["settings"]
    model: Any = paper_model
    if paper_model is None and result["sizes"] is not None:
        model = llama(**result["sizes"])
    tokens, sequences = (8192, 2) if paper_model else (settings["batch"] * settings["seq"], settings["batch"])
    size = tokens, sequences, (result["sizes"] or {}).get("layers")
    steps = {
        policy: None if model is None else predicted_step(gpu, model, policy, settings["lora_rank"], *size)
        for policy in dict.fromkeys(row["policy"] for row in result["rows"])
    }
    name = paper_model or result["model"]
    result["predicted"] = {"gpu": gpu, "model": name, "tokens": tokens, "sequences": sequences, "step_seconds": steps}
    result["summary"] = [_entry(policy, result) for policy in steps]


def predicted_step(
    gpu: str,
    model: Any,
    policy: str,
    lora_rank: int = 16,
    tokens: int = 8192,
    sequences: int = 2,
    layers: int | None = None,
) -> float | None:
    """Seconds of a step on paper; None for a policy with arguments that it does not know, or that `gpu` cannot run.
    `layers`: of the model that `policy` is for. Raises ValueError for an unknown GPU or model."""
    peft = step_seconds(parse(PEFT).on_paper(), gpu, model, tokens, sequences, lora_rank)
    if policy == PEFT:
        return peft
    try:
        return step_seconds(parse(policy).on_paper(layers), gpu, model, tokens, sequences, lora_rank)
    except ValueError:
        return None


def reached(row: dict[str, Any], before: float, loss: float) -> dict[str, float] | None:
    """The step, the seconds and the CPU seconds at which the held-out loss of `row` first comes to `loss`, between two
    points of its curve in proportion; None where it never does. `before`: the loss at the start."""
    start = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "heldout": before}
    for a, b in pairwise([start, *row["curve"]]):
        if b["heldout"] <= loss:
            part = (a["heldout"] - loss) / (a["heldout"] - b["heldout"]) if a["heldout"] > b["heldout"] else 0.0
            return {unit: a[unit] + max(0.0, part) * (b[unit] - a[unit]) for unit in ("step", "seconds", "cpu_seconds")}
    return None


def _entry(policy: str, result: dict[str, Any]) -> dict[str, Any]:
    """One policy, means over its seeds. "to_loss" has the time to each share of the gain that PEFT's exact LoRA makes
    with the same seed, the mean of the seeds that got there, and how many these were."""
    rows = [row for row in result["rows"] if row["policy"] == policy]
    before, step = result["heldout_before"], result["predicted"]["step_seconds"][policy]
    exact = {
        row["seed"]: row["curve"][-1]["heldout"] for row in result["rows"] if _ended(row) and row["policy"] == PEFT
    }
    gains = {seed: before - loss for seed, loss in exact.items() if loss < before}
    shares = [(before - row["curve"][-1]["heldout"]) / gains[row["seed"]] for row in rows if _both(row, gains)]
    to_loss = {}
    for share in SHARES:
        part = min(share, _WHOLE)
        found = [reached(row, before, before - part * gains[row["seed"]]) for row in rows if row["seed"] in gains]
        there = [each for each in found if each is not None]
        means = {unit: _mean([each[unit] for each in there]) for unit in ("step", "seconds", "cpu_seconds")}
        predicted = None if step is None or means["step"] is None else step * means["step"]
        to_loss[f"{share:g}"] = {"seeds": len(there), **means, "predicted_seconds": predicted}
    gradients = [row["gradient"]["all"] for row in rows]
    backward = [seconds for row in rows for seconds in row["backward_seconds"]]
    curves = [row["curve"][-1] for row in rows if row["curve"]]
    calibration = parse(policy).calibration
    return {
        "policy": policy,
        "seeds": [row["seed"] for row in rows],
        "diverged": sum(row["status"] != "ok" for row in rows),
        "steps": rows[0]["steps"],
        "in_turn": all(PEFT in row["beside"] for row in rows),
        "set_up_seconds": (_mean([row["apply_seconds"] for row in rows]) or 0.0)
        + (0.0 if calibration is None else result["calibration_seconds"][calibration]),
        "cosine": _mean([gradient["cosine"] for gradient in gradients]),
        "norm_ratio": _mean([gradient["norm_ratio"] for gradient in gradients]),
        "heldout": _mean([row["curve"][-1]["heldout"] for row in rows if _ended(row)]),
        "recovered": _mean(shares),
        # Of the adapters trained over a base in 8 bits, with the weights that it was made of.
        "recovered_unrounded": _mean(
            [
                (before - row["heldout_unrounded"]) / gains[row["seed"]]
                for row in rows
                if _both(row, gains) and "heldout_unrounded" in row
            ]
        ),
        "recovered_min": min(shares, default=None),
        "recovered_max": max(shares, default=None),
        "backward_seconds": _mean(backward),
        "step_seconds": {
            "seconds": _mean([each["seconds"] / each["step"] for each in curves]),
            "cpu_seconds": _mean([each["cpu_seconds"] / each["step"] for each in curves]),
            "predicted_seconds": step,
        },
        "to_loss": to_loss,
    }


def _ended(row: dict[str, Any]) -> bool:
    return bool(row["status"] == "ok" and row["curve"])


def _both(row: dict[str, Any], gains: dict[int, float]) -> bool:
    return _ended(row) and row["seed"] in gains


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def csv_lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary as flat lines, with what identifies the runs on each."""
    settings, predicted = result["settings"], result["predicted"]
    about = {name: settings[name] for name in ("batch", "seq", "lr", "schedule", "warmup", "lora_rank", "dtype")}
    about |= {"model": result["model"], "heldout_before": result["heldout_before"]}
    about |= {"gpu": predicted["gpu"], "predicted_model": predicted["model"]} | output.identity(result["environment"])
    lines = []
    for entry in result["summary"]:
        flat = {name: value for name, value in entry.items() if not isinstance(value, (dict, list))}
        flat["seeds"] = " ".join(map(str, entry["seeds"]))
        flat |= {f"step_{unit}": value for unit, value in entry["step_seconds"].items()}
        for share, times in entry["to_loss"].items():
            flat |= {f"to_{share}_{unit}": value for unit, value in times.items()}
        lines.append(flat | about)
    return lines


def print_tables(console: Console, result: dict[str, Any]) -> None:
    """The time to exact LoRA's loss in each kind of seconds, then what was learnt."""
    settings, predicted = result["settings"], result["predicted"]
    console.print(
        f"[bold]{result['model']}[/bold], LoRA rank {settings['lora_rank']}, {settings['steps']} steps of "
        f"{settings['batch']} x {settings['seq']} tokens, AdamW {settings['lr']:g} ({settings['schedule']}), "
        f"{settings['dtype']} on {result['environment']['device']}; text: {result['text']}; held-out loss before: "
        f"{result['heldout_before']:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    length = predicted["tokens"] // predicted["sequences"]
    where = {"predicted_seconds": f" on {predicted['gpu']}, {predicted['model']}, {predicted['sequences']} x {length}"}
    for unit, name in _UNITS.items():
        if any(entry["step_seconds"][unit] is not None for entry in result["summary"]):
            console.print(
                f"\n[bold]time to exact LoRA's loss[/bold], {name}{where.get(unit, '')}",
                highlight=False,
                soft_wrap=True,
            )
            output.print_wide(console, _times(result["summary"], unit))
    output.print_wide(console, _learnt(result["summary"]))
    apart = [entry["policy"] for entry in result["summary"] if not entry["in_turn"]]
    if apart:
        console.print(
            f"not run in turn with {PEFT}, so that measured seconds do not compare: {', '.join(apart)}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_LEGEND, style="dim", highlight=False, soft_wrap=True)


def _times(summary: list[dict[str, Any]], unit: str) -> Table:
    """The first to 90 % of the gain first, where all seeds came to it."""
    exact = next(entry for entry in summary if entry["policy"] == PEFT)["to_loss"]["0.9"][unit]
    table = output.table(("policy",), ("a step", *(f"to {share:.0%}" for share in SHARES), f"x {PEFT} to 90%"))

    def ninety(entry: dict[str, Any]) -> float:
        times = entry["to_loss"]["0.9"]
        return float(times[unit]) if times["seeds"] == len(entry["seeds"]) else float("inf")

    for entry in sorted((each for each in summary if each["step_seconds"][unit] is not None), key=ninety):
        table.add_row(
            entry["policy"],
            output.duration(entry["step_seconds"][unit]),
            *(_time(entry, times, unit) for times in entry["to_loss"].values()),
            f"{exact / ninety(entry):.2f}" if exact and 0.0 < ninety(entry) < float("inf") else "",
        )
    return table


def _time(entry: dict[str, Any], times: dict[str, Any], unit: str) -> str:
    if times["seeds"] == 0:
        return "never"
    few = f" ({times['seeds']} of {len(entry['seeds'])})" if times["seeds"] < len(entry["seeds"]) else ""
    return output.duration(times[unit]) + few


def _learnt(summary: list[dict[str, Any]]) -> Table:
    unrounded = any(entry["recovered_unrounded"] is not None for entry in summary)
    headings = ("steps", "set-up", "backward", "cosine", "norm", "held-out", "recovered", "seeds")
    table = output.table(("policy",), (*headings, *(["unrounded"] * unrounded)))
    for entry in summary:
        several = entry["recovered"] is not None and len(entry["seeds"]) > 1
        share = _percent(entry["recovered"])
        if entry["diverged"]:
            share += f" [red]{entry['diverged']} diverged[/red]"
        table.add_row(
            entry["policy"],
            str(entry["steps"]),
            output.duration(entry["set_up_seconds"]) if entry["set_up_seconds"] else "",
            output.duration(entry["backward_seconds"]),
            f"{entry['cosine']:.3f}",
            f"{entry['norm_ratio']:.2f}",
            "" if entry["heldout"] is None else f"{entry['heldout']:.4f}",
            share,
            f"{entry['recovered_min']:.1%} to {entry['recovered_max']:.1%}" if several else "",
            *([_percent(entry["recovered_unrounded"])] * unrounded),
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss against measured and predicted seconds. PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    predicted = result["predicted"]
    panels = {
        "seconds": f"seconds, measured on {result['environment']['device']}",
        "predicted_seconds": f"seconds, predicted for {predicted['model']} on {predicted['gpu']}",
    }
    for axes, (unit, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for number, entry in enumerate(result["summary"][:_MAX_CURVES]):
            if entry["step_seconds"][unit] is not None:
                _curve(axes, result, entry, f"C{number}", unit)
        for share in SHARES:
            axes.axhline(_target(result, share), color="black", linewidth=0.5, linestyle=":")
        axes.set(xlabel=label, ylabel="held-out loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    settings = result["settings"]
    figure.suptitle(
        f"{result['model']}, LoRA rank {settings['lora_rank']}, {settings['steps']} steps of {settings['batch']} x "
        f"{settings['seq']} tokens, {settings['dtype']}; dotted: 50, 75, 90 and 100 % of exact LoRA's gain",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _target(result: dict[str, Any], share: float) -> float:
    """The held-out loss at a share of exact LoRA's gain, mean of the seeds."""
    exact = next(entry for entry in result["summary"] if entry["policy"] == PEFT)["heldout"]
    before = float(result["heldout_before"])
    return before if exact is None else before - share * (before - exact)


def _curve(axes: Any, result: dict[str, Any], entry: dict[str, Any], colour: str, unit: str) -> None:
    """Every seed thin, the mean of those with all points thick."""
    rows = [row for row in result["rows"] if row["policy"] == entry["policy"] and _ended(row)]
    lines = []
    for row in rows:
        step = entry["step_seconds"][unit]
        x = [0.0, *(point["seconds"] if unit == "seconds" else point["step"] * step for point in row["curve"])]
        lines.append((x, [result["heldout_before"], *(point["heldout"] for point in row["curve"])]))
        axes.plot(*lines[-1], color=colour, linewidth=0.6, alpha=0.4)
    steps = {tuple(point["step"] for point in row["curve"]) for row in rows}
    if len(steps) == 1:
        x, y = ([statistics.fmean(values) for values in zip(*part, strict=True)] for part in zip(*lines, strict=True))
        axes.plot(x, y, color=colour, marker=".", label=entry["policy"])
