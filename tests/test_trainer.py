"""`LogeCallback` in a real `transformers.Trainer`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from models import VOCABULARY, llama, lora, tokens
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import loge_kernels as loge
from loge_kernels import schedule_of

FILE = "loge_schedule.safetensors"
STEPS = 6


class Rows(Dataset):
    """Thirty-two sequences of 8 tokens."""

    def __init__(self) -> None:
        self.rows = torch.randint(VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Stop(TrainerCallback):
    """As if killed after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.at


def trainer(out: Path, *callbacks: Any, callback: bool = True, policy: Any = None, **options: Any) -> Trainer:
    """A Trainer over a model that is the same at every call: every 2nd step exact, corrected."""
    model = lora()
    report = loge.apply(model, **({"rank": 16, "exact_every": 2, "correction": 0.5} if policy is None else policy))
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    ours = [loge.LogeCallback(report)] if callback else []
    return Trainer(model, TrainingArguments(str(out), **arguments), train_dataset=Rows(), callbacks=[*ours, *callbacks])


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def assert_same(trained: Trainer, other: Trainer) -> None:
    """Losses, adapters and schedule, bit for bit."""
    assert losses(trained) == losses(other)
    schedules = [schedule_of(each.model) for each in (trained, other)]
    ours, theirs = ({n: p for n, p in each.model.named_parameters() if p.requires_grad} for each in (trained, other))
    states = [schedule.state_dict() for schedule in schedules if schedule is not None]
    for got, expected in ((ours, theirs), states):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run without interruption."""
    torch.set_num_threads(1)
    trained = trainer(tmp_path_factory.mktemp("whole"))
    trained.train()
    return trained


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that ended after its checkpoint of step 3."""
    trainer(tmp_path / "out", Stop(3)).train()
    return tmp_path / "out"


