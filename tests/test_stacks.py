"""What people train with, around a converted model: Accelerate's loop, the Trainer's memory, files for plain PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from models import VOCABULARY, assert_close, llama, logits, lora, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainingArguments

import loge_kernels as loge
from loge_kernels import schedule_of


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
    """Two micro-batches a step, every second step exact, the cheap ones corrected."""
    model, other = lora(), lora()
    for one in (model, other):
        loge.apply(one, 16, exact_every=2)
    by_hand = optimizer_of(other)
    for number, batch in enumerate(rows(8)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = other(**batch).loss
        (loss / 2).backward()
        if number % 2:
            by_hand.step()
            by_hand.zero_grad()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    for batch in rows(8):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    got, expected = (schedule_of(one) for one in (prepared, other))
    assert got is not None
    assert expected is not None
    assert got.step == expected.step == 4
    trained = [{n: p.detach() for n, p in one.named_parameters() if p.requires_grad} for one in (model, other)]
    assert_close(*trained, tolerance=1e-4)
    assert_close(got.state_dict(), expected.state_dict(), tolerance=1e-3)


# Memory


class Measured(Trainer):
    """A Trainer that counts what each forward keeps for the backward, parameters aside."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept: dict[int, Tensor] = {}  # held, so that no address is used again

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().compute_loss(model, *args, **kwargs)
        for p in model.parameters():  # factors are parameters, too
            kept.pop(p.untyped_storage().data_ptr(), None)
        self.kept = [*getattr(self, "kept", []), sum(t.untyped_storage().nbytes() for t in kept.values())]
        return loss


def converted(model: Any, policy: dict[str, Any] | None) -> Any:
    if policy is not None:
        loge.apply(model, **policy)
    return model


def kept_by(policy: dict[str, Any] | None, out: Path, **options: Any) -> list[int]:
    model = converted(lora(lora_dropout=options.pop("dropout")), policy)
    arguments = TrainingArguments(
        str(out),
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    data: Any = [{"input_ids": row[0], "labels": row[0]} for batch in rows(16) for row in [batch["input_ids"]]]
    trained = Measured(model, arguments, train_dataset=data)
    trained.train()
    return trained.kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=str)
def test_no_more_is_kept_than_by_peft(
    options: dict[str, Any], dropout: float, tmp_path: Path, fresh_state: None
) -> None:
    """An exact step that feeds the correction needs the factors beside the weight: under autocast, their casts."""
    plain = max(kept_by(None, tmp_path, dropout=dropout, **options))
    sizes = [m.factors for m in converted(lora(), {"rank": 16}).modules() if getattr(m, "factors", None) is not None]
    casts = sum(2 * (f.left.numel() + f.right.numel()) for f in sizes) if options else 0
    for policy, more in (
        ({"rank": 16}, 0),
        ({"rank": 16, "exact_every": 2}, casts),
        ({"subspace": "dropped", "exact_every": 2}, 0),
        ({"rank": 16, "exact_fraction": 0.25}, casts),
    ):
        assert max(kept_by(policy, tmp_path, dropout=dropout, **options)) <= plain + more, policy


# Files


_WITHOUT_US = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loge_kernels":
            raise ModuleNotFoundError("loge_kernels is not installed here")

sys.meta_path.insert(0, Forbidden())
folder, config, out = sys.argv[1:]
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
base = LlamaForCausalLM(LlamaConfig.from_json_file(config))
base.load_state_dict(load_file(folder + "/base.safetensors"))
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
trained = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
assert "loge_kernels" not in sys.modules
output = trained(input_ids=tokens, labels=tokens)
output.loss.backward()
assert any(p.grad is not None for p in trained.parameters())
save_file({"logits": output.logits.detach()}, out)
"""


def test_adapters_are_pefts_where_this_package_is_not(tmp_path: Path) -> None:
    model = lora()
    loge.apply(model, 16, exact_every=2)
    optimizer = optimizer_of(model)
    for batch in rows(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "loge" not in text.lower()
    assert json.loads(text)["peft_type"] == "LORA"
    assert "loge" not in (tmp_path / "README.md").read_text().lower()
    base = llama()
    base.config.to_json_file(tmp_path / "base.json", use_diff=False)
    save_file({name: t.clone() for name, t in base.state_dict().items()}, tmp_path / "base.safetensors")
    save_file({"tokens": tokens()}, tmp_path / "tokens.safetensors")
    command = [sys.executable, "-c", _WITHOUT_US, tmp_path, tmp_path / "base.json", tmp_path / "out"]
    subprocess.run([str(word) for word in command], check=True, timeout=300, cwd=tmp_path)
    there = load_file(tmp_path / "out")["logits"]
    torch.testing.assert_close(there, logits(model.eval()), rtol=1e-5, atol=1e-5)
