"""TRL's `SFTTrainer`, whose loss takes the output head's weight and never calls its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama

pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt trl (Python 3.11 or newer)")

from datasets import Dataset
from models import lora
from situations import EXACT, LOW, ONE_IN_TWO
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loge_kernels as loge

POLICIES = {"peft": None, "exact": EXACT, "low": LOW, "every": ONE_IN_TWO}


def norms(policy: dict[str, Any] | None, base: Path, out: Path, checkpointing: bool) -> list[float]:
    """Of the gradients of four steps on the same two rows, with a learning rate of almost nothing."""
    model = lora(AutoModelForCausalLM.from_pretrained(base), r=8)
    if policy is not None:
        loge.apply(model, **policy)
    arguments = SFTConfig(
        str(out),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-12,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"text": tiny_llama.TEXT[200 * i : 200 * i + 100]} for i in range(2)])
    tokenizer = AutoTokenizer.from_pretrained(base)
    trained = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trained.train()
    return [entry["grad_norm"] for entry in trained.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_every_step(tmp_path: Path, checkpointing: bool) -> None:
    base = tiny_llama.save(tmp_path / "base")
    found = {name: norms(policy, base, tmp_path, checkpointing) for name, policy in POLICIES.items()}
    peft, low = found["peft"][0], found["low"][0]
    assert low != pytest.approx(peft, rel=1e-2)
    assert found["exact"] == pytest.approx([peft] * 4, rel=1e-4)
    assert found["every"] == pytest.approx([peft, low, peft, low], rel=1e-4)
