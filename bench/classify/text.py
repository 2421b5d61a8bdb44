"""Two classification tasks that every machine has the text of: Python's standard library.

package   which package a snippet is from
follows   whether the second of two pieces follows the first in its file, or stands elsewhere in the same package
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loge_kernels.finetune.data import standard_library

TASKS = ("package", "follows")
_SNIPPET = 300  # characters
_PIECE = 150  # characters of each piece of a pair
_SHORTEST = 2 * _SNIPPET  # characters of a file that is used
_FILES = 2  # that a package must have of each part: one file alone could be untypical
_BETWEEN = "----\n"  # the line between two pieces for a model without a separator token
Files = tuple[str, ...]  # their text
Texts = list[tuple[str, ...]]  # snippets, or the two pieces of each pair


@dataclass(frozen=True, slots=True)
class Packages:
    """Packages of the standard library: of each its name, its files to train on, and those held out."""

    names: tuple[str, ...]
    train: tuple[Files, ...]
    heldout: tuple[Files, ...]

    def fingerprint(self) -> str:
        """SHA-256 of all text."""
        return hashlib.sha256(repr((self.train, self.heldout)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Snippets:
    """What a tokenizer makes of the texts, each tensor [n, seq], and labels [n]: indices of the classes."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: Tensor | slice) -> dict[str, Tensor]:
        return {name: tensor[chosen] for name, tensor in self.inputs.items()} | {"labels": self.labels[chosen]}


def read(count: int) -> Packages:
    """The `count` packages with most text to train on. Raises ValueError where the standard library has fewer."""
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {False: [], True: []})
    for path, held in standard_library():
        parts = path.relative_to(root).parts
        text = path.read_text(encoding="utf-8", errors="replace") if len(parts) > 1 else ""
        if len(text) >= _SHORTEST:
            files[parts[0]][held].append(text)
    usable = {name: split for name, split in files.items() if min(map(len, split.values())) >= _FILES}
    names = sorted(usable, key=lambda name: (-sum(map(len, usable[name][False])), name))[:count]
    if len(names) < count:
        raise ValueError(f"--classes {count}: the standard library has {len(names)} packages to tell apart")
    train, heldout = (tuple(tuple(usable[name][held]) for name in names) for held in (False, True))
    return Packages(tuple(names), train, heldout)


def draw(task: str, packages: Sequence[Files], count: int, numbers: random.Random) -> tuple[Texts, list[int]]:
    """`count` texts of `task` with their labels, as many of each class."""
    return {"package": _snippets, "follows": _pairs}[task](packages, count, numbers)


def _snippets(packages: Sequence[Files], count: int, numbers: random.Random) -> tuple[Texts, list[int]]:
    labels = [number % len(packages) for number in range(count)]
    texts: Texts = []
    for label in labels:
        text = _file(packages[label], numbers)
        start = numbers.randrange(len(text) - _SNIPPET)
        texts.append((text[start : start + _SNIPPET],))
    return texts, labels


def _pairs(packages: Sequence[Files], count: int, numbers: random.Random) -> tuple[Texts, list[int]]:
    """Every piece is drawn alike, whatever the label: the first ends, and the second begins, where a line does."""
    labels = [number % 2 for number in range(count)]
    texts: Texts = []
    for number, follows in enumerate(labels):
        files = packages[number // 2 % len(packages)]
        text, place = _line(files, numbers)
        other, there = text, place
        while not follows and other is text and abs(there - place) < _SNIPPET:
            other, there = _line(files, numbers)
        texts.append((text[place - _PIECE : place], other[there : there + _PIECE]))
    return texts, labels


def _file(files: Files, numbers: random.Random) -> str:
    [text] = numbers.choices(files, weights=[len(each) for each in files])
    return text


def _line(files: Files, numbers: random.Random) -> tuple[str, int]:
    """A file, and where a line of it begins that has a piece before it and one from there on."""
    while True:
        text = _file(files, numbers)
        place = text.find("\n", numbers.randrange(len(text))) + 1
        if _PIECE <= place <= len(text) - _PIECE:
            return text, place


def encode(tokenizer: Any, texts: Texts, labels: Sequence[int], seq: int) -> Snippets:
    """The texts in `seq` tokens each. Of a pair that is longer, each piece keeps half of them, those next to the other:
    as the tokenizer's own pair where it has a separator, joined by a line where it has none."""
    own = tokenizer.sep_token is not None
    columns = [list(part) for part in zip(*texts, strict=True)]
    if len(columns) == 2:
        between = tokenizer.num_special_tokens_to_add(pair=True) if own else len(tokenizer(_BETWEEN)["input_ids"])
        room = (seq - between) // 2
        columns = [_cut(tokenizer, columns[0], room, at_end=False), _cut(tokenizer, columns[1], room, at_end=True)]
        if not own:
            columns = [[first + _BETWEEN + second for first, second in zip(*columns, strict=True)]]
    encoded = tokenizer(
        *columns,
        padding="max_length",
        truncation="only_second" if len(columns) == 2 else True,  # a cut text can come to a token more
        max_length=seq,
        return_tensors="pt",
        return_token_type_ids=None if own else False,
    )
    return Snippets(dict(encoded), torch.tensor(labels))


def _cut(tokenizer: Any, pieces: list[str], count: int, at_end: bool) -> list[str]:
    """What `count` tokens say of each piece: its end is cut off, or its start."""
    spans = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = []
    for piece, span in zip(pieces, spans, strict=True):
        if len(span) > count:
            piece = piece[: span[count - 1][1]] if at_end else piece[span[-count][0] :]
        cut.append(piece)
    return cut
