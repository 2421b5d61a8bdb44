"""Checkpointed, packed and generating models: what PEFT gives, or what the plain run gave."""

from __future__ import annotations

from typing import Any

import loretta_models
import pytest
import torch
from models import VOCABULARY, assert_close, assert_differ, gradients, llama, lora, tokens
from peft import get_peft_model
from situations import checkpointed, gradients_of
from switching import batch, optimizer_of, switching
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorWithFlattening

import loge_kernels as loge

RANK = 0.25


def applied(model: Any, rank: float | None = RANK, **options: Any) -> Any:
    loge.apply(model, rank, exact_dtype=None, **options)
    return model.train()


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def trained(kind: str) -> Any:
    if kind == "switchlora":
        return applied(switching(lora_dropout=0.3), None)
    if kind.startswith("loretta"):
        config = loge.LorettaRepConfig(dropout=0.3) if kind == "loretta rep" else loge.LorettaAdpConfig()
        return applied(loretta_models.moved(get_peft_model(llama(), config)))
    return applied(lora(lora_dropout=0.3), freeze_below=1 if kind == "frozen below" else None)


@REENTRANT
@pytest.mark.parametrize("kind", ["lora", "frozen below", "loretta rep", "loretta adp", "switchlora"])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_recomputed_step_is_the_step_itself(kind: str, reentrant: bool) -> None:
    model = trained(kind)
    expected = gradients(model, seed=4)
    # Not to the bit: the first layer's input requires a gradient now, and one product has more columns.
    assert_close(gradients(checkpointed(model, reentrant), seed=4), expected, 1e-6)
    if kind in ("lora", "switchlora"):
        assert_differ(gradients(model, seed=5), expected)


def test_switches_between_checkpointed_steps() -> None:
    """The weight and its 8-bit copy change after each step; none of it reaches the step under way."""
    model, other = (switching(interval=1, freeze_steps=0) for _ in range(2))
    for one in (model, other):
        loge.apply(one, exact_dtype="int8")
    checkpointed(model, False)
    optimizers = [optimizer_of(model), optimizer_of(other)]
    for step in range(3):
        found = []
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            each(input_ids=batch(step), labels=batch(step)).loss.backward()
            found.append(gradients_of(each))
            optimizer.step()
        assert_close(*found, 0.0)


@pytest.mark.parametrize("exact_fraction", [0.0, 0.5])
def test_a_checkpointed_module_inside_a_compiled_graph(exact_fraction: float) -> None:
    torch._dynamo.reset()
    options = {"rank": 8, "lora_rank": 4, "lora_dropout": 0.5, "exact_fraction": exact_fraction}
    layer = loge.LoGELinear.from_linear(nn.Linear(24, 24), **options)
    nn.init.normal_(layer.lora_B)

    def block(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(layer(x).relu()), x, use_reentrant=False)

    found = []
    for function in (layer, torch.compile(block, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        x = torch.randn(9, 24, requires_grad=True)
        torch.manual_seed(3)
        y = function(function(x).relu()) if function is layer else function(x)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad, "A": layer.lora_A.grad})
        layer.zero_grad()
    assert_close(*found, 1e-5)


# Generating


@pytest.mark.parametrize("options", [{"rank": RANK}, {}, {"rank": RANK, "exact_layers": 0.5}], ids=str)
def test_generation_with_a_cache_between_steps(options: dict[str, Any]) -> None:
    model, other = lora(), lora()
    applied(model, **{"rank": None, **options})
    expected = gradients(model)
    found = []
    for each in (model, other):
        each.eval()
        found.append(each.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0))
        each.train()
    assert torch.equal(*found)
    assert_close(gradients(model), expected, 0.0)


# Packing

LENGTHS = (5, 9, 3)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def packed() -> dict[str, Any]:
    examples = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in sequences()]
    return DataCollatorWithFlattening(return_tensors="pt")(examples)


def derive(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of the summed loss of all tokens that have a successor."""
    model.zero_grad()
    for given in batches:
        (model(**given).loss * (given["labels"][:, 1:] != -100).sum()).backward()
    return gradients_of(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences(attention: str) -> None:
    # With a cache, transformers takes the positions of a packed batch for those of one sequence.
    model, other, low = (lora(llama(attn_implementation=attention, use_cache=False)).train() for _ in range(3))
    applied(model, None)
    applied(low)
    one = packed()
    assert one["input_ids"].shape == (1, sum(LENGTHS))
    assert_close(derive(model, [one]), derive(other, [one]))
    apart = [{"input_ids": ids[None], "labels": ids[None]} for ids in sequences()]
    together = derive(low, [one])
    assert_close(together, derive(low, apart))
    assert_differ(together, derive(other, [one]))
