"""What training from nothing takes, in `bench pretrain` and `bench scratch` alike: a tokenizer and a learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

_END = "<|endoftext|>"


def learn_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE of `size` entries, learnt from `texts`, as a tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)


def rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step, from 0: a linear rise, then a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
