"""Reports of `bench fidelity` on one page: what a policy takes to exact LoRA's loss, in time and in bytes.

Steps are measured: those in which a policy comes to a share of the gain that PEFT's exact LoRA makes with the same
seed. What a step takes and sends is predicted, for a model of the size that people train (`paper`), with this package's
kernels in exact backwards. A report holds one learning rate; of several of one model each policy, PEFT's too, counts at
the one with the lowest held-out loss.

Best in their way are the policies that no other beats in both the time to the loss on the first GPU and the bytes that
FSDP2 gathers for a step: of these a reader has to choose.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from loge_kernels.command_line import Json

from .fidelity import run as fidelity
from .fidelity.report import reached
from .measure.output import check_writable, duration, print_wide, table, without_files, write
from .measure.shapes import LLAMAS
from .paper.collectives import held, traffic
from .paper.model import GPUS, known
from .paper.run import PaperPolicy, step_seconds
from .policies import PEFT, parse

_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierOptions:
    """Which reports, and what is predicted."""

    files: Annotated[Sequence[Path], Argument(help="Reports of `bench fidelity`, of one model or several.")]
    share: Annotated[float, Option(help="Of exact LoRA's gain: the loss that is waited for.")] = 0.9
    gpus: Annotated[Sequence[str], Option("--gpu", help=f"Of {', '.join(GPUS)}: a list.")] = ("H100", "A100")
    model: Annotated[str, Option(help=f"Whose step is predicted: {', '.join(LLAMAS)}.")] = "LLaMA-3-8B"
    json: Json = None

    def check(self) -> None:
        """Raise ValueError where a value cannot work."""
        if not self.files:
            raise ValueError("FILES: give at least one report of bench fidelity")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"--share {self.share:g}: give a share in (0, 1]")
        if not self.gpus:
            raise ValueError(f"--gpu: give at least one of {', '.join(GPUS)}")
        for gpu in self.gpus:
            known("--gpu", gpu, GPUS)
        known("--model", self.model, LLAMAS)
        check_writable(self.json)


def run(options: FrontierOptions, console: Console | None = None) -> dict[str, Any]:
    """Print a table a model; returns, and writes to `options.json`, what they hold. Raises ValueError for a bad option
    and for files that are no reports or cannot stand in one table."""
    options.check()
    reports: dict[str, list[dict[str, Any]]] = {}
    for file in options.files:
        report = _read(file)
        reports.setdefault(report["model"], []).append(report)
    settings = without_files(asdict(options)) | {"files": [file.name for file in options.files]}
    tables = {model: _rows(several, options) for model, several in reports.items()}
    result = {"benchmark": "frontier", "options": settings, "models": tables}
    _print(console or Console(), result, reports, options)
    write(result, options.json)
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        found = dict(json.loads(file.read_text()))
        if (found["benchmark"], found["version"]) != ("fidelity", fidelity.VERSION):
            raise ValueError("it is none")
        if not any(row["policy"] == PEFT for row in found["rows"]):
            raise ValueError(f"it has no run of {PEFT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no report of bench fidelity, version {fidelity.VERSION} ({error})") from error
    return found


def _rows(reports: list[dict[str, Any]], options: FrontierOptions) -> list[dict[str, Any]]:
    """One model's policies, the soonest first."""
    for report in reports[1:]:
        for name, value in report["settings"].items():
            if name != "lr" and value != reports[0]["settings"][name]:
                raise ValueError(
                    f"{report['model']}: one report has {name} = {value}, another {reports[0]['settings'][name]}; only "
                    "the learning rate may differ"
                )
    rival = _best(PEFT, reports)
    if rival is None:
        raise ValueError(f"{reports[0]['model']}: every run of {PEFT} diverged, so that there is no loss to wait for")
    exact = {row["seed"]: row for row in rival["rows"] if row["curve"][-1]["heldout"] < rival["before"]}
    policies = dict.fromkeys(row["policy"] for report in reports for row in report["rows"])
    layers = (reports[0]["sizes"] or {}).get("layers")
    rows = [_row(text, _best(text, reports), exact, layers, options) for text in policies]
    peft = next(row for row in rows if row["policy"] == PEFT)
    for row in rows:
        row["bytes_of_peft"] = _over(row["gathered_bytes"], peft["gathered_bytes"])
    for row in rows:
        row["best"] = _time_and_bytes(row, options.gpus[0]) is not None and not any(
            _beats(other, row, options.gpus[0]) for other in rows
        )
    return sorted(rows, key=lambda row: -(row["speedup"][options.gpus[0]] or 0.0))


