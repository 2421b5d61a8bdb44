"""Steps on paper: against an independent estimate of the same steps, against counts by hand, and what must follow."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loge_kernels.bench.paper import model as paper_model
from loge_kernels.bench.paper import run as on_paper
from loge_kernels.bench.paper.model import llama
from loge_kernels.bench.paper.run import PaperPolicy, PaperStep, predict

PEFT = PaperPolicy("peft", peft=True)
EXACT = PaperPolicy("exact")
FLOAT8 = PaperPolicy("float8", exact_dtype="float8")
RANK = PaperPolicy("rank 256", rank=256)
HALF = PaperPolicy("half of the blocks", frozen=0.5)
SMALL = llama(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152)


def of(policy: PaperPolicy, model: Any = "LLaMA-3-8B", gpu: str = "H100", **arguments: Any) -> PaperStep:
    return predict(model, gpu, policy, **arguments)


# LLaMA-3-8B on an H100, 2 x 4096 tokens: milliseconds of an estimate by hand, without and with checkpointing; in float8
# with the rates that an H200 has shown.
@pytest.mark.parametrize(
    ("policy", "plain", "checkpointed"),
    [
        (PEFT, 658, 933),
        (EXACT, 591, 830),
        (replace(FLOAT8, full_accumulation=True), 614, 854),
        (FLOAT8, 603, 843),
        (RANK, 425, 664),
        (replace(FLOAT8, rank=1 / 8, exact_layers=0.7), 530, 769),
    ],
)
def test_a_step_is_within_five_percent(policy: PaperPolicy, plain: float, checkpointed: float) -> None:
    assert of(policy).milliseconds == pytest.approx(plain, rel=0.05)
    assert of(policy, checkpointing=True).milliseconds == pytest.approx(checkpointed, rel=0.05)


@pytest.mark.parametrize(
    ("policy", "part", "milliseconds"),
    [
        (PEFT, "frozen products, forward", 173),
        (PEFT, "attention, forward", 20),
        (PEFT, "attention, backward", 58),
        (PEFT, "elementwise, forward", 19),
        (PEFT, "elementwise, backward", 34),
        (PEFT, "LoRA, forward", 63),
        (PEFT, "LoRA, backward", 80),
        (EXACT, "LoRA, forward", 27),
        (EXACT, "LoRA, backward", 49),
        (EXACT, "exact dX", 173),
        (replace(FLOAT8, full_accumulation=True), "exact dX", 104),
        (FLOAT8, "quantisation", 83),
        (FLOAT8, "exact dX", 93),
    ],
)
def test_parts_do_not_make_up_for_each_other(policy: PaperPolicy, part: str, milliseconds: float) -> None:
    assert 1e3 * of(policy).parts[part].seconds == pytest.approx(milliseconds, rel=0.1)


def test_exact_kernels() -> None:
    """float8 with fast accumulation by this package's kernels: 1.27 times as fast as PEFT, estimated 510 of 658 ms."""
    ours = of(replace(FLOAT8, kernels=True))
    assert ours.milliseconds == pytest.approx(510, rel=0.05)
    assert of(PEFT).seconds / ours.seconds >= 1.27
    backward = ("exact dX", "quantisation", "LoRA, backward")
    by_torch, by_us = (
        sum(cost.seconds for name, cost in step.parts.items() if name in backward) for step in (of(EXACT), ours)
    )
    assert by_torch / by_us >= 1.45
    parts = {name: cost for name, cost in ours.parts.items() if name not in backward}
    assert parts == {name: cost for name, cost in of(FLOAT8).parts.items() if name not in backward}
    assert of(replace(EXACT, kernels=True)).seconds < of(EXACT).seconds
    assert "quantisation" not in of(replace(EXACT, kernels=True)).parts
    low_rank = replace(RANK, exact_every=2)
    assert of(replace(RANK, kernels=True)).seconds == of(RANK).seconds  # nothing is exact there
    assert of(replace(low_rank, kernels=True)).seconds < of(low_rank).seconds


def test_flops_by_hand() -> None:
    one = llama(hidden=4096, intermediate=14336, layers=1, heads=32, kv_heads=8, vocab=128256)
    step = of(replace(RANK, rank=512), one, lora_rank=16)
    # Σ (N + K) = 81,920 over the seven linear layers; T and dX have R + P columns between them.
    assert step.parts["low-rank dX, the adapter's in it"].flops == 2 * 8192 * (512 + 16) * 81920
    assert step.parts["LoRA, backward"].flops == 2 * 8192 * 16 * 81920  # dA and dB
    assert "exact dX" not in step.parts
    exact = of(EXACT, one, lora_rank=16)
    assert exact.parts["exact dX"].flops == exact.parts["frozen products, forward"].flops == 2 * 8192 * 218_103_808
    assert exact.parts["LoRA, backward"].flops == 2 * 2 * 8192 * 16 * 81920
    # Causal: half of q kᵀ and of its product with v; heads · head_dim = hidden.
    assert exact.parts["attention, forward"].flops == 2 * 2 * 8192 * 4096 * 4096 / 2
    assert exact.parts["output head"].flops == 2 * 2 * 8192 * 4096 * 128256


