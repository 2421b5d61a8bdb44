"""What a run hands over: metrics, the table, the picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ..atomic import replacing
from ..policy import Policy
from .files import explained
from .methods import REFERENCE, Method
from .options import LORA
from .training import PARTS, Record


def method_metrics(record: Record, heldout_before: float, cosine: float | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "heldout_before": heldout_before,
        "heldout_after": record.heldout_after,
        "losses": record.losses,
        "step_seconds": record.step_seconds,
        "typical_seconds": {part: record.typical(part) for part in ("step", *PARTS)},
        "peak_memory_bytes": record.peak_memory,
        "cheap_gradient_cosine": cosine,
        "trainable": record.trainable,
        "cost": 1.0,
    }
    metrics |= {f"{part}_seconds": getattr(record, part) for part in PARTS}
    if record.report is not None:
        policy = Policy(**record.report["policy"])
        metrics |= {"policy": str(policy), "cost": policy.cost, "report": record.report}
        metrics |= {"exact_steps": record.exact, "kept_bytes": record.kept_bytes}
    return metrics


def recovered(method: dict[str, Any], exact: dict[str, Any]) -> float | None:
    """The gain in held-out loss as a share of exact LoRA's; None where that has none."""
    gain = exact["heldout_before"] - exact["heldout_after"]
    return (method["heldout_before"] - method["heldout_after"]) / gain if gain > 0 else None


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("loge_kernels", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def cosine(gradient: Tensor, exact: Tensor) -> float:
    """Cosine of two flat gradients, in float64; exactly 1 for one with itself."""
    if torch.equal(gradient, exact):
        return 1.0
    return torch.nn.functional.cosine_similarity(gradient.double(), exact.double(), dim=0).item()


def table(metrics: dict[str, Any], methods: Sequence[Method]) -> Table:
    """LoRA and LoGE side by side; of other methods, or more, a line each."""
    if [method.key for method in methods] == [LORA, "loge"]:
        return _two(metrics)
    arguments = metrics["arguments"]
    result = Table(
        title=f"{metrics['model']['name']}, {arguments['steps']} steps; typical times; held-out loss before: "
        f"{metrics['methods'][LORA]['heldout_before']:.4f}",
        title_justify="left",
        caption="\n".join(["gain: in held-out loss, as a share of exact LoRA's", *_notes(metrics, methods)]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "trained", "held-out", "gain", "s a step", "speed", "backward", "peak"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    exact = metrics["methods"][LORA]["typical_seconds"]
    for method in methods:
        own = metrics["methods"][method.key]
        seconds, peak = own["typical_seconds"], own["peak_memory_bytes"]
        result.add_row(
            method.title,
            f"{own['trainable'] / 1e6:.3g} M",
            f"{own['heldout_after']:.4f}",
            "" if own["recovered"] is None else f"{own['recovered']:.0%}",
            f"{seconds['step']:.3f}",
            f"{exact['step'] / seconds['step']:.2f}x",
            f"{exact['backward'] / seconds['backward']:.2f}x",
            "" if peak is None else f"{peak / 2**20:.0f} MiB",
        )
    return result


def _notes(metrics: dict[str, Any], methods: Sequence[Method]) -> list[str]:
    notes = [
        f"{method.title}: {metrics['methods'][method.key]['policy']}" for method in methods if method.name == "loge"
    ]
    if metrics["freezing"] is not None:
        notes.append(f"frozen: the embedding and the first {metrics['freezing']['boundary']} layers")
    notes += [f"{method.title}: learning rate {method.lr:g}" for method in methods if method.lr is not None]
    return notes


def _two(metrics: dict[str, Any]) -> Table:
    """LoRA and LoGE side by side, and LoGE against LoRA; the policy below."""
    lora, loge = metrics["methods"]["lora"], metrics["methods"]["loge"]
    steps = metrics["arguments"]["steps"]
    result = Table(
        title=f"{metrics['model']['name']}, {steps} steps; typical times",
        title_justify="left",
        caption=f"LoGE: {loge['policy']}" + ("; the cosine is before correction" if any(loge["exact_steps"]) else ""),
        caption_justify="left",
    )
    result.add_column("")
    for heading in (REFERENCE.title, f"LoGE ({_policy(metrics['arguments'])})", "LoGE : LoRA"):
        result.add_column(heading, justify="right")

    share = "" if loge["recovered"] is None else f"{loge['recovered']:.0%} of the gain"
    result.add_row("held-out loss before", f"{lora['heldout_before']:.4f}", f"{loge['heldout_before']:.4f}", "")
    result.add_row("held-out loss after", f"{lora['heldout_after']:.4f}", f"{loge['heldout_after']:.4f}", share)
    result.add_row("dX flops, of dense", f"{lora['cost']:.2f}", f"{loge['cost']:.2f}", "")
    for part in ("step", *PARTS):
        exact, low = lora["typical_seconds"][part], loge["typical_seconds"][part]
        name = "seconds a step" if part == "step" else f"  {part}"
        # Adam's step is the same in both: a ratio of its few milliseconds would be noise.
        ratio = "" if part == "optimizer" else f"{exact / low:.2f}x speed"
        result.add_row(name, f"{exact:.3f}", f"{low:.3f}", ratio)
    peaks = [method["peak_memory_bytes"] for method in (lora, loge)]
    if None not in peaks:
        result.add_row("peak memory", *(f"{peak / 2**20:.0f} MiB" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}x")
    result.add_row("  of it LoGE keeps", "", f"{loge['kept_bytes'] / 2**20:.0f} MiB", "")
    # The first step may be an exact one: what its batch would give in a cheap step is measured instead.
    name = "cheap gradient, cosine" if any(loge["exact_steps"]) else "first gradient, cosine"
    result.add_row(name, *(f"{method['cheap_gradient_cosine']:.3f}" for method in (lora, loge)), "")
    return result


def _policy(arguments: dict[str, Any]) -> str:
    names = ("budget", "rank", "subspace", "exact_every", "exact_dtype")
    return ", ".join(f"{name.replace('_', ' ')} {arguments[name]}" for name in names if arguments[name] is not None)


def curves(path: Path, metrics: dict[str, Any], methods: Sequence[Method]) -> None:
    """Training loss against steps and against seconds, with the held-out loss at both ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 + 0.3 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for method in methods:
        own = metrics["methods"][method.key]
        seconds = torch.tensor(own["step_seconds"]).cumsum(0).tolist()
        steps = list(range(1, len(seconds) + 1))
        share = "" if own["recovered"] is None else f", {own['recovered']:.0%} of exact LoRA's gain"
        for axes, x in ((by_step, steps), (by_time, seconds)):
            style = {"color": method.colour, "linestyle": method.line}
            axes.plot(x, own["losses"], alpha=0.25, linewidth=1, **style)
            axes.plot(x, _running_mean(own["losses"]), label=f"{method.title}, training", **style)
            ends = [own["heldout_before"], own["heldout_after"]]
            axes.plot([0, x[-1]], ends, "o:", color=method.colour, label=f"{method.title}, held out{share}")
    by_step.set(xlabel="step", ylabel="loss (nats a token)", title="by step")
    by_time.set(xlabel="seconds of training", title="by time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    lines, labels = by_step.get_legend_handles_labels()
    figure.legend(lines, labels, fontsize="small", loc="outside lower center", ncols=2)
    arguments = metrics["arguments"]
    figure.suptitle(
        f"{metrics['model']['name']}, LoRA rank {arguments['lora_rank']}, {arguments['batch']} x {arguments['seq']} "
        f"tokens a step, {arguments['dtype']} on {arguments['device']}\n" + "\n".join(_notes(metrics, methods)),
        fontsize="medium",
    )
    with explained(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _running_mean(values: list[float], decay: float = 0.85) -> list[float]:
    """Exponential mean, corrected for its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        means.append(total / weight)
    return means
