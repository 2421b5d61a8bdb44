"""A LLaMA of any width with a tokenizer of its own, briefly trained from nothing: for what needs wide layers that hold
something, where no pretrained model of that width is at hand.

A few hundred steps on a few hundred thousand tokens make a poor language model. Its weights have the structure of a
trained model's beginning, and its adapters something to learn; it stands for the speed of a width, not for how well a
policy serves a model that has seen the world.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Argument, Option

from loge_kernels.command_line import Device, Json, Text, check_counts, write_json
from loge_kernels.finetune import FinetuneOptions, data
from loge_kernels.finetune.progress import progress
from loge_kernels.finetune.training import heldout_loss, token_losses
from loge_kernels.machine import choose_device

from .tokenizer import learn_tokenizer, rate

_TOKENIZER_FILES = 200  # of the standard library's, to learn the merges from


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchOptions:
    """The model's shape and its training: AdamW on all parameters, with warm-up and cosine; 16-bit products where the
    device has them, 32-bit weights."""

    out: Annotated[Path, Argument(help="Directory to write the model to, for --model.")]
    hidden: Annotated[int, Option(help="Width of the model.")] = 2048
    intermediate: Annotated[int, Option(help="Width of its MLP.")] = 5632
    layers: Annotated[int, Option(help="Blocks.")] = 4
    heads: Annotated[int, Option(help="Attention heads.")] = 32
    kv_heads: Annotated[int, Option(help="Heads of keys and values.")] = 8
    vocab: Annotated[int, Option(help="Entries of its tokenizer, learnt from the text.")] = 4096
    steps: Annotated[int, Option(help="Optimizer steps.")] = 200
    batch: Annotated[int, Option(help="Sequences a step.")] = 2
    seq: Annotated[int, Option(help="Tokens a sequence.")] = 256
    lr: Annotated[float, Option(help="AdamW's learning rate.")] = 6e-4
    text: Text = ()
    seed: Annotated[int, Option(help="Of the start and the batches.")] = 0
    device: Device = "auto"
    json: Json = None

    def check(self) -> None:
        """Raise ValueError where a value cannot work."""
        check_counts(self, "hidden", "intermediate", "layers", "heads", "kv_heads", "steps", "batch")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"--hidden {self.hidden} --heads {self.heads} --kv-heads {self.kv_heads}: the width must be an even "
                "multiple of the heads, and the heads a multiple of those of keys and values"
            )
        if self.vocab < 512:
            raise ValueError(f"--vocab {self.vocab}: 256 bytes need some merges; give at least 512")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out} is there and not empty; choose another folder")


def run(options: ScratchOptions, console: Console | None = None) -> dict[str, Any]:
    """Train and save the model; returns its held-out loss and number of parameters.

    Raises:
        ValueError: an argument that cannot work; too little text.
    """
    options.check()
    console = console or Console(stderr=True)
    device = choose_device(options.device, "--device ")
    reading = FinetuneOptions(
        text=options.text, steps=options.steps, batch=options.batch, seq=options.seq, lr=options.lr, seed=options.seed
    )
    reading.check()
    tokenizer = learn_tokenizer(_texts(options), options.vocab)
    wanted = options.steps * options.batch
    source, train, heldout = data.read(reading, tokenizer, wanted, 16)
    data.check_enough(reading, len(train), options.batch, len(heldout), 1)
    order = data.shuffled(len(train), wanted, torch.Generator().manual_seed(options.seed))
    corpus = data.Corpus(source, train, heldout, order)
    model = _model(options, tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    half = torch.autocast(device.type, torch.bfloat16)
    with progress(console, "training from scratch", options.steps, options.batch * options.seq) as advance:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate(step, options.steps, max(1, options.steps // 10))
            with half:
                loss = token_losses(model, corpus.batch(step, options.batch).to(device)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            advance(f"loss {loss.item():.3f}", 1)
    with half:
        after = heldout_loss(model, corpus, options.batch, device, lambda count: True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{options.out}: {parameters / 1e6:.0f} M parameters, held-out loss {after:.3f}", highlight=False)
    write_json(options.json, {"parameters": parameters, "heldout": after})
    return {"parameters": parameters, "heldout": after}


def _texts(options: ScratchOptions) -> Iterator[str]:
    files = list(options.text) or [
        path for path, held in itertools.islice(data.standard_library(), _TOKENIZER_FILES) if not held
    ]
    for path in files:
        yield Path(path).read_text(encoding="utf-8", errors="replace")


def _model(options: ScratchOptions, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=max(2048, options.seq),
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
