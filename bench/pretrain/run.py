"""Pre-training from scratch: every parameter, LoRA, and SwitchLoRA, a small LLaMA on real text.

Every run of a seed starts from the same model and sees the same batches. Embeddings, norms and head train at full rank
in all of them. "unswitched" is SwitchLoRA's start and scale without its switches, which tells what these bring.
A method is judged at the best of its learning rates; the order that SwitchLoRA's authors report, full at most
SwitchLoRA, SwitchLoRA below LoRA, decides the exit status.

A file given as `json` is kept up to date after every run, and what it holds is not run again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Option

from loge_kernels.command_line import Device, Resumed, Text, check_counts, numbers
from loge_kernels.machine import choose_device

from ..measure import output
from ..measure.environment import describe
from .training import METHODS, read_text, train

# Factors of two around the best of each.
RATES: dict[str, Sequence[float]] = {
    "full": (1e-3, 2e-3, 4e-3),
    "lora": (2.5e-3, 5e-3, 1e-2),
    "unswitched": (2.5e-3, 5e-3, 1e-2),
    "switchlora": (5e-3, 1e-2, 2e-2),
}


def read_rates(values: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """METHOD=RATE,RATE as it is typed, for `PretrainOptions.rates`."""
    found: dict[str, tuple[float, ...]] = {}
    for value in values:
        method, equals, rates = value.partition("=")
        if not equals:
            raise ValueError(f"--lr {value!r}: give METHOD=RATE, such as full=1e-3")
        found[method] = found.get(method, ()) + tuple(float(rate) for rate in numbers("lr", [rates]))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainOptions:
    """What is trained, on what, for how long."""

    rates: Annotated[
        Mapping[str, Sequence[float]],
        Option(
            "--lr",
            help="METHOD=RATE or METHOD=RATE,RATE of full, lora, unswitched, switchlora, for the blocks' matrices or "
            "adapters; repeated; a method that is not named is not run; default: all.",
        ),
        read_rates,
    ] = field(default_factory=dict)
    rest_lr: Annotated[
        float | None,
        Option(help="Learning rate of embeddings, norms and head in all; default: that of the run, as in the paper."),
    ] = None
    seeds: Annotated[Sequence[int], Option("--seed", help="Of the model and the batches: a list.")] = (0,)
    text: Text = ()
    vocab: Annotated[int, Option(help="Size of the vocabulary, made from the text.")] = 512
    hidden: Annotated[int, Option(help="Width of the model.")] = 400
    intermediate: Annotated[int, Option(help="Width of its MLP.")] = 1080
    layers: Annotated[int, Option(help="Blocks.")] = 5
    heads: Annotated[int, Option(help="Attention heads.")] = 5
    rank: Annotated[int, Option(help="Of the adapters, on every linear of the blocks.")] = 4
    interval: Annotated[
        float, Option(help="Steps between two switches of a vector, at the start; the paper has 40, of 40,000 steps.")
    ] = 20
    ratio: Annotated[float, Option(help="Share of the steps after which 0.3 of the switching is left.")] = 0.5
    steps: Annotated[int, Option(help="Optimizer steps of each run.")] = 400
    batch: Annotated[int, Option(help="Sequences a step.")] = 2
    seq: Annotated[int, Option(help="Tokens a sequence.")] = 128
    warmup: Annotated[int, Option(help="Steps in which the learning rate rises; a cosine to a tenth follows.")] = 20
    checkpoints: Annotated[int, Option(help="How often the held-out loss is taken in a run.")] = 5
    heldout: Annotated[int, Option(help="Held-out sequences.")] = 32
    device: Device = "auto"
    json: Resumed = None
    png: Annotated[Path | None, Option(help="Draw the held-out loss against the steps.")] = None

    @property
    def torch_device(self) -> torch.device:
        return choose_device(self.device, "--device ")

    def check(self) -> None:
        """Raise ValueError where a value cannot work."""
        unknown = set(self.rates) - set(METHODS)
        if unknown:
            raise ValueError(f"--lr {sorted(unknown)[0]}=...: no such method; choose {', '.join(METHODS)}")
        check_counts(self, "steps", "batch", "layers", "heads", "rank", "checkpoints", "heldout")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: give a number of steps in [0, {self.steps})")
        if self.checkpoints > self.steps:
            raise ValueError(f"--checkpoints {self.checkpoints}: give at most --steps, {self.steps}")
        if self.vocab < 257:
            raise ValueError(f"--vocab {self.vocab}: bytes and the end of a text take 257; give at least that")
        output.check_writable(self.json, self.png)

    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to stand in one table, as JSON values."""
        settings = dataclasses.asdict(self) | {"text": [str(path) for path in self.text]}
        for name in ("rates", "seeds", "json", "png"):
            del settings[name]
        return settings | {"device": self.torch_device.type}


