"""`finetune --method` and `--freeze`: the other methods beside exact LoRA, on a tiny model."""

from __future__ import annotations

import re

import pytest
import torch
from finetuning import go, interrupted
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loge_kernels as loge
from loge_kernels.finetune import FinetuneError, methods, results

LORETTA = ("loretta-rep:2e-2", "loretta-adp:2e-2")


def curves_of(metrics):
    """What a resumed run must give again."""
    return {key: (own["losses"], own["heldout_after"], own["trainable"]) for key, own in metrics["methods"].items()}


def test_loretta_beside_lora(base):
    metrics, printed = go(base, method=LORETTA)
    lora, rep, adp = (metrics["methods"][key] for key in ("lora", "loretta-rep", "loretta-adp"))
    assert lora["recovered"] == 1.0
    for own in (rep, adp):
        assert own["heldout_after"] < own["heldout_before"] == lora["heldout_before"]
        assert 0 < own["trainable"] < lora["trainable"]
        assert own["first_gradient_cosine"] is None
    # All start at the base model.
    assert rep["losses"][0] == adp["losses"][0] == pytest.approx(lora["losses"][0], rel=1e-5)
    assert "LoRETTA rep: learning rate 0.02" in printed
    assert re.search(r"LoRETTA adp .*x", printed)
    loge.register_peft_methods()
    model = AutoModelForCausalLM.from_pretrained(base.model)
    again = PeftModel.from_pretrained(model, base.out / "loretta-rep")
    tokens = torch.arange(16)[None]
    with_adapter = again(input_ids=tokens).logits
    with again.disable_adapter():
        assert not torch.equal(with_adapter, again(input_ids=tokens).logits)


@pytest.mark.parametrize("freeze", ["auto", 1])
def test_frozen_layers(base, freeze, monkeypatch):
    seen = []
    monkeypatch.setattr(results, "table", lambda metrics, runs: seen.extend(runs) or "table")
    metrics, printed = go(base, method=("lora", "low-rank"), freeze=freeze, steps=2)
    assert [(run.key, run.title) for run in seen] == [
        ("lora", "LoRA (PEFT)"),
        ("lora-frozen", "LoRA + freezing"),
        ("low_rank-frozen", "LoGE low rank + freezing"),
    ]
    lora, frozen, cheap = metrics["methods"].values()
    # One of the two layers: half of the adapters.
    assert metrics["freezing"]["boundary"] == 1
    assert frozen["trainable"] == cheap["trainable"] == lora["trainable"] / 2
    assert frozen["losses"][0] == lora["losses"][0]
    assert frozen["losses"][1:] != lora["losses"][1:]
    assert {layer["path"] for layer in cheap["report"]["layers"] if ".layers.0." in layer["name"]} == {"frozen"}
    assert ("predicted" in printed) == (freeze == "auto")


@pytest.mark.parametrize(("exact_steps", "speed"), [([False] * 3, 1.0), ([True, False, False], 4 / 3)])
def test_a_speed_is_that_of_steps_taken_in_turn(exact_steps, speed):
    """Of [4, 2, 1] and [1, 2, 1] s a step, not of their medians, 2 and 1 s; exact steps and others by their numbers."""
    own = {"step_seconds": [1.0, 2.0, 1.0], "exact_steps": exact_steps}
    assert results.speed(own, {"step_seconds": [4.0, 2.0, 1.0]}, "step") == pytest.approx(speed)


@pytest.mark.slow
def test_a_table_of_many_interrupted_and_resumed(base, tmp_path):
    """SwitchLoRA begins again, the others go on."""
    changes = {"method": ("low-rank", "loretta-rep", "switchlora:2e-2"), "freeze": 1, "out": tmp_path / "parts"}
    expected, printed = go(base, **changes | {"out": tmp_path / "whole"})
    titles = [f"{method} + freezing" for method in ("LoGE low rank", "LoRETTA rep", "SwitchLoRA")]
    assert all(words in printed for words in (*titles, "share of PEFT's LoRA's", "the first 1 layers"))
    table = printed[printed.index("Typical seconds") :].splitlines()[: 4 + len(expected["methods"])]
    assert all("MiB" in line and line.rstrip().endswith(" M") for line in table[4:])
    own = expected["methods"]["switchlora-frozen"]
    assert own["heldout_after"] < own["heldout_before"]
    assert own["losses"][0] == pytest.approx(expected["methods"]["lora"]["losses"][0], rel=1e-4)
    stopped = str(interrupted(base, 7, **changes))
    assert "switchlora-frozen will begin again; saved" in stopped
    assert "--method low-rank --method loretta-rep --method switchlora:2e-2 --freeze 1" in stopped
    found, _ = go(base, **changes, resume=True)
    assert curves_of(found) == curves_of(expected)
    assert (tmp_path / "parts" / "loretta-rep-frozen" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ("dora",)}, r"--method 'dora': choose lora, loge"),
        ({"method": ()}, r"--method '': choose"),
        ({"method": ("loge", "loge:1e-3")}, r"--method 'loge': it is there twice"),
        ({"method": ("loge:fast",)}, r"--method 'loge:fast': behind the colon goes a learning rate"),
        ({"method": ("loge:-1",)}, r"--method 'loge:-1'"),
        ({"freeze": "half"}, r"--freeze 'half': give auto"),
        ({"freeze": 0}, r"--freeze 0: give auto"),
    ],
)
def test_what_cannot_be_is_refused_at_once(base, changes, message):
    with pytest.raises(FinetuneError, match=message):
        go(base, **changes)
    assert not base.out.exists()


@pytest.mark.parametrize("method", ["lora", "loge"])
def test_a_boundary_beyond_the_layers(base, method):
    with pytest.raises(FinetuneError, match=r"--freeze 3: .*3.*2"):
        go(base, method=(method,), freeze=3)


def test_which_runs(base):
    def keys(**changes):
        return [method.key for method in methods.chosen(base.__class__(**changes))]

    assert keys() == ["lora", "loge", "low_rank"]
    assert keys(method=("lora",)) == ["lora"]
    assert keys(method=("low-rank", "lora:1e-3")) == ["lora", "low_rank"]
    assert keys(method=("lora",), freeze=2) == ["lora", "lora-frozen"]
    assert methods.chosen(base.__class__(method=("loge", "lora:1e-3")))[0].lr == 1e-3
