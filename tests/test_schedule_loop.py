"""A loop of one's own with a `GradScaler` and checkpoints, as README shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import lora, tokens
from safetensors.torch import load_file, save_file

import loge_kernels as loge


def start() -> tuple[Any, torch.optim.Optimizer, list[torch.nn.Parameter]]:
    model = lora()
    loge.apply(model, budget=0.25)
    adapters = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(adapters, lr=1e-2), adapters


def train(model: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: int) -> None:
    schedule = loge.schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    schedule.correction.scaler = scaler
    for _ in range(steps):
        for _ in range(2):  # accumulation
            scaler.scale(model(input_ids=tokens(), labels=tokens()).loss / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_scaled_saved_and_resumed_equals_neither(tmp_path: Path) -> None:
    plain, optimizer, expected = start()
    train(plain, optimizer, torch.amp.GradScaler("cpu", enabled=False), 6)

    model, optimizer, adapters = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # a power of two: nothing is rounded
    train(model, optimizer, scaler, 3)
    save_file(loge.schedule_of(model).state_dict(), tmp_path / "loge.safetensors")  # type: ignore[union-attr]
    states = [optimizer.state_dict(), scaler.state_dict()]

    model, optimizer, resumed = start()
    with torch.no_grad():
        for p, value in zip(resumed, adapters, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(states[0])
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(states[1])
    loge.schedule_of(model).load_state_dict(load_file(tmp_path / "loge.safetensors"))  # type: ignore[union-attr]
    train(model, optimizer, scaler, 3)
    for p, value in zip(resumed, expected, strict=True):
        torch.testing.assert_close(p, value, rtol=1e-5, atol=1e-7)
