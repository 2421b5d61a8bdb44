"""TRL's `SFTTrainer`, whose loss takes the output head's weight and never calls its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt trl (Python 3.11 or newer)")

from datasets import Dataset
from models import lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loge_kernels as loge
from loge_kernels import schedule_of

STEPS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("base"))


def trainer(base: Path, out: Path, policy: dict[str, Any] | None, **options: Any) -> Any:
    """An SFTTrainer that sees the same two rows in every step."""
    model = lora(AutoModelForCausalLM.from_pretrained(base), r=8)
    callbacks = [] if policy is None else [loge.LogeCallback(loge.apply(model, **policy))]
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    rows = Dataset.from_list([{"text": tiny_llama.TEXT[200 * i : 200 * i + 100]} for i in range(2)])
    return SFTTrainer(
        model,
        SFTConfig(str(out), **arguments),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=callbacks,
    )


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_cheap_step_is_corrected(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, checkpointing: bool
) -> None:
    """Of one batch and with a learning rate of almost nothing, a corrected cheap step has the exact gradient."""
    norms = {}
    for name, policy in {
        "exact": None,
        "corrected": {"rank": 16, "exact_every": 2},
        "cheap": {"rank": 16},
    }.items():
        options = {"gradient_checkpointing": checkpointing, "learning_rate": 1e-12, "max_steps": 4}
        trained = trainer(base, tmp_path / name, policy, **options)
        trained.train()
        norms[name] = [entry["grad_norm"] for entry in trained.state.log_history if "grad_norm" in entry]
    assert norms["corrected"] == pytest.approx(norms["exact"], rel=1e-4)
    assert norms["cheap"] != pytest.approx(norms["exact"], rel=1e-2)
    assert "bias correction" not in caplog.text


def test_interrupted_and_resumed_equals_uninterrupted(base: Path, tmp_path: Path) -> None:
    policy = {"subspace": "dropped", "exact_every": 2}
    whole = trainer(base, tmp_path / "whole", policy)
    whole.train()
    trainer(base, tmp_path / "parts", policy, max_steps=2).train()
    resumed = trainer(base, tmp_path / "parts", policy)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    schedules = [schedule_of(each.model) for each in (whole, resumed)]
    expected, got = (schedule.state_dict() for schedule in schedules if schedule is not None)
    assert expected.keys() == got.keys()
    assert len(expected) > 1
    assert all(torch.equal(got[name], expected[name]) for name in expected)
