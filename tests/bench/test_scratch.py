"""`bench scratch`: a model from nothing that `bench fidelity --model` takes."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from rich.console import Console

from loge_kernels.bench.pretrain.scratch import ScratchOptions, run
from loge_kernels.finetune import FinetuneOptions, models


@pytest.fixture
def options(tmp_path: Path) -> ScratchOptions:
    text = tmp_path / "text.py"
    text.write_text(tiny_llama.TEXT)
    return ScratchOptions(
        out=tmp_path / "model",
        hidden=32,
        intermediate=48,
        layers=2,
        heads=4,
        kv_heads=2,
        vocab=512,
        steps=30,
        batch=4,
        seq=32,
        lr=5e-3,
        text=(text,),
        device="cpu",
    )


def test_it_learns_and_is_loaded(options: ScratchOptions) -> None:
    result = run(options, Console(file=io.StringIO()))
    assert result["heldout"] < 4.0  # log(512) is 6.2
    loaded = models.load(FinetuneOptions(model=str(options.out), seq=32), torch.float32)
    assert sum(p.numel() for p in loaded.model.parameters()) == result["parameters"]
    assert loaded.model.config.num_hidden_layers == 2
    text = tiny_llama.TEXT[:40]
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 36}, "--hidden 36 --heads 4 --kv-heads 2"),
        ({"kv_heads": 3}, "--kv-heads 3"),
        ({"layers": 0}, "--layers 0"),
        ({"vocab": 256}, "--vocab 256"),
        ({"lr": 0.0}, "--lr 0"),
    ],
)
def test_what_cannot_be(options: ScratchOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(options, **changes))


def test_no_folder_is_overwritten(options: ScratchOptions) -> None:
    options.out.mkdir()
    (options.out / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        run(options)