def _best(policy: str, reports: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The runs of `policy` at the learning rate with the lowest mean held-out loss, over the seeds that all have;
    None where every one diverged."""
    found = []
    for report in reports:
        rows = {row["seed"]: row for row in report["rows"] if row["policy"] == policy}
        if rows and all(row["status"] == "ok" and row["curve"] for row in rows.values()):
            found.append((report, rows))
    if not found:
        return None
    seeds = set.intersection(*(set(rows) for _, rows in found))
    if not seeds:
        raise ValueError(f"{policy}: no seed was run at all of its learning rates, so that none of them is the best")
    report, rows = min(
        found, key=lambda each: statistics.fmean(each[1][seed]["curve"][-1]["heldout"] for seed in seeds)
    )
    return {"lr": report["settings"]["lr"], "before": report["heldout_before"], "rows": list(rows.values())}


def _row(
    text: str, runs: dict[str, Any] | None, exact: dict[int, Any], layers: int | None, options: FrontierOptions
) -> dict[str, Any]:
    """One policy beside exact LoRA's runs by seed. "steps" is None where a seed did not come to the loss, as is what
    follows from it; "speedup" is that of PEFT's time with the same seeds over its own."""
    row: dict[str, Any] = {"policy": text, "lr": None, "seeds": 0, "recovered": None, "recovered_range": None}
    row |= {"steps": None, "predicted_seconds": dict.fromkeys(options.gpus), "speedup": dict.fromkeys(options.gpus)}
    row["gathered_bytes"] = _gathered(text, layers, options)
    if runs is None:
        return row
    both = [(each, exact[each["seed"]]) for each in runs["rows"] if each["seed"] in exact]
    if not both:
        return row
    before = runs["before"]
    losses = [(each["curve"][-1]["heldout"], theirs["curve"][-1]["heldout"]) for each, theirs in both]
    shares = [(before - ours) / (before - theirs) for ours, theirs in losses]
    row |= {"lr": runs["lr"], "seeds": len(both)}
    row |= {"recovered": statistics.fmean(shares), "recovered_range": (min(shares), max(shares))}
    awaited = [before - options.share * (before - theirs) for _, theirs in losses]
    ours, theirs = (
        [reached(row, before, loss) for row, loss in zip(side, awaited, strict=True)]
        for side in zip(*both, strict=True)
    )
    steps = [each["step"] for each in ours if each is not None]
    if len(steps) < len(both):
        return row
    row["steps"] = statistics.fmean(steps)
    rival = statistics.fmean(each["step"] for each in theirs if each is not None)
    for gpu in options.gpus:
        step, peft = _step(text, gpu, layers, options), _step(PEFT, gpu, layers, options)
        if step is not None and peft is not None:
            row["predicted_seconds"][gpu] = row["steps"] * step
            row["speedup"][gpu] = rival * peft / (row["steps"] * step)
    return row


def _step(text: str, gpu: str, layers: int | None, options: FrontierOptions) -> float | None:
    """None for a policy that paper does not know, for a model of so many `layers`, or that the GPU cannot run."""
    try:
        return step_seconds(_on_paper(text, layers), known("--gpu", gpu, GPUS), options.model, _TOKENS)
    except ValueError:
        return None


def _on_paper(text: str, layers: int | None) -> PaperPolicy:
    """With this package's kernels. Raises ValueError for what paper does not know."""
    policy = parse(text).on_paper(layers)
    return policy if policy.peft else replace(policy, kernels=True)


def _gathered(text: str, layers: int | None, options: FrontierOptions) -> float | None:
    """Bytes that FSDP2 gathers for a step, forward and backward, of all blocks; None for what paper does not know."""
    llama, gpu = LLAMAS[known("--model", options.model, LLAMAS)], known("--gpu", options.gpus[0], GPUS)
    try:
        policy = _on_paper(text, layers)
        block = traffic(held(llama, policy, gpu, _TOKENS, lora_rank=16), "fsdp2")
    except ValueError:
        return None
    return llama.layers * (block.forward + (1.0 - policy.frozen) * block.backward)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _beats(a: dict[str, Any], b: dict[str, Any], gpu: str) -> bool:
    """Whether `a` is as soon as `b` and gathers as little, and is better in one of the two."""
    ours, theirs = _time_and_bytes(a, gpu), _time_and_bytes(b, gpu)
    if ours is None or theirs is None:
        return False
    pairs = list(zip(ours, theirs, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def _time_and_bytes(row: dict[str, Any], gpu: str) -> tuple[float, float] | None:
    """The time, over PEFT's, and the bytes; None where one is not known, as of a policy that did not come to the
    loss."""
    speedup, gathered = row["speedup"][gpu], row["gathered_bytes"]
    return None if speedup is None or gathered is None else (1.0 / speedup, gathered)


def _print(
    console: Console, result: dict[str, Any], reports: dict[str, list[dict[str, Any]]], options: FrontierOptions
) -> None:
    for model, rows in result["models"].items():
        settings = reports[model][0]["settings"]
        rates = ", ".join(f"{report['settings']['lr']:g}" for report in reports[model])
        console.print(
            f"[bold]{model}[/bold], {settings['steps']} steps of {settings['batch']} x {settings['seq']} tokens, the "
            f"best learning rate of {rates}; predicted: {options.model}, 2 x {_TOKENS // 2} tokens a step",
            highlight=False,
            soft_wrap=True,
        )
        times = [f"{gpu} to {options.share:.0%}, x {PEFT}" for gpu in options.gpus]
        headings = ("lr", "recovered", "seeds", f"steps to {options.share:.0%}", *times, "gathered")
        printed = table(("policy",), headings)
        for row in rows:
            printed.add_row(
                ("* " if row["best"] else "  ") + row["policy"],
                _text(row["lr"], "g"),
                _text(row["recovered"], ".1%"),
                "" if row["recovered_range"] is None else "{:.1%} to {:.1%}".format(*row["recovered_range"]),
                _text(row["steps"], ".1f") or "never",
                *(_time(row, gpu) for gpu in options.gpus),
                _text(row["bytes_of_peft"], ".2f"),
            )
        print_wide(console, printed)
    console.print(
        "*: no other policy is there as soon on the first GPU and gathers as little. recovered: of exact LoRA's gain "
        "at the end, mean and range of the seeds. gathered: bytes of a step under FSDP2, of PEFT's. Predicted with "
        "this package's exact kernels, and PEFT's without.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _time(row: dict[str, Any], gpu: str) -> str:
    seconds, times = row["predicted_seconds"][gpu], row["speedup"][gpu]
    return "" if seconds is None else f"{duration(seconds)}, {_text(times, '.2f')}"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
