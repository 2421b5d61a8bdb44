"""What people train with, around an applied model: Accelerate's loop and the Trainer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from models import VOCABULARY, assert_close, assert_differ, bases, lora
from situations import EXACT, LOW, ONE_IN_TWO, trained
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainerCallback, TrainingArguments

import loge_kernels as loge


def converted(model: Any, policy: dict[str, Any] | None) -> Any:
    if policy is not None:
        loge.apply(model, **policy)
    return model


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the first precision it was asked for."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


# Accelerate


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(VOCABULARY, (2, 8), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in made]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerates_loop_is_the_one_by_hand(precision: str, fresh_state: None) -> None:
    """Three micro-batches a step, every second forward exact."""
    model, other = (converted(lora(), ONE_IN_TWO) for _ in range(2))
    by_hand = optimizer_of(other)
    for number, batch in enumerate(rows(9)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = other(**batch).loss
        (loss / 3).backward()
        if number % 3 == 2:
            by_hand.step()
            by_hand.zero_grad()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=3)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    for batch in rows(9):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_close(trained(model), trained(other), tolerance=1e-4)


# The Trainer of transformers


class Measured(Trainer):
    """Counts what each forward keeps for the backward, parameters and factors aside."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept: dict[int, Tensor] = {}  # held, so that no address is used again

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().compute_loss(model, *args, **kwargs)
        factors = [module.factors for module in model.modules() if getattr(module, "factors", None) is not None]
        for tensor in (*model.parameters(), *(tensor for each in factors for tensor in each.tensors)):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        self.kept = [*getattr(self, "kept", []), sum(t.untyped_storage().nbytes() for t in kept.values())]
        return loss


class Stop(TrainerCallback):
    """As if killed after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 4


def trainer(out: Path, policy: dict[str, Any] | None, *callbacks: Any, dropout: float = 0.0, **options: Any) -> Any:
    """Over a model that is the same at every call."""
    arguments: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    data: Any = [{"input_ids": row, "labels": row} for batch in rows(8) for row in batch["input_ids"]]
    model = converted(lora(lora_dropout=dropout), policy)
    return Measured(model, TrainingArguments(str(out), **arguments), train_dataset=data, callbacks=[*callbacks])


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=str)
def test_no_more_is_kept_than_by_peft(
    options: dict[str, Any], dropout: float, tmp_path: Path, fresh_state: None
) -> None:
    def kept(policy: dict[str, Any] | None) -> int:
        run = trainer(tmp_path, policy, dropout=dropout, save_strategy="no", max_steps=3, **options)
        run.train()
        return max(run.kept)

    plain, model = kept(None), lora()
    # Rows chosen in backward may need either product: under autocast, the casts of the weight and of 16 directions.
    casts = sum(2 * 16 * sum(model.get_submodule(name).weight.shape) for name in bases(model)) if options else 0
    for policy, more in ((EXACT, 0), (LOW, 0), (ONE_IN_TWO, 0), ({**LOW, "exact_fraction": 0.25}, casts)):
        assert kept(policy) <= plain + more, policy


@pytest.mark.parametrize("policy", [EXACT, LOW, ONE_IN_TWO], ids=["exact", "low rank", "exact every"])
def test_trained_interrupted_and_resumed(policy: dict[str, Any], tmp_path: Path) -> None:
    """A resumed run equals the uninterrupted one: there is nothing of ours in a checkpoint, and it begins with an exact
    forward. Exactly applied, a run equals PEFT's."""
    whole = trainer(tmp_path / "whole", policy)
    whole.train()
    trainer(tmp_path / "parts", policy, Stop()).train()
    resumed = trainer(tmp_path / "parts", policy)
    resumed.train(resume_from_checkpoint=True)
    assert_close(trained(resumed.model), trained(whole.model), 0.0)
    files = {path.name for path in (tmp_path / "parts" / "checkpoint-4").iterdir()}
    peft = trainer(tmp_path / "peft", None)
    peft.train()
    assert files == {path.name for path in (tmp_path / "peft" / "checkpoint-4").iterdir()}
    assert resumed.state.log_history[-1].keys() == peft.state.log_history[-1].keys()
    compare = assert_close if policy is EXACT else assert_differ
    compare(trained(whole.model), trained(peft.model))


def test_the_package_imports_without_transformers() -> None:
    code = (
        "import sys, loge_kernels; assert 'transformers' not in sys.modules; loge_kernels.SwitchLoraCallback; "
        "assert 'transformers' in sys.modules; hasattr(loge_kernels, 'nothing') and sys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
