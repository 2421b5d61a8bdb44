"""What the tests of `loge_kernels.finetune` share: a tiny model on disk, and runs of it that take a second."""

from __future__ import annotations

import dataclasses
import io
import os
import signal

import pytest
import torch
from rich.console import Console

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneOptions

TEXT = "".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n\n" for i in range(200))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A two-layer LLaMA with a byte-level BPE tokenizer, as a directory in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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


def press_ctrl_c_at_step(monkeypatch, number):
    """Send this process SIGINT in the `number`-th optimizer step from now on."""
    step = torch.optim.AdamW.step
    count = 0

    def interrupting(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupting)


def tokenizer_of(options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model)
