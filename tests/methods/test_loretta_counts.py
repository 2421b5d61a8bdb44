"""The parameter counts of the LoRETTA paper, from the configurations of its models, without weights."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import DebertaConfig, DebertaForSequenceClassification, LlamaConfig, LlamaForCausalLM

import loge_kernels as loge

NORMS = 65 * 4096  # LLaMA-2-7B's RMSNorms


def llama_2_7b():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # whose defaults are its sizes


def deberta_base():
    attention = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    with torch.device("meta"):
        return DebertaForSequenceClassification(DebertaConfig(**attention))  # whose other defaults are its sizes


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: loge.LorettaAdpConfig(), 876_800),
        (lambda: loge.LorettaRepConfig(tensor_rank=8), 516_096),
        (lambda: loge.LorettaAdpConfig(train_norms=False), 876_800 - NORMS),
        (lambda: loge.LorettaRepConfig(tensor_rank=8, train_norms=False), 516_096 - NORMS),
    ],
)
def test_llama_2_7b(config, expected):
    model = get_peft_model(llama_2_7b(), config())
    assert trainable(model) == expected
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("config", "expected"), [("LorettaAdpConfig", 97_656), ("LorettaRepConfig", 54_228)])
def test_deberta_base(config, expected):
    """Counted: the trains with their biases, all 25 LayerNorms, and the pooler's dense layer as a train with its bias;
    not the last layer, 768 x 2, which PEFT trains for `task_type="SEQ_CLS"`."""
    make = getattr(loge, config)
    assert trainable(get_peft_model(deberta_base(), make(classifier_modules=["pooler.dense"]))) == expected
    assert trainable(get_peft_model(deberta_base(), make(task_type="SEQ_CLS"))) == expected + 2 * 768 + 2
