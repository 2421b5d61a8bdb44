"""The text: read only as far as needed, tokenised, cut into sequences, a part of it never trained on."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .options import FinetuneError, FinetuneOptions

HELDOUT_TOKENS = 2048
# A few hundred tokens: short runs then see many files instead of the head of one.
_PIECE = 4000
# Tests, other people's packages, tables of numbers, and what differs from machine to machine.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """`train` and `heldout` are [sequences, seq + 1] token ids: inputs are all but the last, labels all but the first.

    `order` [steps * batch] picks the training sequences: every one once, in random order, before any twice.
    """

    source: str
    train: Tensor
    heldout: Tensor
    order: Tensor

    def batch(self, step: int, size: int) -> Tensor:
        return self.train[self.order[step * size : (step + 1) * size]]

    def fingerprint(self) -> str:
        """SHA-256 of every sequence and of their order."""
        digest = hashlib.sha256()
        for tensor in (self.train, self.heldout, self.order):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def load(options: FinetuneOptions, tokenizer: Any) -> Corpus:
    """The corpus of `options`: its --text files, or the standard library of the running Python."""
    wanted = options.steps * options.batch
    source, train, heldout = read(options, tokenizer, wanted, max(1, HELDOUT_TOKENS // options.seq))
    check_enough(options, len(train), options.batch, len(heldout), 1)
    generator = torch.Generator().manual_seed(options.seed)
    return Corpus(source, train, heldout, shuffled(len(train), wanted, generator))


def read(options: FinetuneOptions, tokenizer: Any, train: int, heldout: int) -> tuple[str, Tensor, Tensor]:
    """Where the text of `options` is from, and up to `train` and `heldout` sequences [n, seq + 1] of its two parts."""
    if options.text:
        texts = [_read(Path(path)) for path in options.text]
        cuts = [_line_end(text, len(text) * 9 // 10) for text in texts]
        seen = [_pieces(text[:cut]) for text, cut in zip(texts, cuts, strict=True)]
        unseen = [_pieces(text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
        source = ", ".join(Path(path).name for path in options.text)
    else:
        files = standard_library()
        seen = [_file_pieces(path) for path, held in files if not held]
        unseen = [_file_pieces(path) for path, held in files if held]
        source = f"Python {sysconfig.get_python_version()}'s standard library"
    sequences = [_sequences(*part, options.seq) for part in ((seen, tokenizer, train), (unseen, tokenizer, heldout))]
    return source, sequences[0], sequences[1]


def check_enough(options: FinetuneOptions, train: int, need_train: int, heldout: int, need_heldout: int) -> None:
    """Raise FinetuneError where the text gives fewer sequences than are needed."""
    if train < need_train or heldout < need_heldout:
        name = "--text" if options.text else "the standard library's text"
        raise FinetuneError(
            f"{name} is too short: it gives {train} training and {heldout} held-out sequences of --seq "
            f"{options.seq} tokens, and at least {need_train} (--batch) and {need_heldout} are needed; give more text "
            "(--text again), or a smaller --seq or --batch"
        )


def shuffled(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` of `count` indices in random order: every one once before any twice."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(rounds)[:wanted]


def standard_library() -> list[tuple[Path, bool]]:
    """The standard library's source files, each with whether it is held out: one in ten.

    Order and choice follow from a hash of the path, so that neighbours in the alphabet are spread and a file added by
    another Python version moves no other.
    """
    root = Path(sysconfig.get_path("stdlib"))
    keyed = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                keyed.append((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path))
    if not keyed:
        raise FinetuneError(f"no Python source under {str(root)!r} to train on; give --text FILE")
    return [(path, key[0] < 26) for key, path in sorted(keyed)]


def _sequences(sources: Sequence[Iterator[str]], tokenizer: Any, wanted: int, seq: int) -> Tensor:
    """Up to `wanted` sequences [n, seq + 1]: a piece of each source in turn until there is enough, joined by
    end-of-text tokens. The last token of a sequence is the first of the next, so every token but one is predicted."""
    tokens: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    left = list(sources)
    while left and len(tokens) <= wanted * seq:
        for source in list(left):
            piece = next(source, None)
            if piece is None:
                left.remove(source)
                continue
            tokens += tokenizer(piece, add_special_tokens=False).input_ids + separator
            if len(tokens) > wanted * seq:
                break
    count = min(wanted, max(0, len(tokens) - 1) // seq)
    stream = torch.tensor(tokens, dtype=torch.int64)
    if count == 0:
        return stream.new_empty(0, seq + 1)
    return torch.stack([stream[i * seq : i * seq + seq + 1] for i in range(count)])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = _line_end(text, min(len(text), start + _PIECE))
        yield text[start:end]
        start = end


def _file_pieces(path: Path) -> Iterator[str]:
    yield from _pieces(_read(path))


def _line_end(text: str, position: int) -> int:
    """The end of the line that `position` lies in, or `position` itself in a text of very long lines."""
    end = text.find("\n", position, position + _PIECE)
    return position if end < 0 else end + 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise FinetuneError(f"--text {str(path)!r} cannot be read: {error.strerror}") from error