def test_bytes_by_hand() -> None:
    gpu, (M, N, K, P) = paper_model.GPUS["H100"], (8192, 4096, 14336, 16)
    small = 2 * M * P + P * (N + K)  # xa, or T, written and read; A and B
    peft, ours = (paper_model.lora_forward(gpu, M, N, K, P, peft) for peft in (True, False))
    assert peft.bytes == 2 * (M * K + 6 * M * N + small)
    assert ours.bytes == 2 * (M * K + 2 * M * N + small)
    peft, ours = (paper_model.lora_backward(gpu, M, N, K, P, peft) for peft in (True, False))
    assert peft.bytes == 2 * (5 * M * K + 4 * M * N + 2 * small)
    assert ours.bytes == 2 * (3 * M * K + 2 * M * N + 2 * small)
    assert paper_model.quantisation(gpu, M, N, K, "float8").bytes == (2 + 2 + 1) * M * N
    assert paper_model.quantisation(gpu, M, N, K, "int8").bytes == (2 + 6 + 8 + 5) * M * N + (8 + 6) * M * K


@pytest.mark.parametrize("policy", [PEFT, EXACT, RANK, replace(FLOAT8, rank=0.25, exact_every=4)])
def test_checkpointing_is_one_more_forward_of_the_blocks(policy: PaperPolicy) -> None:
    plain, again = (of(policy, checkpointing=on) for on in (False, True))
    blocks = [cost for name, cost in plain.parts.items() if name.endswith(", forward")]
    assert len(blocks) == 4
    assert again.seconds - plain.seconds == pytest.approx(sum(cost.seconds for cost in blocks), rel=1e-9)
    assert again.parts["recomputation"].flops == pytest.approx(sum(cost.flops for cost in blocks))
    assert {name: cost for name, cost in again.parts.items() if name != "recomputation"} == plain.parts


@pytest.mark.parametrize("gpu", list(paper_model.GPUS))
def test_more_work_takes_longer(gpu: str) -> None:
    def rising(*steps: PaperStep) -> bool:
        seconds = [step.seconds for step in steps]
        return seconds == sorted(set(seconds))

    assert rising(*(of(RANK, gpu=gpu, tokens=tokens, sequences=1) for tokens in (256, 1024, 4096, 16384)))
    ranks = (16, 64, 128, 256, 1 / 8, 1 / 4)
    assert rising(*(of(PaperPolicy("", rank=rank), gpu=gpu) for rank in ranks), of(EXACT, gpu=gpu), of(PEFT, gpu=gpu))
    assert rising(*(of(EXACT, model, gpu) for model in ("LLaMA-2-7B", "LLaMA-3-8B", "LLaMA-3-70B")))


def test_exact_layers_and_steps_are_averages() -> None:
    exact, low_rank = of(EXACT).seconds, of(RANK).seconds
    assert of(replace(RANK, exact_layers=1.0)).seconds == pytest.approx(exact)
    assert of(replace(RANK, exact_every=1)).seconds == pytest.approx(exact)
    assert of(replace(RANK, exact_every=2)).seconds == pytest.approx((exact + low_rank) / 2)
    both = replace(RANK, exact_layers=0.5, exact_every=4)
    assert both.exact_share == pytest.approx(0.5 + 0.5 / 4)
    assert of(both).seconds == pytest.approx(low_rank + both.exact_share * (exact - low_rank))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_blocks_have_a_forward_alone(checkpointing: bool) -> None:
    whole, half = (predict("LLaMA-3-8B", "H100", each, checkpointing=checkpointing) for each in (EXACT, HALF))
    for part, cost in whole.parts.items():
        stays = part.endswith("forward") or part in ("output head", "cross-entropy")
        assert half.parts[part].seconds == pytest.approx(cost.seconds * (1.0 if stays else 0.5)), part


def test_where_the_dense_product_has_fewer_flops_it_stays() -> None:
    assert of(PaperPolicy("full", rank=1.0)).parts == of(EXACT).parts
    assert of(PaperPolicy("more than any has", rank=10**6)).parts == of(EXACT).parts
    # R = 1024: k and v, [1024, 4096], stay dense; the others, from 4096 · 4096 / 8192 = 2048 on, do not.
    kept = of(PaperPolicy("some", rank=1024)).parts["exact dX"].flops
    assert kept == 32 * 2 * 2 * 8192 * 1024 * 4096


