"""What the tests of `loge_kernels.finetune` share: a tiny model on disk, and runs of it that take a second."""

from __future__ import annotations

import dataclasses
import io
import os
import signal

import pytest
import tiny_llama
import torch
from rich.console import Console
from tiny_llama import TEXT

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneOptions


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def kept_factors(tmp_path_factory):
    """One cache for all: the decomposition of equal weights is not bit for bit the same from call to call."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def base(tiny, kept_factors, tmp_path, monkeypatch):
    """Options of a run that takes about a second."""
    monkeypatch.setenv("LOGE_CACHE", str(kept_factors))
    return small_run(tiny, tmp_path)


@pytest.fixture
def whole(base, finished, tmp_path_factory):
    """The run of `base`, uninterrupted: where it wrote, and its metrics."""
    if "base" not in finished:
        folder = tmp_path_factory.mktemp("whole")
        finished["base"] = folder / "out", go(base, out=folder / "out")[0]
    return finished["base"]


@pytest.fixture(scope="session")
def finished():
    """What `whole` has run."""
    return {}


def small_run(model, folder):
    text = folder / "text.py"
    text.write_text(TEXT)
    sizes = {"steps": 6, "batch": 2, "seq": 32, "lora_rank": 4}
    return FinetuneOptions(
        model=str(model), text=(text,), lr=5e-3, dtype="float32", device="cpu", out=folder / "out", **sizes
    )


def go(options, **changes):
    """Run with `changes`; the metrics and what was printed."""
    printed = io.StringIO()
    metrics = finetune.run(dataclasses.replace(options, **changes), Console(file=printed, width=120))
    return metrics, printed.getvalue()


def press_ctrl_c_at_step(monkeypatch, number, optimizer=torch.optim.AdamW):
    """Send this process SIGINT in the `number`-th step of that kind of optimizer from now on."""
    step = optimizer.step
    count = 0

    def interrupting(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(optimizer, "step", interrupting)


def tokenizer_of(options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model)
