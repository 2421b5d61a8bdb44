"""Tiny models of the families that LoRETTA knows, and what its tests ask of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from models import VOCABULARY, llama
from peft import get_peft_model
from torch import Tensor, nn

from loge_kernels.methods.loretta.layer import LorettaLayer

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "initializer_range": 0.1}
ENCODER = {**TEXT, "intermediate_size": 96, "max_position_embeddings": 40, "pad_token_id": 0}
RELATIVE = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 40, "init_std": 0.1}
MODELS: dict[str, Any] = {
    "llama": llama,
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**TEXT, intermediate_size=96, num_key_value_heads=2, head_dim=16)
    ),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SIZES, **OPT, vocab_size=VOCABULARY)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
    "deberta": lambda: hf.DebertaForSequenceClassification(hf.DebertaConfig(**RELATIVE)),
    "deberta-v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**RELATIVE)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, initializer_range=0.1, intermediate_size=96, image_size=16, patch_size=8)
    ),
}
FAMILIES = [*MODELS]
ENCODERS = ["bert", "roberta", "deberta", "deberta-v2"]


def family(name: str) -> Any:
    """A model in eval mode with the same weights at every call."""
    torch.manual_seed(5)
    return MODELS[name]().eval()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1, 1])}
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 1]) if name in ENCODERS else ids}


def output(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def adapted(name: str, config: Any, seed: int = 9) -> Any:
    """A PEFT model in eval mode."""
    base = family(name)
    torch.manual_seed(seed)
    return get_peft_model(base, copy.deepcopy(config)).eval()


def moved(model: Any, amount: float = 0.05) -> Any:
    """Every trained parameter away from its start, the same at every call."""
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return model


def adapters(model: nn.Module) -> dict[str, str]:
    """Every layer of LoRETTA by name, as the name of its class."""
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, LorettaLayer)}


def gradcheck(module: nn.Module, x: Tensor) -> bool:
    """Whether the gradients of `x` and of every parameter that trains are those of finite differences."""
    trained = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(trained, values, strict=True)), (x,))

    return torch.autograd.gradcheck(apply, (x.requires_grad_(), *trained.values()))


def train(model: Any, name: str, steps: int = 20, rate: float = 5e-3) -> list[float]:
    """The losses of some steps of AdamW on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs(name)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def gradients(model: Any, name: str = "llama", seed: int = 0) -> dict[str, Tensor]:
    """The gradient of every trained parameter; `.grad` is cleared."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**inputs(name)).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