def test_the_dtype_depends_on_the_shape() -> None:
    h100, a100 = (paper_model.GPUS[name] for name in ("H100", "A100"))
    assert paper_model.fastest_dtype(h100, 8192, N=4096, K=14336) == "float8"
    # Quantising dY takes as long.
    assert paper_model.fastest_dtype(h100, 8192, N=1024, K=4096, fast_accumulation=False) is None
    assert paper_model.fastest_dtype(h100, 8192, N=4096, K=4096) is None  # by PyTorch
    assert paper_model.fastest_dtype(h100, 8192, N=4096, K=14330) is None  # not a multiple of 16
    assert paper_model.fastest_dtype(a100, 8192, N=4096, K=4096) is None
    assert paper_model.fastest_dtype(a100, 8192, N=8192, K=28672) == "int8"


@pytest.mark.parametrize("gpu", list(paper_model.GPUS))
@pytest.mark.parametrize("model", [*paper_model.MODELS, SMALL])
def test_auto_is_never_slower_than_one_dtype_for_all(gpu: str, model: Any) -> None:
    auto = of(PaperPolicy("auto", exact_dtype="auto"), model, gpu).seconds
    others = [EXACT, PaperPolicy("int8", exact_dtype="int8"), *([] if gpu == "A100" else [FLOAT8])]
    assert auto <= min(of(policy, model, gpu).seconds for policy in others) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_4_bits_are_for_a_b200_and_quantised_by_pytorch(name: Any) -> None:
    four, eight = PaperPolicy("four", exact_dtype=name), PaperPolicy("eight", exact_dtype="float8")
    ours, theirs = (of(policy, gpu="B200").parts for policy in (four, eight))
    assert ours["exact dX"].flops == theirs["exact dX"].flops
    assert ours["exact dX"].seconds == pytest.approx(theirs["exact dX"].seconds / 2, rel=0.05)
    M, wide = 8192, sum(N for N, _ in paper_model.MODELS["LLaMA-3-8B"].linears())
    assert ours["quantisation"].bytes == 32 * 190 * M * wide
    assert of(replace(four, kernels=True), gpu="B200").parts == ours
    with pytest.raises(ValueError, match=f"exact_dtype='{name}' does not run on gpu='H100'; give 'B200', or 8 bits"):
        of(four, gpu="H100")
    assert "exact nvfp4" in [policy.name for policy in on_paper.standard_policies("B200")]


def test_a_small_model_waits_for_launches() -> None:
    step = of(EXACT, SMALL, tokens=1024, sequences=4)
    assert sum(step.parts.values(), paper_model.Cost()).bound == "launches"
    assert step.seconds > 2.5e-6 * sum(cost.kernels for cost in step.parts.values())
    found = on_paper.step_seconds(EXACT, "H100", SMALL, tokens=1024, sequences=4)
    assert found == step.seconds


def test_the_free_model_is_the_named_one() -> None:
    assert llama(4096, 14336, 32, 32, 8, 128256) == paper_model.MODELS["LLaMA-3-8B"]
    assert llama(4096, 11008, 32, 32, None, 32000) == paper_model.MODELS["LLaMA-2-7B"]
    assert of(EXACT, "llama-3-8b", "h100") == of(EXACT)


