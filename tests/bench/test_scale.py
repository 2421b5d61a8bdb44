"""`bench scale`: its bytes are those of a real model, which `test_fsdp.py` counts on the wire; its times are sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import lora
from typer.testing import CliRunner

import loge_kernels as loge
from loge_kernels.__main__ import app
from loge_kernels.bench import scale
from loge_kernels.bench.measure.shapes import LLAMAS, Llama
from loge_kernels.bench.paper.run import predict

TINY = Llama(hidden=64, key_value=32, intermediate=96, layers=2, vocabulary=50)  # tests/models.py's


@pytest.mark.parametrize("rank", [16, 0.25, 0.9])
def test_bytes_of_a_block_are_those_of_a_model(rank: float) -> None:
    model = lora()
    loge.apply(model, rank)
    found = {"weights": 0, "exact": 0, "factors": 0, "adapters": 0, "norms": 0}
    block = model.base_model.model.model.layers[0]
    for module in block.modules():
        if isinstance(module, loge.LoGELinear):
            found["exact"] += module.weight.nbytes if module.factors is None else 0
            found["factors"] += 0 if module.factors is None else sum(t.nbytes for t in module.factors.tensors)
    for name, p in block.named_parameters():
        kinds = {".base_layer.": "weights", "lora_": "adapters"}
        found[next((kind for part, kind in kinds.items() if part in name), "norms")] += p.nbytes
    held = scale.block_bytes(TINY, rank, lora_rank=4, base=4)
    assert scale.asdict(held) == found


def test_traffic() -> None:
    held = scale.BlockBytes(weights=1000, exact=0, factors=100, adapters=20, norms=3)
    assert scale.traffic("peft-fsdp2", held) == scale.Traffic(1023, 1023, 20)
    assert scale.traffic("exact-fsdp2", held) == scale.traffic("peft-fsdp2", held)
    assert scale.traffic("low-rank-fsdp2", held) == scale.Traffic(1023, 123, 20)
    assert scale.traffic("low-rank-fsdp2", held, checkpointing=True) == scale.Traffic(1023, 1123, 20)
    dense = scale.block_bytes(LLAMAS["LLaMA-3-8B"], 0.9, 16)
    assert dense.factors == 0
    assert scale.traffic("low-rank-fsdp2", dense) == scale.traffic("peft-fsdp2", dense)
    assert scale.traffic("low-rank-ddp", held) == scale.traffic("apply-ddp", held) == scale.Traffic(0, 0, 40)


def test_links() -> None:
    machine = scale.Machine(nvlink=100.0, network=5.0, node=8)
    assert machine.gather_seconds(800, 8) == pytest.approx(7.0)
    assert machine.gather_seconds(800, 16) == pytest.approx(800 * 15 / 16 / 40.0)
    assert scale.Machine(nvlink=30.0, network=5.0).gather_seconds(800, 16) == pytest.approx(25.0)


def rows_of(*arguments: str, folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    file = folder / "scale.json"
    result = CliRunner().invoke(app, ["bench", "scale", *arguments, "--json", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "A model on paper, not measured" in result.output
    report = json.loads(file.read_text())
    assert report["measured"] is False
    return {(row["model"], row["gpus"], row["method"]): row for row in report["rows"]}


def test_the_table(tmp_path: Path) -> None:
    rows = rows_of(folder=tmp_path)
    assert {key[0] for key in rows} == {"LLaMA-3-8B", "LLaMA-3-70B"}
    assert {key[1] for key in rows} == {8, 16, 64, 256, 1024}
    for (model, gpus, method), row in rows.items():
        peft = rows[model, gpus, "peft-fsdp2"]
        assert row["seconds"] >= row["compute_seconds"]
        assert row["speedup"] == pytest.approx(peft["seconds"] / row["seconds"])
        if method == "low-rank-fsdp2":
            assert row["forward_bytes"] == peft["forward_bytes"]
            assert 0.15 < row["backward_bytes"] / peft["backward_bytes"] < 0.25
            assert row["fits"]
    assert not rows["LLaMA-3-70B", 8, "low-rank-ddp"]["fits"]
    eight_bits, peft = (rows["LLaMA-3-8B", 8, f"{method}-ddp"] for method in ("apply", "peft"))
    assert eight_bits["resident_bytes"] - peft["resident_bytes"] == 32 * 218_103_808  # a byte for each weight
    assert eight_bits["compute_seconds"] < peft["compute_seconds"]
    # The step of `on_paper`, to the last part.
    step = predict("LLaMA-3-8B", "H200", scale.POLICIES["peft"], tokens=8192, sequences=2, lora_rank=16)
    assert peft["compute_seconds"] == pytest.approx(step.seconds)
    # By hand: 218,103,808 elements of weight in a block, 81,920 = Σ (N + K) of its linear layers.
    assert rows["LLaMA-3-8B", 8, "peft-fsdp2"]["forward_bytes"] == 32 * (2 * 218_103_808 + 4 * 16 * 81_920 + 2 * 8192)


def test_a_slow_network_is_where_fewer_bytes_count(tmp_path: Path) -> None:
    slow = rows_of("LLaMA-3-8B", "--gpus", "64", "--tokens", "512", "--network", "3", folder=tmp_path)
    fast = rows_of("LLaMA-3-8B", "--gpus", "64", "--tokens", "8192", folder=tmp_path)
    key = "LLaMA-3-8B", 64, "low-rank-fsdp2"
    assert slow[key]["collective_seconds"] > slow[key]["compute_seconds"]
    assert slow[key]["speedup"] > 1.5 > fast[key]["speedup"]


def test_exact_layers_gather_their_weights(tmp_path: Path) -> None:
    key = "LLaMA-3-8B", 64, "low-rank-fsdp2"
    none, half, peft = (
        rows_of("LLaMA-3-8B", "--gpus", "64", "--exact-layers", share, folder=tmp_path)[key]
        for share in ["0", "0.5", "1"]
    )
    for name in ("backward_bytes", "compute_seconds"):
        assert half[name] == pytest.approx((none[name] + peft[name]) / 2)
    assert peft["backward_bytes"] == peft["forward_bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["GPT-2"], "model 'GPT-2' is not known; choose of LLaMA-3-8B"),
        (["--gpus", "12"], "--gpus 12: give 2 to 8 GPUs, or a multiple of 8"),
        (["--gpus", "1"], "--gpus 1: give 2 to 8"),
        (["--tokens", "0"], "--tokens 0: give an integer of at least 1"),
        (["--tokens", "5000", "--seq", "2000"], "--tokens 5000: give a multiple of --seq 2000"),
        (["--network", "0"], "--network 0: give GB/s above 0"),
        (["--rank", "2.0"], "rank=2.0"),
    ],
)
def test_bad_options(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "scale", *arguments])
    assert result.exit_code == 1
    assert words in result.output
