"""What `bench classify` is asked to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from typer import Option

from loge_kernels.command_line import WHOLE, Resumed, check_counts

from ..measure import output
from ..policies import PEFT, Policy, parse_all
from .text import TASKS

DEFAULTS = (
    PEFT,
    "apply",
    "rank=1/4",
    "rank=1/4,subspace=salience",
    "rank=1/8",
    "rank=1/8,subspace=salience",
    "rank=1/16,exact_layers=0.75",
)
WARMUP = 2  # steps that are not timed


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyOptions:
    """What is trained, on what, and how."""

    policies: Annotated[
        Sequence[str],
        Option(
            "--policy",
            help='What to compare with peft, repeated: apply, arguments of apply ("rank=1/8,subspace=salience", '
            '"freeze_below=3"), or the controls random:rank=1/8 and dropped. Default: a list.',
        ),
        WHOLE,
    ] = ()
    seeds: Annotated[
        Sequence[int], Option("--seed", help="Of snippets, batches, head, adapters and dropout: a list.")
    ] = (0, 1, 2)
    task: Annotated[
        str,
        Option(
            help="package: which package of the standard library a snippet is from. follows: whether a second piece "
            "of code follows the first in its file, or stands elsewhere in the package."
        ),
    ] = "package"
    model: Annotated[
        str | None,
        Option(
            help="A directory, a .gguf file or a hub id, of an encoder or a decoder; smollm2: SmolLM2-135M-Instruct; "
            "default: all-MiniLM-L6-v2."
        ),
    ] = None
    classes: Annotated[int, Option(help="Packages to tell apart, or to take pairs from.")] = 6
    train: Annotated[int, Option(help="Snippets, or pairs, to train on.")] = 2048
    heldout: Annotated[int, Option(help="Snippets, or pairs, of other files.")] = 384
    seq: Annotated[int, Option(help="Tokens of each.")] = 64
    steps: Annotated[int, Option(help="Optimizer steps of each run.")] = 60
    batch: Annotated[int, Option(help="Snippets, or pairs, a step.")] = 16
    lr: Annotated[float, Option(help="AdamW's learning rate, falling to zero.")] = 2e-3
    lora_rank: Annotated[int, Option(help="Rank of the adapters, on every linear of the blocks; alpha = 2P.")] = 8
    calibration: Annotated[int, Option(help="Batches that subspaces come from.")] = 4
    json: Resumed = None

    @property
    def labels(self) -> int:
        """How many classes the model tells apart."""
        return 2 if self.task == "follows" else self.classes

    def check(self) -> list[Policy]:
        """The policies, peft first. Raises ValueError where a value cannot work, whatever the model."""
        if self.task not in TASKS:
            raise ValueError(f"--task {self.task!r}: choose {' or '.join(TASKS)}")
        if not self.seeds:
            raise ValueError("--seed names no seed; give at least one")
        check_counts(self, "batch", "lora_rank", "calibration")
        least = {"classes": 2, "train": self.labels, "heldout": self.labels, "seq": 16, "steps": WARMUP + 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} {getattr(self, name)}: give an integer of at least {lowest}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"--lr {self.lr}: give a number above 0, such as 2e-3")
        output.check_writable(self.json)
        policies = parse_all((PEFT, *(self.policies or DEFAULTS)))
        for policy in policies:
            if policy.stretch != 1.0:
                raise ValueError(f"--policy {policy.text!r}: all take the same steps here; leave steps= out")
        return policies

    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to stand in one table, as JSON values."""
        settings = output.without_files(asdict(self))
        del settings["policies"], settings["seeds"]
        return settings
