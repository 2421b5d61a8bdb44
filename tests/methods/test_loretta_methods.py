"""What LoRETTA_rep and LoRETTA_adp have in common as methods of PEFT, alone and under `apply`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loretta_models import ENCODERS, FAMILIES, adapted, adapters, family, gradients, inputs, moved, output, train
from models import assert_close, assert_differ, stand_ins, use_surrogate
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import loge_kernels as loge

KINDS: dict[str, Any] = {"rep": loge.LorettaRepConfig, "adp": loge.LorettaAdpConfig}
# Without dropout, and no core of zeros: outputs can be compared, and every gradient has something to say.
OPTIONS: dict[str, dict[str, Any]] = {"rep": {"dropout": 0.0}, "adp": {"identity_start": False, "bottleneck": 16}}
CLASSES = {"rep": "RepLinear", "adp": "AdpLinear"}
both = pytest.mark.parametrize("kind", KINDS)


def config(kind: str, name: str = "llama", **options: Any) -> Any:
    return KINDS[kind](**OPTIONS[kind], task_type="SEQ_CLS" if name in ENCODERS else None, **options)


@both
@pytest.mark.parametrize("name", FAMILIES)
def test_training_starts_at_the_base_model_exactly(name: str, kind: str) -> None:
    expected = output(family(name), name)
    model = adapted(name, KINDS[kind](bottleneck=16))
    assert torch.equal(output(model, name), expected)
    train(model, name, steps=1)
    assert not torch.equal(output(model, name), expected)


@both
def test_a_bfloat16_base_keeps_float32_cores(kind: str) -> None:
    base = family("llama").bfloat16()
    expected = output(base, "llama")
    model = get_peft_model(base, KINDS[kind](bottleneck=16)).eval()
    assert torch.equal(output(model, "llama"), expected)
    assert {p.dtype for name, p in model.named_parameters() if "loretta" in name} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs("llama")).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@both
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_again(name: str, kind: str, tmp_path: Any) -> None:
    model = moved(adapted(name, config(kind, name)))
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("base_layer" in key or "default" in key for key in saved)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        base = family(name)
        torch.manual_seed(1)
        again = PeftModel.from_pretrained(base, tmp_path, **options).eval()
        assert torch.equal(output(again, name), expected), options
        assert adapters(again) == adapters(model)


@both
@pytest.mark.parametrize("name", ["llama", "deberta"])
def test_disabled_is_the_base_model_and_unload_gives_it_back(name: str, kind: str) -> None:
    model = moved(adapted(name, config(kind, name, train_norms=False)))
    adapter, base = output(model, name), output(family(name), name)
    with model.disable_adapter():
        assert torch.equal(output(model, name), base)
    assert torch.equal(output(model, name), adapter)
    assert not torch.equal(adapter, base)
    if name not in ENCODERS:  # whose classifier PEFT leaves as it was trained
        assert torch.equal(output(model.unload(), name), base)


@both
@pytest.mark.parametrize("rank", [None, 0.25])
@pytest.mark.parametrize("name", ["llama", "opt", "deberta", "vit"])
def test_training_lowers_the_loss(name: str, rank: float | None, kind: str) -> None:
    model = adapted(name, config(kind, name))
    loge.apply(model, rank)
    losses = train(model, name)
    assert losses[-1] < 0.85 * losses[0]


@both
def test_under_apply(kind: str) -> None:
    model, other = (moved(adapted("llama", config(kind))) for _ in range(2))
    before, exact = output(model, "llama"), gradients(model)
    loge.apply(model, exact_dtype=None)
    assert_close(gradients(model), exact)
    loge.remove(model)
    assert set(adapters(model).values()) == {CLASSES[kind]}
    report = loge.apply(model, rank=0.25)
    assert torch.equal(output(model, "llama"), before)
    rows = {row.name.rpartition(".")[2]: row for row in report.layers}
    paths = {"rep": ("fused", "plain", "plain"), "adp": ("plain", "plain", "base")}[kind]
    assert tuple(rows[name].path for name in ("q_proj", "k_proj", "gate_proj")) == paths
    assert ("AdpLinear" in rows["gate_proj"].reason) == (kind == "adp")
    names = [f"{row.name}.base_layer" if row.name in adapters(other) else row.name for row in report.converted]
    use_surrogate(other, stand_ins(other, names, 0.25))
    assert_close(gradients(model), gradients(other))
    assert_differ(gradients(model), exact)
    loge.remove(model)
    assert all(type(m.base_layer) is nn.Linear for m in model.modules() if type(m).__name__ == CLASSES[kind])


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("rep", {"tensor_rank": 0}, ValueError, "tensor_rank=0; give 1 or more"),
        ("rep", {"bottleneck": -3}, ValueError, "bottleneck=-3; give 1 or more"),
        ("rep", {"tensor_rank": 2.5}, TypeError, "tensor_rank=2.5 is a float"),
        ("rep", {"tensor_rank": 9}, ValueError, "tensor_rank=9 is larger than bottleneck=8"),
        ("rep", {"dropout": 1.0}, ValueError, r"dropout=1.0 is not a probability in \[0, 1\)"),
        ("rep", {"tensor_shapes": {"64x8": [8, 8, 4]}}, ValueError, "multiply to 256, not to 64 x 8 = 512"),
        ("adp", {"tensor_rank": 65}, ValueError, "tensor_rank=65 is larger than bottleneck=64"),
        ("adp", {"where": "beside"}, ValueError, "where='beside': 'beside' is neither 'before' nor 'after'"),
        ("adp", {"where": {"fc1": "under"}}, ValueError, "'under' is neither 'before' nor 'after'"),
        ("adp", {"non_linearity": "step"}, ValueError, "non_linearity='step' is unknown; choose one of 'relu', 'gelu'"),
        ("adp", {"tensor_shapes": {"768x64": [8, 8]}}, ValueError, "multiply to 64, not to 768 x 64 = 49152"),
    ],
)
def test_bad_configurations(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KINDS[kind](**options)
