"""SwitchLoRA interrupted and gone on with, and on two ranks: bit for bit the same run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, llama
from peft import PeftModel
from ranks import on_two_ranks
from switching import STEPS, assert_identical, optimizer_of, state_of, switching, train
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import loge_kernels as loge


def parts_of(optimizer: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state, by where it is."""
    found: dict[str, torch.Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{path}.{key}", each)
        elif value is not None and not isinstance(value, str):
            found[path] = torch.as_tensor(value).clone()

    walk("", {key: value for key, value in optimizer.state_dict().items() if key != "param_groups"})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_own_loop_resumed_is_the_uninterrupted_one(dtype: torch.dtype) -> None:
    model = switching(dtype)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    assert optimizer.switcher.switched > 50

    first = switching(dtype)
    stopped = optimizer_of(first)
    train(first, stopped, stop=STEPS // 2)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": stopped.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    again = switching(dtype)
    resumed = optimizer_of(again)
    train(again, resumed, stop=2)  # all of it must come from the checkpoint
    again.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(again, resumed, start=STEPS // 2)
    assert_identical(state_of(again), state_of(model))
    assert_identical(parts_of(resumed), parts_of(optimizer))


def test_a_fresh_state_holds_no_candidates() -> None:
    model = switching()
    optimizer = optimizer_of(model)
    fresh = optimizer.state_dict()
    layers = fresh["switcher"]["layers"].values()
    assert all(layer[part]["candidates"] is None for layer in layers for part in "AB")
    expected = {place.name: place.A.candidates.clone() for place in optimizer.switcher.places}
    train(model, optimizer, stop=6)
    optimizer.load_state_dict(fresh)
    assert optimizer.switcher.step == 0
    assert_identical({place.name: place.A.candidates for place in optimizer.switcher.places}, expected)


def test_states_that_do_not_fit() -> None:
    refused = {
        "not of a SwitchAdamW": torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]),
        "5 vectors of 64 in the state, 4 of 64 here": optimizer_of(switching(r=5)),
        "seed=1, and this model with seed=0": optimizer_of(switching(seed=1)),
        "other layers": optimizer_of(switching(target_modules=["q_proj"])),
    }
    optimizer = optimizer_of(switching())
    for message, other in refused.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = torch.randint(VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def trainer(out: Path, **options: Any) -> Trainer:
    model = switching(total_steps=None)
    arguments = TrainingArguments(
        **{
            "output_dir": str(out),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **options,
        }
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        optimizers=(optimizer_of(model), None),
        callbacks=[loge.SwitchLoraCallback()],
    )


def test_a_trainer_resumed_is_the_uninterrupted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trainer(tmp_path)
    whole.train()
    assert "SwitchLoRA: 14 layers" in capsys.readouterr().out
    assert whole.optimizer.optimizer.switcher.total_steps == 6
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_identical(state_of(resumed.model), state_of(whole.model))
    assert_identical(parts_of(resumed.optimizer.optimizer), parts_of(whole.optimizer.optimizer))
    assert whole.optimizer.optimizer.switcher.switched > 10
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    assert_identical(state_of(loaded), state_of(whole.model))


def test_a_trainer_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.optimizer = torch.optim.AdamW(one.model.parameters())
    with pytest.raises(ValueError, match="AdamW, which switches nothing"):
        one.train()


def test_another_number_of_steps_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = trainer(tmp_path, max_steps=2, save_strategy="no")
    one.train()
    assert "total_steps" not in caplog.text
    one = trainer(tmp_path, max_steps=2, save_strategy="no")
    one.optimizer.switcher.total_steps = 50
    one.train()
    assert "total_steps=50, and this Trainer takes 2:" in caplog.text


def test_a_checkpoint_without_the_optimizer_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, save_only_model=True, max_steps=3).train()
    assert "cannot go on from this checkpoint" in caplog.text
    trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "without the optimizer's state" in caplog.text


def work(rank: int) -> Any:
    torch.manual_seed(1000 + rank)
    model = switching()
    parallel = DistributedDataParallel(model)
    optimizer = optimizer_of(parallel)
    train(parallel, optimizer, rows=slice(rank, rank + 1))
    assert optimizer.switcher.switched > 50
    return state_of(model), parts_of(optimizer)


def test_two_ranks_switch_alike(tmp_path: Path) -> None:
    (model, state), (other, others) = on_two_ranks(work, tmp_path)
    assert_identical(other, model)
    assert_identical(others, state)
