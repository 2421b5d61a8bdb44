"""A classification text that every machine has: which package of Python's standard library a snippet comes from."""

from __future__ import annotations

import random
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loge_kernels.finetune.data import standard_library

_SNIPPET = 300  # characters
_HELDOUT_FILES = 2  # that a package must have to be a class: one file alone could be untypical


@dataclass(frozen=True, slots=True)
class Snippets:
    """Token ids and attention mask [n, seq], labels [n]: indices of the classes."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: Tensor | slice) -> dict[str, Tensor]:
        return {"input_ids": self.ids[chosen], "attention_mask": self.mask[chosen], "labels": self.labels[chosen]}


def read(
    tokenizer: Any, classes: int, train: int, heldout: int, seq: int, seed: int
) -> tuple[tuple[str, ...], Snippets, Snippets]:
    """The names of the classes, the packages with most text, and `train` and `heldout` snippets of seq tokens, as many
    of each class, from different files. Raises ValueError where the standard library gives fewer classes."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {False: [], True: []})
    for path, held in standard_library():
        parts = path.relative_to(root).parts
        if len(parts) > 1:
            texts[parts[0]][held].append(path.read_text(encoding="utf-8", errors="replace"))
    usable = {name: split for name, split in texts.items() if len(split[True]) >= _HELDOUT_FILES and split[False]}
    largest = sorted(usable, key=lambda name: (-sum(map(len, usable[name][False])), name))[:classes]
    if len(largest) < classes:
        raise ValueError(f"--classes {classes}: the standard library has {len(largest)} packages to tell apart")
    random_numbers = random.Random(seed)
    seen, unseen = (
        _snippets([usable[name][held] for name in largest], count, tokenizer, seq, random_numbers)
        for held, count in ((False, train), (True, heldout))
    )
    return tuple(largest), seen, unseen


def _snippets(texts: list[list[str]], count: int, tokenizer: Any, seq: int, random_numbers: random.Random) -> Snippets:
    pieces, labels = [], []
    for number in range(count):
        label = number % len(texts)
        [text] = random_numbers.choices(texts[label], weights=[len(one) + 1 for one in texts[label]])
        start = random_numbers.randrange(max(1, len(text) - _SNIPPET))
        pieces.append(text[start : start + _SNIPPET])
        labels.append(label)
    encoded = tokenizer(pieces, padding="max_length", truncation=True, max_length=seq, return_tensors="pt")
    return Snippets(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels))
