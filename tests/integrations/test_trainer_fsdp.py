"""transformers' Trainer and TRL's SFTTrainer with FSDP2 on two ranks: `apply` before, and the losses of one process."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerating
import pytest
import tiny_llama
from accelerating import POLICIES, as_gpus, ids, model_of
from models import assert_close
from ranks import WORLD, on_two_ranks

pytest.importorskip("accelerate", reason="Accelerate is not installed")

OUT = "LOGE_TEST_OUT"
STEPS, HALF = 8, 4
EFFICIENT = {"cpu_ram_efficient_loading": True}
CONFIG = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def arguments(kind: Any, folder: Path, ranks: int, fsdp: dict[str, Any] | None, **more: Any) -> Any:
    sharding: dict[str, Any] = {}
    if fsdp is not None:
        from accelerate.utils import ParallelismConfig

        sharding = {"fsdp": True, "fsdp_config": CONFIG | fsdp}
        sharding["parallelism_config"] = ParallelismConfig(dp_shard_size=WORLD)
    return kind(
        str(folder),
        per_device_train_batch_size=4 // ranks,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=fsdp is None,
        bf16=False,
        disable_tqdm=True,
        **sharding,
        **more,
    )


def losses_of(trainer: Any, resume: bool = False) -> list[float]:
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trainer(folder: Path, ranks: int, fsdp: dict[str, Any] | None, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = model_of(POLICIES["every"])
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in ids(step)]
    made = arguments(TrainingArguments, folder, ranks, fsdp, train_sampling_strategy="sequential", **more)
    return Trainer(model, made, train_dataset=rows)


def by_sft(folder: Path, ranks: int, fsdp: dict[str, Any] | None, **more: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = model_of(POLICIES["every"])
    # Of one length: the mean over a rank's tokens is then that over all tokens.
    rows = Dataset.from_list([{"text": tiny_llama.TEXT[400:500]} for _ in range(4 * STEPS)])
    made = arguments(SFTConfig, folder, ranks, fsdp, gradient_checkpointing=False, **more)
    tokenizer = AutoTokenizer.from_pretrained(os.environ[accelerating.BASE])
    return SFTTrainer(model, made, train_dataset=rows, processing_class=tokenizer)


def work(rank: int) -> dict[str, Any]:
    out = Path(os.environ[OUT])
    found: dict[str, Any] = {}
    for steps in (HALF, STEPS):  # the second goes on where the first was saved
        with as_gpus(rank):
            trainer = by_trainer(out, WORLD, EFFICIENT, max_steps=steps, save_steps=HALF)
            found["Trainer"] = losses_of(trainer, resume=steps == STEPS)
            found["sharded"] = any(hasattr(p, "placements") for p in trainer.model.parameters())
            if steps == STEPS:
                trainer.save_model(str(out / "adapter"))
    if find_spec("trl") is not None:
        with as_gpus(rank):
            found["SFTTrainer"] = losses_of(by_sft(out / "sft", WORLD, EFFICIENT, max_steps=HALF, save_strategy="no"))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    accelerating.save_base(tmp_path_factory.mktemp("base"))
    os.environ[OUT] = str(tmp_path_factory.mktemp("out"))
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def test_trainer_goes_on_from_its_checkpoint_and_saves_pefts_adapter(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = by_trainer(tmp_path, 1, None, max_steps=STEPS, save_strategy="no")
    alone = losses_of(trainer)
    for rank in ranks:
        assert rank["sharded"]
        assert rank["Trainer"] == pytest.approx(alone, abs=1e-4)
    base = AutoModelForCausalLM.from_pretrained(os.environ[accelerating.BASE])
    loaded = PeftModel.from_pretrained(base, Path(os.environ[OUT]) / "adapter").state_dict()
    trained = trainer.model.state_dict()
    assert_close(dict(loaded), {name: trained[name] for name in loaded}, 1e-2)


def test_sft_trainer(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt trl (Python 3.11 or newer)")
    alone = losses_of(by_sft(tmp_path, 1, None, max_steps=HALF, save_strategy="no"))
    for rank in ranks:
        assert rank["SFTTrainer"] == pytest.approx(alone, abs=1e-4)
