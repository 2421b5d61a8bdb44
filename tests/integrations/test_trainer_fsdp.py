"""transformers' Trainer and TRL's SFTTrainer with FSDP2 on two ranks: `apply` before, and the losses of one process."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerating
import pytest
import tiny_llama
import torch
from accelerating import POLICIES, as_gpus, ids, model_of
from models import assert_close
from ranks import WORLD, Collectives, on_two_ranks

import loge_kernels as loge

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytestmark = pytest.mark.slow

OUT = "LOGE_TEST_OUT"
STEPS, FEW = 100, 6
EFFICIENT, WHOLE = {"cpu_ram_efficient_loading": True}, {"cpu_ram_efficient_loading": False}
CONFIG = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
OURS = {"auto_wrap_policy": "NO_WRAP"}  # Accelerate leaves alone what is sharded, but looks for layers first


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


class Killed(Exception):
    """What ends a run between two checkpoints."""


def kill_at(step: int) -> Any:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == step:
                raise Killed

    return Kill()


def losses_of(trainer: Any, resume: bool = False) -> list[float]:
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trainer(
    folder: Path,
    ranks: int,
    fsdp: dict[str, Any] | None,
    policy: str,
    ours: bool = False,
    callbacks: Any = None,
    **more: Any,
) -> Any:
    """`ours`: sharded by `loge.fully_shard` before the Trainer comes."""
    from transformers import Trainer, TrainingArguments

    made = arguments(TrainingArguments, folder, ranks, fsdp, train_sampling_strategy="sequential", **more)
    model = model_of(POLICIES[policy])
    if ours and fsdp is not None:
        loge.fully_shard(model)
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in ids(step)]
    return Trainer(model, made, train_dataset=rows, callbacks=callbacks)


def goes_on(rank: int, name: str, steps: int, fsdp: dict[str, Any], policy: str, ours: bool = False) -> dict[str, Any]:
    """A run that is killed after half of its steps, and another that goes on from its checkpoint and is exported."""
    folder = Path(os.environ[OUT]) / name
    settings = {"max_steps": steps, "save_steps": steps // 2, "ours": ours}
    with as_gpus(rank):
        trainer = by_trainer(folder, WORLD, fsdp, policy, **settings, callbacks=[kill_at(steps // 2 + 1)])
        with pytest.raises(Killed):
            trainer.train()
    with as_gpus(rank), Collectives() as collectives:
        trainer = by_trainer(folder, WORLD, fsdp, policy, **settings)
        found: dict[str, Any] = {"losses": losses_of(trainer, resume=True)}
        found["gathered in backward"] = collectives.total("allgather", backward=True)
        found["sharded"] = any(hasattr(p, "placements") for p in trainer.model.parameters())
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(folder / "adapter"))
    return found


def by_sft(folder: Path, ranks: int, fsdp: dict[str, Any] | None, policy: str, **more: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = model_of(POLICIES[policy])
    # Of one length: the mean over a rank's tokens is then that over all tokens.
    rows = Dataset.from_list([{"text": tiny_llama.TEXT[400:500]} for _ in range(4 * FEW)])
    made = arguments(SFTConfig, folder, ranks, fsdp, gradient_checkpointing=False, **more)
    tokenizer = AutoTokenizer.from_pretrained(os.environ[accelerating.BASE])
    return SFTTrainer(model, made, train_dataset=rows, processing_class=tokenizer)


TRAINERS = {"Trainer": by_trainer, "Trainer after loge's": partial(by_trainer, ours=True), "SFTTrainer": by_sft}
SHORT: dict[str, Any] = {"max_steps": FEW, "save_strategy": "no"}


def work(rank: int) -> dict[str, Any]:
    found = {
        "Trainer": goes_on(rank, "Trainer", STEPS, EFFICIENT, "every"),
        "torch's": goes_on(rank, "torch's", FEW, WHOLE, "low"),
        "loge's": goes_on(rank, "loge's", FEW, WHOLE | OURS, "low", ours=True),
    }
    for kind, by in TRAINERS.items():
        for policy in POLICIES if kind != "SFTTrainer" or find_spec("trl") is not None else ():
            with as_gpus(rank):
                fsdp = WHOLE | OURS if "loge" in kind else WHOLE if policy == "calibrated" else EFFICIENT
                trainer = by(Path(os.environ[OUT]) / kind, WORLD, fsdp, policy, **SHORT)
                found[f"{kind}, {policy}"] = {"losses": losses_of(trainer)}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    accelerating.save_base(tmp_path_factory.mktemp("base"))
    os.environ[OUT] = str(tmp_path_factory.mktemp("out"))
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def difference(ranks: list[dict[str, Any]], setting: str, alone: list[float]) -> float:
    """The largest of any step, from one process."""
    got = torch.tensor([rank[setting]["losses"] for rank in ranks])
    assert got.shape[1] == len(alone)
    found = (got - torch.tensor(alone)).abs().max().item()
    print(f"{setting}: largest difference in {len(alone)} steps {found:.1e}")
    return found


@pytest.mark.parametrize(
    ("setting", "policy", "steps"), [("Trainer", "every", STEPS), ("torch's", "low", FEW), ("loge's", "low", FEW)]
)
def test_a_killed_run_goes_on_and_peft_loads_its_adapter(
    ranks: list[dict[str, Any]], tmp_path: Path, setting: str, policy: str, steps: int
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = by_trainer(tmp_path, 1, None, policy, max_steps=steps, save_strategy="no")
    assert difference(ranks, setting, losses_of(trainer)) < 1e-3
    assert all(rank[setting]["sharded"] for rank in ranks)
    base = AutoModelForCausalLM.from_pretrained(os.environ[accelerating.BASE])
    loaded = PeftModel.from_pretrained(base, Path(os.environ[OUT]) / setting / "adapter").state_dict()
    trained = trainer.model.state_dict()
    assert_close(dict(loaded), {name: trained[name] for name in loaded}, 1e-2)


def test_a_model_that_loge_sharded_gathers_no_weights_in_backward(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, torchs = (rank[name]["gathered in backward"] for name in ("loge's", "torch's"))
        print(f"bytes gathered in backward: {ours} by loge.fully_shard, {torchs} by Accelerate")
        assert 0 < ours < 0.75 * torchs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", TRAINERS)
def test_every_policy(ranks: list[dict[str, Any]], tmp_path: Path, kind: str, policy: str) -> None:
    if kind == "SFTTrainer":
        pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt trl (Python 3.11)")
    alone = losses_of(TRAINERS[kind](tmp_path, 1, None, policy, **SHORT))
    assert difference(ranks, f"{kind}, {policy}", alone) < 1e-3