@pytest.mark.parametrize("restore", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(whole: Trainer, stopped: Path, restore: bool) -> None:
    resumed = trainer(stopped, restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)
    schedule = schedule_of(resumed.model)
    assert schedule is not None
    assert schedule.step == STEPS
    # And from a checkpoint that a resumed run has made.
    with safe_open(stopped / "checkpoint-6" / FILE, framework="pt") as file:
        token = file.metadata()["token"]
    kept = json.loads((stopped / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["LogeCallback"]["attributes"]["token"] == token


def test_the_schedule_matters(whole: Trainer, stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without its file a resumed run says so, and is another one."""
    (stopped / "checkpoint-3" / FILE).unlink()
    resumed = trainer(stopped)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[:4] == losses(whole)[:4]
    assert losses(resumed)[4:] != losses(whole)[4:]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "loge_kernels"]
    for words in ("resuming at step 3", f"no {FILE}", str(stopped / "checkpoint-3"), "resume_from", "at step 0"):
        assert words in message


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, Stop(3), callback=False).train()
    assert not (tmp_path / "checkpoint-3" / FILE).exists()
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "made without LogeCallback" in caplog.text
    assert (tmp_path / "checkpoint-6" / FILE).exists()


def test_a_checkpoint_elsewhere(
    whole: Trainer, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found where the arguments say, and one of another run of the same name is not taken for it."""
    moved, out = tmp_path / "moved", tmp_path / "another"
    shutil.copytree(stopped / "checkpoint-3", moved)
    resumed = trainer(out, resume_from_checkpoint=str(moved))
    resumed.train(resume_from_checkpoint=str(moved))
    assert_same(resumed, whole)
    told = trainer(out, loge.LogeCallback(resume_from=moved), callback=False)
    told.train(resume_from_checkpoint=str(moved))
    assert_same(told, whole)
    assert "without its schedule" not in caplog.text
    trainer(out, Stop(3), seed=1).train()
    assert (out / "checkpoint-3" / FILE).exists()
    trainer(out, Stop(4)).train(resume_from_checkpoint=str(moved))
    assert "without its schedule" in caplog.text


@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_are_counted_once(tmp_path: Path, accumulate: int) -> None:
    """Through Accelerate's wrapper of the optimizer, one count for every optimizer step."""
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            counts.append((state.global_step, schedule_of(model).step))  # type: ignore[union-attr]

    trainer(tmp_path, Count(), gradient_accumulation_steps=accumulate, max_steps=3).train()
    assert counts == [(1, 1), (2, 2), (3, 3)]


def test_a_skipped_step_of_accelerate_is_not_counted(tmp_path: Path) -> None:
    """Accelerate's wrapper with a scaler, whose first step overflows; the callback tells the correction of it."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    prepared = trainer(tmp_path)
    model, schedule = prepared.model, schedule_of(prepared.model)
    assert schedule is not None
    assert schedule.correction is not None
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(adapters), device_placement=False, scaler=scaler)
    prepared.callback_handler.optimizer = optimizer
    prepared.callback_handler.on_train_begin(prepared.args, prepared.state, prepared.control)
    assert schedule.correction.scaler is scaler
    for overflow, count in ((True, 0), (False, 1), (False, 2)):
        optimizer.zero_grad()
        scaler.scale(model(input_ids=tokens(), labels=tokens()).loss).backward()
        if overflow:
            adapters[0].grad.fill_(torch.inf)
        optimizer.step()
        assert (schedule.step, optimizer.step_was_skipped) == (count, overflow)


def test_dropped_layers_have_no_energy_to_report() -> None:
    model = lora()
    report = loge.apply(model, subspace="dropped", exact_every=2)
    printed = loge.LogeCallback(report)._summary(loge.schedule_of(model))
    assert "one step in 2 exact" in printed
    assert "energy" not in printed


def test_figures_in_the_log(tmp_path: Path) -> None:
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trained = trainer(tmp_path, Reader())
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["loge_exact_steps"] for entry in entries] == [1, 1, 2, 2, 3, 3]
    energies = [layer.factors.energy for layer in trained.model.modules() if getattr(layer, "factors", None)]
    for entry, read in zip(entries, seen, strict=False):
        assert entry["loge_energy"] == pytest.approx(sum(energies) / len(energies))
        assert read["loge_exact_steps"] == entry["loge_exact_steps"]
        assert "loge_refreshes" not in entry
    # The first step of each kind is left out.
    assert not {"loge_exact_step_s", "loge_cheap_step_s"} & set(entries[1])
    last = entries[-1]
    share = 1 - last["loge_cheap_step_s"] / last["loge_exact_step_s"]
    assert last["loge_step_time_saving"] == pytest.approx(share / 2)
    kept = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert "loge_step_time_saving" in kept[5]


def test_refreshes_in_the_log(tmp_path: Path) -> None:
    row = Rows()[0]["input_ids"][None]
    policy = {"calibration": [{"input_ids": row, "labels": row}], "refresh_every": 2}
    trained = trainer(tmp_path, policy=policy, max_steps=4)
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["loge_refreshes"] for entry in entries] == [0, 1, 1, 2]
    assert not any("loge_exact_steps" in entry for entry in entries)


def test_report_and_adapters(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = trainer(tmp_path / "second", max_steps=1)
    trained.train()
    printed = capsys.readouterr().out
    for words in ("linear layers", "flops saved", "mean energy captured 0.", "one step in 2 exact", "corrected"):
        assert words in printed
    # PEFT's names alone: another process reads them with PEFT alone.
    saved = load_file(stopped / "checkpoint-3" / "adapter_model.safetensors")
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in saved)
    alone = PeftModel.from_pretrained(llama(), str(stopped / "checkpoint-3"))
    alone(input_ids=tokens())
    assert not any(type(module).__module__.startswith("loge_kernels") for module in alone.modules())


def test_every_step_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a schedule there is nothing to save, and nothing to miss."""
    trainer(tmp_path, Stop(3), policy={"rank": 16}).train()
    assert not (tmp_path / "checkpoint-3" / FILE).exists()
    trainer(tmp_path, policy={"rank": 16}).train(resume_from_checkpoint=True)
    assert "no exact steps" in capsys.readouterr().out


def test_subspaces_that_follow_the_gradient_without_exact_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Rows()[0]["input_ids"][None]
    policy = {"calibration": [{"input_ids": row, "labels": row}], "refresh_every": 2}
    trainer(tmp_path, loge.LogeCallback(), callback=False, policy=policy, max_steps=1).train()
    assert "LoGE: no exact steps; subspaces refreshed every 2 steps" in capsys.readouterr().out


def test_means_of_another_adapter(stopped: Path) -> None:
    resumed = trainer(stopped)
    target = resumed.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default")
    target.weight = torch.nn.Parameter(torch.zeros(2, 64))
    callback = next(each for each in resumed.callback_handler.callbacks if isinstance(each, loge.LogeCallback))
    state = type(resumed.state).load_from_json(str(stopped / "checkpoint-3" / "trainer_state.json"))
    with pytest.raises(ValueError, match=r"up_proj.lora_A.default.weight has shape \(4, 64\)"):
        callback.on_train_begin(resumed.args, state, resumed.control, model=resumed.model)


def test_the_package_imports_without_transformers() -> None:
    code = (
        "import sys, loge_kernels; assert 'transformers' not in sys.modules; loge_kernels.LogeCallback; "
        "assert 'transformers' in sys.modules; hasattr(loge_kernels, 'nothing') and sys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