def test_the_report(tmp_path: Path) -> None:
    file = io.StringIO()
    report = on_paper.run(json=tmp_path / "paper.json", console=Console(file=file, width=80))
    text = file.getvalue()
    assert json.loads((tmp_path / "paper.json").read_text()) == report
    assert report["predicted"] is True
    assert "Predicted, not measured: LLaMA-3-8B" in text
    rows = {row["policy"]["name"]: row for row in report["rows"]}
    assert list(rows) == [policy.name for policy in on_paper.standard_policies("H100")]
    for name, row in rows.items():
        assert row["predicted"] is True
        assert sum(part["milliseconds"] for part in row["parts"]) == pytest.approx(row["milliseconds"])
        assert row["speedup"] == pytest.approx(rows["peft"]["milliseconds"] / row["milliseconds"])
        recomputation = row["checkpointed_milliseconds"] - row["milliseconds"]
        assert recomputation == pytest.approx(row["recomputation_milliseconds"])
        line = next(line for line in text.splitlines() if line.strip().startswith(name + "  "))
        assert f"{row['milliseconds']:.1f}" in line
        assert f"{row['checkpointed_milliseconds']:.1f}" in line
        assert f"{name}, predicted without checkpointing" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "GPT-2"}, "model='GPT-2' is not known; choose from LLaMA-2-7B"),
        ({"gpu": "V100"}, "gpu='V100' is not known; choose from H100, H200, A100, B200"),
        ({"tokens": 0}, "tokens=0; give an integer of at least 1"),
        ({"sequences": 1.5}, "sequences=1.5; give an integer of at least 1"),
        ({"sequences": 3}, "tokens=8192, sequences=3: give a multiple of the sequences"),
        ({"lora_rank": True}, "lora_rank=True; give an integer"),
        ({"gpu": "A100", "policies": [FLOAT8]}, "exact_dtype='float8' does not run on gpu='A100'; give 'int8'"),
        ({"policies": [EXACT, EXACT]}, "policies: the names 'exact', 'exact' are not all different"),
        ({"json": Path("/")}, "cannot write /"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match=re.escape(words)):
        on_paper.run(**arguments, console=Console(file=file))
    assert not file.getvalue()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"exact_dtype": "float4"},
            "exact_dtype='float4' is unknown; choose 'float8', 'int8', 'nvfp4', 'mxfp4', 'auto' or None",
        ),
        ({"rank": 0}, "rank=0; give an int of at least 1"),
        ({"rank": 1.5}, "rank=1.5; give an int of at least 1, a share in (0, 1]"),
        ({"rank": 16, "exact_layers": 1.1}, "exact_layers=1.1; give a share of the frozen weights in [0, 1]"),
        ({"rank": 16, "exact_every": 0.5}, "exact_every=0.5; give a number of steps from 1"),
        ({"exact_every": 2}, "without a rank every layer is exact"),
        ({"exact_layers": 0.5}, "exact_layers=0.5, exact_every=None: without a rank"),
        ({"full_accumulation": True}, "full_accumulation=True, exact_dtype=None: only float8 has it"),
        ({"peft": True, "rank": 16}, "peft=True is exact in 16 bits"),
        ({"peft": True, "kernels": True}, "peft=True is exact in 16 bits"),
        ({"peft": True, "frozen": 0.5}, "peft=True is exact in 16 bits"),
        ({"frozen": 1.0}, "frozen=1.0; give a share of the blocks in [0, 1)"),
        ({"frozen": 0.5, "rank": 16}, "frozen=0.5 with rank=16: paper knows one of them"),
        ({"frozen": 0.5, "base_dtype": "int8", "exact_dtype": "auto"}, "frozen=0.5 with base_dtype='int8'"),
    ],
)
def test_bad_policies(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        PaperPolicy("bad", **fields)


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_a_base_in_8_bits(gpu: str) -> None:
    """Forward and dX in 8 bits: every frozen product is faster, x and dY are quantised, and nothing else changes."""
    base = "float8" if gpu == "H100" else "int8"
    policy = PaperPolicy("base", exact_dtype="auto", base_dtype=base)  # type: ignore[arg-type]
    exact = predict("LLaMA-3-8B", gpu, PaperPolicy("exact", kernels=True))
    step = predict("LLaMA-3-8B", gpu, policy)
    for part in ("frozen products, forward", "exact dX"):
        assert step.parts[part].seconds < exact.parts[part].seconds
    for part in ("attention, forward", "elementwise, backward", "output head", "optimizer"):
        assert step.parts[part] == exact.parts[part]
    M, h, wide = 8192, 4096, 14336
    assert step.parts["quantisation, forward"].bytes == 32 * 3 * M * (3 * h + wide)  # x once for q, k, v and gate, up
    again = predict("LLaMA-3-8B", gpu, policy, checkpointing=True)
    assert again.seconds < predict("LLaMA-3-8B", gpu, PaperPolicy("exact", kernels=True), checkpointing=True).seconds


def test_what_a_base_excludes() -> None:
    with pytest.raises(ValueError, match="base_dtype='int4' is unknown"):
        PaperPolicy("x", exact_dtype="auto", base_dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave it at 'auto'"):
        PaperPolicy("x", base_dtype="int8")
    with pytest.raises(ValueError, match="base_dtype='float8' does not run on gpu='A100'"):
        predict("LLaMA-3-8B", "A100", PaperPolicy("x", exact_dtype="auto", base_dtype="float8"))


PREDICTED = Path(__file__).parents[2] / "bench" / "results" / "predicted"


@pytest.mark.parametrize("file", sorted(PREDICTED.glob("*-llama-3-8b.json")), ids=lambda file: file.stem)
def test_committed_steps_are_those_of_the_model(file: Path) -> None:
    """`bench step --on-paper GPU --model LLaMA-3-8B --json FILE` writes them anew."""
    kept = json.loads(file.read_text())
    gpu = kept["gpu"]["name"]
    now = {policy.name: policy for policy in on_paper.standard_policies(gpu)}
    assert list(now) == [row["policy"]["name"] for row in kept["rows"]]
    for row in kept["rows"]:
        step = predict("LLaMA-3-8B", gpu, now[row["policy"]["name"]])
        assert row["milliseconds"] == pytest.approx(step.milliseconds), row["policy"]["name"]
