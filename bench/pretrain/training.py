"""One run of `bench pretrain`: the text and its tokenizer, the model from scratch, a method's parameters, the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loge_kernels.finetune import FinetuneOptions, data
from loge_kernels.finetune.training import heldout_loss, token_losses

from .tokenizer import learn_tokenizer, rate

METHODS = ("full", "lora", "unswitched", "switchlora")
# The tokenizer learns from so many sequences' worth of characters.
_CHARACTERS = 2_000_000


def read_text(options: Any) -> tuple[int, data.Corpus]:
    """The size of a byte-level BPE of the training part, and the standard library's text, or that of `options.text`,
    under it. Its order is that of seed 0."""
    reading = FinetuneOptions(text=options.text, steps=options.steps, batch=options.batch, seq=options.seq)
    tokenizer = learn_tokenizer(_training_text(reading), options.vocab)
    wanted = options.steps * options.batch
    source, train, heldout = data.read(reading, tokenizer, wanted, options.heldout)
    data.check_enough(reading, len(train), options.batch, len(heldout), 1)
    return len(tokenizer), data.Corpus(source, train, heldout, _order(train, wanted, 0))


def _order(train: Tensor, wanted: int, seed: int) -> Tensor:
    return data.shuffled(len(train), wanted, torch.Generator().manual_seed(seed))


class _Characters:
    """A "tokenizer" that keeps the text: what `data.read` would tokenise, seen before there is a tokenizer."""

    eos_token_id = None

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def __call__(self, piece: str, **_: Any) -> Any:
        self.pieces.append(piece)
        return type("Ids", (), {"input_ids": [0] * len(piece)})


def _training_text(reading: FinetuneOptions) -> list[str]:
    characters = _Characters()
    data.read(reading, characters, _CHARACTERS // reading.seq, 0)
    return characters.pieces


def build(method: str, options: Any, vocabulary: int, seed: int) -> nn.Module:
    """The model from scratch, the same weights for the same seed, with what `method` trains of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.seq,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config).to(options.torch_device)
    # transformers' 0.02 is far below what a block adds, and short runs would be spent on growing the embeddings.
    nn.init.normal_(model.get_input_embeddings().weight)
    if method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    import loge_kernels as loge

    if method in ("switchlora", "unswitched"):
        switching = loge.SwitchLoraConfig(
            r=options.rank, interval=options.interval, ratio=options.ratio, total_steps=options.steps, seed=seed
        )
        return get_peft_model(model, switching)
    plain = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, plain)
    for name, parameter in adapted.named_parameters():
        if "base_layer" not in name:  # embeddings, norms and head train at full rank, as in the paper
            parameter.requires_grad_(True)
    return adapted


def train(
    method: str,
    lr: float,
    seed: int,
    options: Any,
    text: tuple[int, data.Corpus],
    progress: Callable[[int, float], None],
) -> dict[str, Any]:
    """A whole run: the curve of losses at the checkpoints, seconds, what was trained."""
    vocabulary, corpus = text
    corpus = replace(corpus, order=_order(corpus.train, options.steps * options.batch, seed))
    model = build(method, options, vocabulary, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(method, model, lr, options.rest_lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    curve = [{"step": 0, "train": None, "heldout": round(_heldout(model, corpus, options), 5)}]
    started, processor, recent = time.perf_counter(), time.process_time(), []
    checkpoints = _checkpoints(options)
    for step in range(options.steps):
        for group, whole in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = whole * rate(step, options.steps, options.warmup)
        model.train()
        loss = token_losses(model, corpus.batch(step, options.batch).to(options.torch_device)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(loss.item())
        progress(step + 1, recent[-1])
        if not math.isfinite(recent[-1]):
            break
        if step + 1 in checkpoints:
            held = _heldout(model, corpus, options)
            curve.append({"step": step + 1, "train": round(sum(recent) / len(recent), 5), "heldout": round(held, 5)})
            recent.clear()
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "status": "ok" if curve[-1]["step"] == options.steps else "diverged",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in parameters),
        "switched": optimizer.switcher.switched if method == "switchlora" else None,
        "curve": curve,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - processor, 2),
    }


def _optimizer(method: str, model: nn.Module, lr: float, rest_lr: float | None) -> Any:
    """AdamW: `lr` for the blocks' matrices or the adapters in their place, `rest_lr` (None: `lr`) for the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [p for name, p in trained.items() if "_proj" in name]
    rest = [p for name, p in trained.items() if "_proj" not in name]
    groups: list[dict[str, Any]] = [{"params": inner, "lr": lr}, {"params": rest, "lr": rest_lr or lr}]
    if method != "switchlora":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    import loge_kernels as loge

    return loge.SwitchAdamW(groups, weight_decay=0.0, model=model)


def _checkpoints(options: Any) -> set[int]:
    return {options.steps * i // options.checkpoints for i in range(1, options.checkpoints + 1)}


def _heldout(model: nn.Module, corpus: data.Corpus, options: Any) -> float:
    loss = heldout_loss(model, corpus, options.batch, options.torch_device, lambda count: True)
    assert loss is not None
    return loss
