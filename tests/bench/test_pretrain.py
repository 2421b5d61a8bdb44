"""`bench pretrain`: runs from one start, what it keeps, and when it is content."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_llama import TEXT

from loge_kernels.bench.pretrain import run as pretrain
from loge_kernels.bench.pretrain import training as pretrain_training
from loge_kernels.bench.pretrain.run import PretrainOptions, best, order_holds, read_rates


@pytest.fixture
def tiny(tmp_path: Path) -> PretrainOptions:
    (tmp_path / "text.py").write_text(TEXT)
    return PretrainOptions(
        rates={"full": (1e-3,), "lora": (1e-3,), "unswitched": (1e-3,), "switchlora": (1e-3,)},
        text=(tmp_path / "text.py",),
        vocab=280,
        hidden=32,
        intermediate=48,
        layers=1,
        heads=2,
        rank=4,
        steps=6,
        seq=16,
        warmup=1,
        checkpoints=2,
        heldout=4,
        device="cpu",
        json=tmp_path / "result.json",
        png=tmp_path / "result.png",
    )


def run(options: PretrainOptions) -> dict:
    return pretrain.run(options, Console(file=io.StringIO(), width=120))


def test_every_method_starts_alike_and_is_kept(tiny: PretrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tiny)
    assert [row["method"] for row in result["rows"]] == ["full", "lora", "unswitched", "switchlora"]
    assert len({round(row["curve"][0]["heldout"], 4) for row in result["rows"]}) == 1
    assert [[point["step"] for point in row["curve"]] for row in result["rows"]] == [[0, 3, 6]] * 4
    full, lora, unswitched, switched = result["rows"]
    assert full["trainable"] == full["parameters"]
    assert lora["trainable"] == unswitched["trainable"] == switched["trainable"] < full["trainable"]
    assert (full["switched"], lora["switched"], unswitched["switched"]) == (None, None, None)
    assert switched["switched"] > 0
    assert tiny.png.stat().st_size > 1000
    assert json.loads(tiny.json.read_text())["passed"] == order_holds(result["rows"])
    monkeypatch.setattr(pretrain, "train", None)  # not run again
    assert run(tiny)["rows"] == result["rows"]
    with pytest.raises(ValueError, match="was made with rank=4, now it is 5"):
        run(replace(tiny, rank=5))


def test_only_the_blocks_have_the_methods_learning_rate(tiny: PretrainOptions) -> None:
    for method in pretrain_training.METHODS:
        model = pretrain_training.build(method, tiny, 280, 0)
        optimizer = pretrain_training._optimizer(method, model, 0.25, 0.125)
        inner, rest = (sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]) == (0.25, 0.125)
        assert rest == 2 * 280 * 32 + 3 * 32
        assert inner + rest == sum(p.numel() for p in model.parameters() if p.requires_grad)


def row(method: str, lr: float, heldout: float, status: str = "ok", seed: int = 0) -> dict:
    return {"method": method, "lr": lr, "seed": seed, "status": status, "curve": [{"step": 1, "heldout": heldout}]}


def test_a_method_is_judged_at_its_best_rate() -> None:
    rows = [row("full", 1, 3.0), row("full", 2, 2.0), row("full", 4, 0.0, "diverged"), row("lora", 1, 2.5)]
    assert best(rows) == {"full": {"heldout": 2.0, "lr": 2}, "lora": {"heldout": 2.5, "lr": 1}}
    assert order_holds([*rows, row("switchlora", 1, 2.2)])
    assert not order_holds([*rows, row("switchlora", 1, 1.9)])
    assert not order_holds([*rows, row("switchlora", 1, 2.5)])
    assert not order_holds([*rows, row("switchlora", 1, 2.2, "diverged")])
    seeds = [row("full", 1, 3.0), row("full", 1, 4.0, seed=1), row("full", 2, 3.4), row("full", 2, 3.4, seed=1)]
    assert best(seeds)["full"] == {"heldout": 3.4, "lr": 2}


def test_the_rate_rises_and_falls() -> None:
    rates = [pretrain_training.rate(step, 100, 10) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == 1.0
    assert 0.1 <= rates[-1] < 0.102


def test_rates_as_typed() -> None:
    assert read_rates(["full=1e-3,2e-3", "lora=1", "full=4e-3"]) == {"full": (1e-3, 2e-3, 4e-3), "lora": (1.0,)}
    with pytest.raises(ValueError, match="METHOD=RATE"):
        read_rates(["1e-3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": {"dora": (1.0,)}}, "--lr dora"),
        ({"steps": 0}, "--steps 0"),
        ({"warmup": 6}, "--warmup 6"),
        ({"checkpoints": 7}, "--checkpoints 7"),
        ({"vocab": 256}, "--vocab 256"),
    ],
)
def test_options_that_cannot_work(tiny: PretrainOptions, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(replace(tiny, **options))


def test_a_run_that_diverges_is_told(tiny: PretrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_training, "token_losses", lambda model, rows: model.lm_head.weight * torch.nan)
    result = run(replace(tiny, rates={"full": (1e-3,)}))
    assert result["rows"][0]["status"] == "diverged"
    assert not result["passed"]