def run(options: PretrainOptions, console: Console | None = None) -> dict[str, Any]:
    """Make the runs that `options.json` does not hold yet, print the table, write the files, return the result."""
    options.check()
    console = console or Console()
    result = _begun(options)
    text = read_text(options)
    result["text"] = text[1].source
    rates = options.rates or RATES
    wanted = [(method, lr, seed) for seed in options.seeds for method in METHODS for lr in rates.get(method, ())]
    known = {(row["method"], row["lr"], row["seed"]) for row in result["rows"]}
    for method, lr, seed in wanted:
        if (method, lr, seed) not in known:
            result["rows"].append(_one(method, lr, seed, options, text, console))
            _conclude(result)
            output.write(result, options.json)
    _conclude(result)
    output.write(result, options.json)
    print_table(console, result)
    if options.png:
        plot(result, options.png)
    return result


def _conclude(result: dict[str, Any]) -> None:
    result["best"], result["passed"] = best(result["rows"]), order_holds(result["rows"])


def _begun(options: PretrainOptions) -> dict[str, Any]:
    if options.json is None or not options.json.exists():
        return {"environment": describe(options.torch_device), "settings": options.settings(), "rows": []}
    result: dict[str, Any] = json.loads(options.json.read_text())
    different = [name for name, value in options.settings().items() if result["settings"].get(name) != value]
    if different:
        name = different[0]
        raise ValueError(
            f"{options.json} was made with {name}={result['settings'].get(name)!r}, now it is "
            f"{options.settings()[name]!r}: give another file"
        )
    return result


def _one(method: str, lr: float, seed: int, options: PretrainOptions, text: Any, console: Console) -> dict[str, Any]:
    every = max(1, options.steps // 10)

    def progress(step: int, loss: float) -> None:
        if step % every == 0:
            console.print(f"{method} lr {lr:g} seed {seed}: step {step}/{options.steps}, loss {loss:.3f}", style="dim")

    return train(method, lr, seed, options, text, progress)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method the learning rate with the least held-out loss, the mean over its seeds, at the end."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        means = []
        for lr in sorted({row["lr"] for row in rows if row["method"] == method}):
            own = [row for row in rows if (row["method"], row["lr"]) == (method, lr)]
            if all(row["status"] == "ok" for row in own):
                means.append((sum(row["curve"][-1]["heldout"] for row in own) / len(own), lr))
        if means:
            found[method] = {"heldout": round(min(means)[0], 5), "lr": min(means)[1]}
    return found


def order_holds(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether, of the methods that were run, full is at most SwitchLoRA and SwitchLoRA below LoRA."""
    losses = {method: entry["heldout"] for method, entry in best(rows).items()}
    ran = {row["method"] for row in rows}
    if ran != set(losses):
        return False
    switched = losses.get("switchlora")
    if switched is None:
        return losses.get("full", 0.0) <= losses.get("lora", float("inf"))
    return losses.get("full", 0.0) <= switched < losses.get("lora", float("inf"))


def print_table(console: Console, result: dict[str, Any]) -> None:
    """Every run, the best learning rate of each method in bold."""
    settings = result["settings"]
    console.print(
        f"[bold]LLaMA from scratch[/bold], {settings['hidden']} wide, {settings['layers']} layers, adapters of rank "
        f"{settings['rank']}, {settings['steps']} steps of {settings['batch']} x {settings['seq']} tokens; text: "
        f"{result['text']}",
        highlight=False,
        soft_wrap=True,
    )
    table = output.table(("method",), ("lr", "seed", "trained", "switched", "held-out", "step", "CPU"))
    for row in result["rows"]:
        steps = max(1, row["curve"][-1]["step"])
        chosen = result["best"].get(row["method"], {}).get("lr") == row["lr"]
        ended = f"{row['curve'][-1]['heldout']:.4f}" if row["status"] == "ok" else "[red]diverged[/red]"
        table.add_row(
            row["method"],
            f"{row['lr']:g}",
            str(row["seed"]),
            f"{row['trainable'] / 1e6:.2f} of {row['parameters'] / 1e6:.2f} M",
            "" if row["switched"] is None else str(row["switched"]),
            f"[bold]{ended}[/bold]" if chosen else ended,
            output.duration(row["seconds"] / steps),
            output.duration(row["cpu_seconds"] / steps),
        )
    output.print_wide(console, table)
    if not result["passed"]:
        console.print("the order full <= SwitchLoRA < LoRA does not hold", style="red")


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss against steps, each method at its best learning rate. PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for number, (method, entry) in enumerate(result["best"].items()):
        for row in result["rows"]:
            if (row["method"], row["lr"]) == (method, entry["lr"]):
                label = f"{method}, lr {row['lr']:g}" if row["seed"] == result["rows"][0]["seed"] else None
                points = [(point["step"], point["heldout"]) for point in row["curve"]]
                axis.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3, label=label)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("held-out loss")
    axis.set_title("A LLaMA from scratch", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
