"""LoRETTA's norms in 16-bit models: they train in float32, and what is around them does not notice."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from loretta_models import family, gradients, inputs, output, train
from peft import PeftModel, get_peft_model
from torch import Tensor

import loge_kernels as loge

CONFIGS = [loge.LorettaRepConfig(dropout=0.0), loge.LorettaAdpConfig(bottleneck=16)]
HALVES = [torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("config", CONFIGS, ids=["rep", "adp"])
halves = pytest.mark.parametrize("dtype", HALVES)


def in_half(name: str, dtype: torch.dtype, config: Any = CONFIGS[0]) -> Any:
    base = family(name).to(dtype)
    torch.manual_seed(9)
    return get_peft_model(base, copy.deepcopy(config)).eval()


def norms(model: Any) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    return {name: p for name, p in trained.items() if "norm" in name.lower()}


@halves
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_they_start_as_the_base_models(name: str, dtype: torch.dtype) -> None:
    model = in_half(name, dtype)
    assert {p.dtype for p in norms(model).values()} == {torch.float32}
    got = output(model, name)
    assert got.dtype == dtype
    torch.testing.assert_close(got, output(family(name).to(dtype), name), rtol=0.02, atol=0.02)
    with model.disable_adapter():
        assert torch.equal(output(model, name), output(family(name).to(dtype), name))


@both
def test_small_updates_are_kept_in_bfloat16(config: Any) -> None:
    model = in_half("llama", torch.bfloat16, config)
    before = {name: p.detach().clone() for name, p in norms(model).items()}
    train(model, "llama", steps=3, rate=1e-3)
    for name, p in norms(model).items():
        assert (p != before[name]).float().mean() > 0.9, name


@both
def test_a_scaler_takes_the_gradients_of_a_float16_model(config: Any) -> None:
    model = in_half("llama", torch.float16, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", torch.float16):
        loss = model(**inputs("llama")).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in norms(model).values())


@both
def test_saved_loaded_copied_and_pickled(config: Any, tmp_path: Path) -> None:
    model = in_half("llama", torch.bfloat16, config)
    train(model, "llama", steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family("llama").bfloat16(), tmp_path).eval()
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, "llama"), output(model, "llama"))
        found = dict(twin.named_parameters())
        assert all(torch.equal(found[name], p) for name, p in norms(model).items())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_unloaded_model_is_in_16_bits_again(name: str) -> None:
    model = in_half(name, torch.bfloat16)
    train(model, name, steps=3)
    before = output(model, name)
    merged = model.merge_and_unload()
    assert {p.dtype for n, p in merged.named_parameters() if "norm" in n.lower()} == {torch.bfloat16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    torch.testing.assert_close(output(merged, name), before, rtol=0.1, atol=0.1)


@both
def test_a_model_cast_afterwards_runs(config: Any) -> None:
    model = in_half("bert", torch.bfloat16, config).to(torch.bfloat16)
    assert all(torch.isfinite(g).all() for g in gradients(model, "bert").values())


def test_a_float32_model_has_no_hooks() -> None:
    model = get_peft_model(family("llama"), copy.deepcopy(CONFIGS[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
