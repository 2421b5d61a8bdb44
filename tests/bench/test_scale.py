"""`bench scale`: its bytes are those of a real model, which `bench collectives` counts; its times are sums."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from models import lora
from typer.testing import CliRunner

import loge_kernels as loge
from loge_kernels.__main__ import app
from loge_kernels.bench import scale
from loge_kernels.bench.measure.shapes import LLAMAS, Llama
from loge_kernels.bench.paper import collectives
from loge_kernels.bench.paper.run import PaperPolicy, predict

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
TINY = Llama(hidden=64, key_value=32, intermediate=96, layers=2, vocabulary=50)  # tests/models.py's


POLICIES = {
    "exact": PaperPolicy("exact"),
    "16": PaperPolicy("16", rank=16),
    "1/4": PaperPolicy("1/4", rank=0.25),
    "0.9, in int8": PaperPolicy("0.9", rank=0.9, exact_dtype="int8"),
    "half": PaperPolicy("half", rank=16, exact_layers=0.5, exact_dtype="int8"),
    "every": PaperPolicy("every", rank=16, exact_every=2, exact_dtype="int8"),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_bytes_of_a_block_are_those_of_a_model(policy: PaperPolicy) -> None:
    model = lora()
    arguments = {name: getattr(policy, name) for name in ("rank", "exact_layers", "exact_every", "exact_dtype")}
    loge.apply(model, **arguments)
    found = {"weights": 0, "copies": 0, "factors": 0, "adapters": 0, "norms": 0}
    blocks = model.base_model.model.model.layers
    for module in blocks.modules():
        if isinstance(module, loge.LoGELinear):
            found["factors"] += 0 if module.factors is None else sum(t.nbytes for t in module.factors.tensors)
            module.prepare()
            if module.eight_bit is not None:
                found["copies"] += module.eight_bit.tensor.nbytes + module.eight_bit.scale.nbytes
    for name, p in blocks.named_parameters():
        kinds = {".base_layer.": "weights", "lora_": "adapters"}
        found[next((kind for part, kind in kinds.items() if part in name), "norms")] += p.nbytes
    block = collectives.held(TINY, policy, "H200", tokens=64, lora_rank=4, base=4)
    assert {name: 2 * value for name, value in asdict(block).items() if name != "read"} == found


def test_4_bits_are_not_sharded() -> None:
    with pytest.raises(ValueError, match="policy 'four': copies in 4 bits cannot be sharded"):
        collectives.held(TINY, PaperPolicy("four", exact_dtype="nvfp4"), "B200", tokens=64, lora_rank=4)


def test_traffic() -> None:
    block = collectives.Held(weights=1000.0, copies=500.0, factors=100.0, read=123.0, adapters=20, norms=3)
    assert collectives.traffic(block, "fsdp2") == collectives.Traffic(1023, 146, 20)
    assert collectives.traffic(block, "fsdp2", checkpointing=True) == collectives.Traffic(1023, 1023, 20)
    assert collectives.traffic(block, "ddp") == collectives.Traffic(0, 0, 40)


def test_what_backward_reads() -> None:
    llama, sizes = LLAMAS["LLaMA-3-8B"], ("H200", 8192, 16)
    peft, exact, eight, low, half = (
        collectives.held(llama, policy, *sizes)
        for policy in (
            PaperPolicy("peft", peft=True),
            PaperPolicy("exact"),
            PaperPolicy("float8", exact_dtype="float8"),
            PaperPolicy("1/8", rank=1 / 8),
            PaperPolicy("half", rank=1 / 8, exact_layers=0.5, exact_dtype="float8"),
        )
    )
    assert peft == exact
    assert exact.read == exact.weights == 2 * 218_103_808  # by hand
    assert eight.read == eight.copies == 218_103_808 + 4 * (6 * 4096 + 14336)
    assert low.read == low.factors < 0.2 * exact.read
    assert half.read == (eight.read + low.read) / 2
    assert (half.copies, half.factors) == (eight.copies / 2, low.factors / 2)
    every = collectives.held(llama, PaperPolicy("1/8", rank=1 / 8, exact_every=4, exact_dtype="float8"), *sizes)
    assert every.read == pytest.approx(eight.read / 4 + low.read * 3 / 4)
    assert every.copies == eight.copies
    assert collectives.held(llama, PaperPolicy("0.9", rank=0.9), *sizes) == exact  # dense is cheaper


def test_links() -> None:
    machine = scale.Machine(nvlink=100.0, network=5.0, node=8)
    assert machine.gather_seconds(800, 8) == pytest.approx(7.0)
    assert machine.gather_seconds(800, 16) == pytest.approx(800 * 15 / 16 / 40.0)
    assert scale.Machine(nvlink=30.0, network=5.0).gather_seconds(800, 16) == pytest.approx(25.0)


def report_of(*arguments: str, folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / "scale.json"
    result = CliRunner().invoke(app, ["bench", "scale", *arguments, "--json", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "A model on paper, not measured" in result.output
    report = json.loads(file.read_text())
    assert report["measured"] is False
    return report, result.output


def rows_of(*arguments: str, folder: Path) -> dict[tuple[str, int, str, str], dict[str, Any]]:
    report, _ = report_of(*arguments, folder=folder)
    return {(row["model"], row["gpus"], row["engine"], row["policy"]): row for row in report["rows"]}


def test_the_table(tmp_path: Path) -> None:
    rows = rows_of(folder=tmp_path)
    assert {key[0] for key in rows} == {"LLaMA-3-8B", "LLaMA-3-70B"}
    assert {key[1] for key in rows} == {8, 16, 64, 256, 1024}
    for (model, gpus, engine, policy), row in rows.items():
        peft = rows[model, gpus, engine, "peft"]
        assert row["seconds"] >= row["compute_seconds"]
        assert row["seconds"] < row["seconds_without_overlap"]
        assert row["seconds_without_overlap"] == row["compute_seconds"] + row["collective_seconds"]
        assert row["speedup"] == pytest.approx(peft["seconds"] / row["seconds"])
        if policy.startswith("base_dtype="):
            assert row["forward_bytes"] == row["backward_bytes"] <= 0.51 * peft["forward_bytes"]
            assert row["resident_bytes"] < peft["resident_bytes"]
        else:
            assert row["forward_bytes"] == peft["forward_bytes"]
        if engine == "fsdp2":
            assert row["fits"]
            if policy == "rank=1/8":
                assert 0.15 < row["backward_bytes"] / peft["backward_bytes"] < 0.25
            if policy == "apply":
                # What PyTorch alone takes longer for in float8 stays in 16 bits.
                assert 0.5 < row["backward_bytes"] / peft["backward_bytes"] <= 0.61
    assert not rows["LLaMA-3-70B", 8, "ddp", "rank=1/8"]["fits"]
    eight_bits, peft = (rows["LLaMA-3-8B", 8, "ddp", policy] for policy in ("apply", "peft"))
    # A byte for each weight of the MLPs, four for each column; attention stays in 16 bits.
    held = 32 * (3 * 4096 * 14336 + 4 * (2 * 4096 + 14336))
    assert eight_bits["resident_bytes"] - peft["resident_bytes"] == held
    assert eight_bits["compute_seconds"] < peft["compute_seconds"]
    # The step of `on_paper`, to the last part.
    step = predict("LLaMA-3-8B", "H200", PaperPolicy("peft", peft=True), tokens=8192, sequences=2, lora_rank=16)
    assert peft["compute_seconds"] == pytest.approx(step.seconds)
    # By hand: 218,103,808 elements of weight in a block, 81,920 = Σ (N + K) of its linear layers.
    forward = 32 * (2 * 218_103_808 + 4 * 16 * 81_920 + 2 * 8192)
    assert rows["LLaMA-3-8B", 8, "fsdp2", "peft"]["forward_bytes"] == forward


def test_a_slow_network_is_where_fewer_bytes_count(tmp_path: Path) -> None:
    options = "LLaMA-3-8B", "--gpus", "64", "--engine", "fsdp2"
    slow = rows_of(*options, "--tokens", "512", "--network", "3", folder=tmp_path)
    fast = rows_of(*options, "--tokens", "8192", folder=tmp_path)
    key = "LLaMA-3-8B", 64, "fsdp2", "rank=1/8"
    assert slow[key]["collective_seconds"] > slow[key]["compute_seconds"]
    assert slow[key]["speedup"] > 1.5 > fast[key]["speedup"]


def test_exact_layers_gather_their_weights(tmp_path: Path) -> None:
    policies = {share: f"rank=1/8,exact_layers={share},exact_dtype=None" for share in ("0", "0.5", "1")}
    typed = [part for policy in policies.values() for part in ("--policy", policy)]
    rows = rows_of("LLaMA-3-8B", "--gpus", "64", *typed, folder=tmp_path)
    none, half, whole = (rows["LLaMA-3-8B", 64, "fsdp2", policy] for policy in policies.values())
    for name in ("backward_bytes", "compute_seconds"):
        assert half[name] == pytest.approx((none[name] + whole[name]) / 2)
    assert whole["backward_bytes"] == whole["forward_bytes"]


def test_checkpointed_blocks_have_an_exact_backward(tmp_path: Path) -> None:
    typed = "--policy", "exact", "--policy", "rank=1/8", "--policy", "rank=1/8,exact_every=2", "--policy", "apply"
    rows = rows_of("LLaMA-3-8B", "--gpus", "64", "--checkpointing", *typed, folder=tmp_path)
    sharded = {policy: row for (_, _, engine, policy), row in rows.items() if engine == "fsdp2"}
    assert {row["backward_bytes"] for row in sharded.values()} == {sharded["peft"]["forward_bytes"]}
    assert sharded["rank=1/8"]["compute_seconds"] == pytest.approx(sharded["exact"]["compute_seconds"])
    every = sharded["rank=1/8,exact_every=2"]
    assert every["compute_seconds"] == pytest.approx(sharded["apply"]["compute_seconds"])
    for policy in ("rank=1/8", "apply"):  # under DDP the factors are there as well
        assert rows["LLaMA-3-8B", 64, "ddp", policy]["compute_seconds"] < sharded["exact"]["compute_seconds"]


def learnt(folder: Path, **steps: float | None) -> str:
    summary = [{"policy": policy, "to_loss": {"0.9": {"step": taken}}} for policy, taken in steps.items()]
    file = folder / "fidelity.json"
    file.write_text(json.dumps({"summary": summary}))
    return str(file)


@pytest.mark.slow
def test_which_network_low_rank_needs(tmp_path: Path) -> None:
    """Inside the ranges that are printed a low-rank policy is sooner than every exact one, outside it is not."""
    policy = "rank=1/8"
    taken = {"peft": 20.0, "apply": 20.0, policy: 22.0, "rank=1/16": None, "rank=1/4": 60.0, "rank=1/32": 10.0}
    taken |= {"base_dtype=int8": 26.0, "exact": None, "exact_dtype=nvfp4": 1.0, "freeze_below=3": 1.0}
    file = learnt(tmp_path, **taken)
    options = "LLaMA-3-8B", "--gpus", "8,64", "--engine", "fsdp2", "--tokens", "4096"
    report, printed = report_of(*options, "--learning", file, folder=tmp_path)
    found = {row["policy"]: row for row in report["sooner"]}
    assert {row["gpus"] for row in report["sooner"]} == {64}  # within a node there is no network
    assert found["rank=1/16"]["steps"] is None
    assert found["rank=1/4"]["steps"] == 60.0
    assert found["rank=1/16"]["networks"] == found["rank=1/4"]["networks"] == []
    assert found["rank=1/32"]["networks"] == [[0.0, None]]
    for words in ("never there", "at no speed", "at every speed"):
        assert words in printed
    (zero, slow), (fast, none) = found[policy]["networks"]  # arithmetic helps at one end, bytes at the other
    assert (zero, none) == (0.0, None)
    assert f"below {slow:.3g}, above {fast:.3g} GB/s a GPU" in printed
    for network, sooner in ((0.98 * slow, True), (1.02 * slow, False), (0.98 * fast, False), (1.02 * fast, True)):
        machine, chosen = scale.Machine(network=1e9 * network), scale.ScaleOptions(tokens=4096)
        ours, *rivals = (
            taken[text]
            * scale._row("LLaMA-3-8B", 64, scale._by_kernels(text, chosen), "fsdp2", machine, chosen)["seconds"]
            for text in (policy, "apply", "base_dtype=int8")
        )
        assert (ours < min(rivals)) == sooner


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "no report of bench fidelity"),
        (
            '{"summary": [{"policy": "freeze_below=3", "to_loss": {"0.9": {"step": 1.0}}}]}',
            "no exact policy beside peft is in it, or got to 0.9",
        ),
        ('{"summary": []}', "no exact policy beside peft is in it, or got to 0.9"),
    ],
)
def test_a_report_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    result = CliRunner().invoke(app, ["bench", "scale", "--learning", str(file)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert words in result.output


def test_the_committed_prediction(tmp_path: Path) -> None:
    """What docs/distributed.md says of low rank is of this file."""
    report = json.loads((RESULTS / "predicted" / "h200-scale.json").read_text())
    learning = str(RESULTS / "cpu-amd-epyc-avx512-2core" / report["options"]["learning"])
    now, _ = report_of("--gpus", "8,64,1024", "--learning", learning, folder=tmp_path)
    for kind in ("rows", "sooner"):
        assert len(now[kind]) == len(report[kind])
        for row, committed in zip(now[kind], report[kind], strict=True):
            assert set(row) == set(committed)
            for name, value in row.items():
                assert value == (
                    pytest.approx(committed[name], rel=1e-6) if isinstance(value, float) else committed[name]
                )
    assert all(row["networks"] == [] for row in report["sooner"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["GPT-2"], "model 'GPT-2' is not known; choose of LLaMA-3-8B"),
        (["--gpus", "12"], "--gpus 12: give 2 to 8 GPUs, or a multiple of 8"),
        (["--gpus", "1"], "--gpus 1: give 2 to 8"),
        (["--tokens", "0"], "--tokens 0: give an integer of at least 1"),
        (["--tokens", "5000", "--seq", "2000"], "--tokens 5000: give a multiple of --seq 2000"),
        (["--network", "0"], "--network 0: give GB/s above 0"),
        (["--policy", "rank=2.0"], "rank=2.0"),
        (["--policy", "peft:rank=2"], "policy"),
        (["--engine", "zero"], "--engine 'zero' is unknown; choose of fsdp2, ddp"),
    ],
)
def test_bad_options(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "scale", *arguments])
    assert result.exit_code == 1
    assert words in result.output
