"""What a run hands over: metrics, the table, the picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ..factors.factors import PROJECTIONS
from ..files import replacing
from ..machine import version_of
from .files import explained
from .methods import Method
from .options import LORA, LOW_RANK, FinetuneOptions
from .training import PARTS, Record, typical

# Arguments of `apply` that need not be said: its defaults, without calibration and with it.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "subspace": ("svd", "gradient"),
    "exact_every": (None,),
    "exact_dtype": ("auto",),
    "base_dtype": (None,),
    "exact_layers": (0.0,),
}


def method_metrics(record: Record, heldout_before: float) -> dict[str, Any]:
    """cost: the dX flops of all frozen weights, of the dense ones.   exact_steps: which steps had an exact backward."""
    report = record.report
    metrics: dict[str, Any] = {
        "heldout_before": heldout_before,
        "heldout_after": record.heldout_after,
        "losses": record.losses,
        "step_seconds": record.step_seconds,
        "typical_seconds": {part: record.typical(part) for part in ("step", *PARTS)},
        "prepare_seconds": record.prepare_seconds,
        "peak_memory_bytes": record.peak_memory,
        "kept_bytes": record.kept_bytes,
        "frozen_bytes": record.frozen_bytes,
        "trainable": record.trainable,
        "cost": 1.0 if report is None else 1.0 - report["flops_saved"],
        "exact_steps": record.exact,
        "report": report,
    }
    return metrics | {f"{part}_seconds": getattr(record, part) for part in PARTS}


def policy_text(options: FinetuneOptions, method: Method) -> str:
    """The call of `loge_kernels.apply` behind a method."""
    policy = options.policy(method.name)
    words = [f"{name}={value!r}" for name, value in policy.items() if value not in _DEFAULTS.get(name, ())]
    if method.name == LOW_RANK and options.subspace in PROJECTIONS:
        words.append("calibration=batches")
    return f"apply({', '.join(['model', *words])})"


def recovered(method: dict[str, Any], exact: dict[str, Any]) -> float | None:
    """The gain in held-out loss as a share of exact LoRA's; None where that has none."""
    gain = exact["heldout_before"] - exact["heldout_after"]
    return (method["heldout_before"] - method["heldout_after"]) / gain if gain > 0 else None


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    packages = ("loge_kernels", "torch", "transformers", "peft")
    return found | {name: version_of(name) or "not installed as a package" for name in packages}


def cosine(gradient: Tensor, exact: Tensor) -> float:
    """Cosine of two flat gradients, in float64; exactly 1 for one with itself."""
    if torch.equal(gradient, exact):
        return 1.0
    return torch.nn.functional.cosine_similarity(gradient.double(), exact.double(), dim=0).item()


def speed(method: dict[str, Any], exact: dict[str, Any], part: str) -> float:
    """How many times as fast as exact LoRA's a part of `method`'s steps is, by the ratios of steps taken in turn: what
    else the machine does slows both of a pair."""
    pairs = zip(method[f"{part}_seconds"], exact[f"{part}_seconds"], strict=True)
    return 1.0 / typical([own / other for own, other in pairs], method["exact_steps"])


def table(metrics: dict[str, Any], methods: Sequence[Method]) -> Table:
    """A line a method, times beside their speed against PEFT's LoRA."""
    found = metrics["methods"]
    result = Table(
        title=f"{metrics['model']['name']}, {metrics['arguments']['steps']} steps; held-out loss before: "
        f"{found[LORA]['heldout_before']:.4f}\nTypical seconds a step, and speed against PEFT's LoRA",
        title_justify="left",
        caption="\n".join(["gain: in held-out loss, as a share of PEFT's LoRA's", *_notes(metrics, methods)]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "held-out", "gain", "forward", "backward", "step", "peak", "trained"):
        result.add_column(heading, justify="right" if heading else "left")
    for method in methods:
        own = found[method.key]
        seconds, peak = own["typical_seconds"], own["peak_memory_bytes"]
        result.add_row(
            method.title,
            f"{own['heldout_after']:.4f}",
            "" if own["recovered"] is None else f"{own['recovered']:.0%}",
            *(f"{seconds[part]:.3f} {speed(own, found[LORA], part):.2f}x" for part in ("forward", "backward", "step")),
            "" if peak is None else f"{peak / 2**20:.0f} MiB",
            f"{own['trainable'] / 1e6:.3g} M",
        )
    return result


def _notes(metrics: dict[str, Any], methods: Sequence[Method]) -> list[str]:
    found = metrics["methods"]
    notes = [
        f"{method.title}: {found[method.key]['policy']}, prepared in {found[method.key]['prepare_seconds']:.0f} s"
        for method in methods
        if method.applied
    ]
    cosines = [(method.title, found[method.key]["first_gradient_cosine"]) for method in methods if method.applied]
    known = [f"{title} {cosine:.4f}" for title, cosine in cosines if cosine is not None]
    if known:
        notes.append(f"first gradient, cosine with that of PEFT's LoRA: {', '.join(known)}")
    if metrics["freezing"] is not None:
        notes.append(f"frozen: the embedding and the first {metrics['freezing']['boundary']} layers")
    return notes + [f"{method.title}: learning rate {method.lr:g}" for method in methods if method.lr is not None]


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
        share = "" if own["recovered"] is None else f", {own['recovered']:.0%} of the gain"
        width = 4.0 if method is methods[0] else 1.5  # so that it is seen where the others lie on it
        for axes, x in ((by_step, steps), (by_time, seconds)):
            style = {"color": method.colour, "linestyle": method.line}
            axes.plot(x, own["losses"], alpha=0.25, linewidth=1, **style)
            axes.plot(x, _running_mean(own["losses"]), linewidth=width, label=f"{method.title}, training", **style)
            ends = [own["heldout_before"], own["heldout_after"]]
            axes.plot([0, x[-1]], ends, "o:", color=method.colour, label=f"{method.title}, held out{share}")
    by_step.set(xlabel="step", ylabel="loss (nats a token)", title="by step")
    by_time.set(xlabel="seconds of training, preparation left out", title="by time")
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
