"""Ranks that die, files that end early, processes that are killed: training goes on from what was saved last."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import finetuning
import pytest
import torch
from ranks import WORLD, on_two_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge
from loge_kernels import files
from loge_kernels.files import replacing
from loge_kernels.finetune import FinetuneError, job

STEPS = 8
DIES_AT = 5  # in this step's backward, on rank 1


class Tower(nn.Module):
    """Two layers that train around one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def train(wrap: Any, rows: slice, file: Path, saves: bool, on_step: Any = None) -> list[float]:
    """Train from what `file` holds, if anything, to the last step; the losses of the steps that ran."""
    model = Tower()
    loge.apply(model, 4, targets=["1"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    start = 0
    if file.exists():
        state = load_file(file)
        start = int(state.pop("step"))
        model.load_state_dict(state, strict=False)
    parallel = wrap(model)
    losses = []
    for step in range(start, STEPS):
        if on_step is not None:
            on_step(model, step)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))[rows]
        loss = (parallel(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if saves:
            with replacing(file) as temporary:
                save_file({**{n: p.detach() for n, p in trained.items()}, "step": torch.tensor(step + 1)}, temporary)
    return losses


def work(rank: int, dies: bool) -> list[float]:
    file = Path(os.environ["LOGE_TEST_FILE"])

    def die(gradient: Tensor) -> None:
        while int(load_file(file)["step"]) < DIES_AT:  # the other rank is killed as soon as this one is gone
            time.sleep(0.01)
        os._exit(9)

    def on_step(model: nn.Module, step: int) -> None:
        if dies and rank == 1 and step == DIES_AT:
            next(model.parameters()).register_hook(die)

    return train(DistributedDataParallel, slice(2 * rank, 2 * rank + 2), file, rank == 0, on_step)


def dying(rank: int) -> list[float]:
    return work(rank, dies=True)


def going_on(rank: int) -> list[float]:
    return work(rank, dies=False)


@pytest.mark.slow  # the others wait for it
def test_a_rank_is_killed_in_mid_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.safetensors"
    monkeypatch.setenv("LOGE_TEST_FILE", str(file))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match=r"exit code 9|onnection") as failure:
        on_two_ranks(dying, first)
    assert "imed out" not in str(failure.value)  # the other rank does not wait for the dead one
    assert int(load_file(file)["step"]) == DIES_AT
    losses = torch.tensor(on_two_ranks(going_on, second))
    assert losses.shape == (WORLD, STEPS - DIES_AT)
    whole = train(lambda model: model, slice(None), tmp_path / "none", saves=False)
    torch.testing.assert_close(losses.mean(0), torch.tensor(whole[DIES_AT:]), rtol=1e-4, atol=1e-5)


# Without the rest of the package, whose import takes longer than the test.
WRITER = """
import runpy, sys
from pathlib import Path
replacing = runpy.run_path(sys.argv[2])["replacing"]
for number in range(10**6):
    with replacing(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(bytes([number % 256]) * 3_000_000)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    for pause in (0.0, 0.013, 0.031):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), files.__file__])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        process.kill()
        process.wait(timeout=60)
        data = path.read_bytes()
        assert len(data) == 3_000_000
        assert len(set(data)) == 1


# finetune


@pytest.fixture
def tiny_run(base: Any) -> Any:
    return dataclasses.replace(base, method=("loge",))


def killed(monkeypatch: pytest.MonkeyPatch, options: Any, at: int) -> None:
    """Run with a state on disk after every step, and end without a word in step `at`."""

    class Killed(BaseException):
        pass

    step, count = torch.optim.AdamW.step, iter(range(1, 10**6))

    def dying_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(count) == at:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(job, "KEEP_SECONDS", 0.0)
        patch.setattr(torch.optim.AdamW, "step", dying_step)
        with contextlib.suppress(Killed):
            finetuning.go(options)


def losses(metrics: dict[str, Any]) -> dict[str, list[float]]:
    return {name: method["losses"] for name, method in metrics["methods"].items()}


def test_finetune_killed_and_its_state_damaged(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Goes on from the state before the last step; where the file on disk is damaged, from the one before that."""
    whole, _ = finetuning.go(tiny_run, out=tmp_path / "whole")
    killed(monkeypatch, tiny_run, at=6)  # in the third turn, of lora, loge and back again
    path = Path(tiny_run.out) / "state" / "lora.safetensors"
    data = bytearray(path.read_bytes())
    resumed, printed = finetuning.go(tiny_run, resume=True)
    assert printed.count("going on after step 2") == 2
    assert losses(resumed) == losses(whole)
    assert not path.parent.exists()

    killed(monkeypatch, tiny_run, at=6)
    data[-5] ^= 1  # safetensors itself does not notice
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "loge_kernels"):
        resumed, printed = finetuning.go(tiny_run, resume=True)
    (said,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert "its tensors are not those that were written" in said
    assert "going on from the state before it, at step 1" in said
    assert "LoGE: going on after step 2" in printed  # each from its own
    assert losses(resumed) == losses(whole)

    killed(monkeypatch, tiny_run, at=6)
    for file in path.parent.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FinetuneError, match=r"lora.before.safetensors' is damaged .*; start anew without --resume"):
        finetuning.go(tiny_run, resume=True)
