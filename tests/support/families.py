"""A tiny model of every family, as users train it: PEFT's LoRA with adapters that are not zero, and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from models import randomised
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

VOCABULARY = 60
CLASSES = 3
_SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.15}
_TEXT = {**_SIZE, "vocab_size": VOCABULARY, "intermediate_size": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER = {**_TEXT, "max_position_embeddings": 40, "num_labels": CLASSES}
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


@dataclass(frozen=True)
class Family:
    """`layers`: where the layers are in the model of transformers. `trained`: modules that train whole beside the
    adapters, PEFT's modules_to_save."""

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    layers: str
    task: str | None = None
    trained: tuple[str, ...] = ()

    def model(self) -> Any:
        """The PEFT model; the same at every call."""
        torch.manual_seed(7)
        base: Any = self.make()
        task = {"CAUSAL_LM": "CAUSAL_LM", "SEQ_CLS": "SEQ_CLS"}.get(self.task or "")
        config = LoraConfig(
            r=4,
            lora_alpha=10,
            target_modules=list(self.targets),
            task_type=task,
            modules_to_save=list(self.trained) or None,
        )
        torch.manual_seed(9)
        return randomised(get_peft_model(base, config)).train()

    def batch(self, seed: int = 3) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.task == "image":
            pixels = torch.randn(4, 3, 16, 16, generator=generator)
            return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (4,), generator=generator)}
        ids = torch.randint(5, VOCABULARY, (4, 10), generator=generator)
        if self.task == "CAUSAL_LM":
            return {"input_ids": ids, "labels": ids}
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        labels = torch.randint(CLASSES, (4,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def gradients(self, model: Any) -> dict[str, Tensor]:
        """Of every trained parameter; dropout, where the family has it, draws the same."""
        torch.manual_seed(0)
        model.zero_grad()
        model(**self.batch()).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_OPT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")

FAMILIES = {
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)), _LLAMA, "model.layers", "CAUSAL_LM"),
    "llama, classes": Family(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_GROUPED, num_labels=CLASSES, pad_token_id=0)),
        _LLAMA,
        "model.layers",
        "SEQ_CLS",
    ),
    "qwen2": Family(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)), _LLAMA, "model.layers", "CAUSAL_LM"),
    "qwen3": Family(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)), _LLAMA, "model.layers", "CAUSAL_LM"),
    "opt": Family(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                word_embed_proj_dim=16,
                max_position_embeddings=40,
                init_std=0.15,
                tie_word_embeddings=True,
            )
        ),
        _OPT,
        "model.decoder.layers",
        "CAUSAL_LM",
    ),
    "bert": Family(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER)), _BERT, "bert.encoder.layer", "SEQ_CLS"
    ),
    "roberta": Family(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_ENCODER)),
        _BERT,
        "roberta.encoder.layer",
        "SEQ_CLS",
    ),
    "deberta": Family(
        lambda: hf.DebertaForSequenceClassification(hf.DebertaConfig(**_DEBERTA)),
        ("in_proj", "pos_proj", "pos_q_proj", "output.dense", "intermediate.dense"),
        "deberta.encoder.layer",
        "SEQ_CLS",
    ),
    "deberta v2": Family(
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**_DEBERTA, share_att_key=True)),
        ("query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"),
        "deberta.encoder.layer",
        "SEQ_CLS",
    ),
    "vit": Family(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**_SIZE, intermediate_size=64, image_size=16, patch_size=4, num_labels=CLASSES)
        ),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        "vit.layers",
        "image",
        ("classifier",),
    ),
}
