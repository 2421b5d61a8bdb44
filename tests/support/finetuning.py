"""What the tests of `loge_kernels.finetune` share: a tiny model on disk, and runs of it that take a second."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import signal

import pytest
import tiny_llama
import torch
from rich.console import Console
from tiny_llama import TEXT

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneOptions, results

CURVES = results.curves


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(tiny, tmp_path, monkeypatch):
    """Options of a run that takes about a second; it draws no picture, which would take another."""
    monkeypatch.setattr(results, "curves", lambda *args: None)
    return small_run(tiny, tmp_path)


@pytest.fixture
def whole(base, finished, tmp_path_factory, monkeypatch):
    """The run of `base`, uninterrupted, with its picture: where it wrote, its metrics and what it printed."""
    if not finished:
        folder = tmp_path_factory.mktemp("whole")
        with monkeypatch.context() as patch:
            patch.setattr(results, "curves", CURVES)
            finished += folder / "out", *go(base, out=folder / "out", json=folder / "copy.json")
    return finished


@pytest.fixture(scope="session")
def finished():
    """What `whole` has run."""
    return []


def small_run(model, folder):
    text = folder / "text.py"
    text.write_text(TEXT)
    sizes = {"steps": 4, "batch": 2, "seq": 32, "lora_rank": 4}
    return FinetuneOptions(
        model=str(model), text=(text,), lr=5e-3, dtype="float32", device="cpu", out=folder / "out", **sizes
    )


def go(options, **changes):
    """Run with `changes`; the metrics and what was printed."""
    printed = io.StringIO()
    metrics = finetune.run(dataclasses.replace(options, **changes), Console(file=printed, width=100))
    return metrics, printed.getvalue()


def interrupted(options, at, **changes):
    """Stop a run by SIGINT in the `at`-th step of AdamW, all methods counted; what was raised."""
    step = torch.optim.AdamW.step
    numbers = itertools.count(1)

    def interrupting(self, *args, **kwargs):
        if next(numbers) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupting)
        with pytest.raises(finetune.Interrupted) as stopped:
            go(options, **changes)
    return stopped.value


def tokenizer_of(options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model)
