"""Bias correction under DDP: two processes with half a batch each are one process with all of it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from models import assert_close, lora, tokens
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge

STEPS = 4
WORLD = 2
TIMEOUT = timedelta(seconds=60)  # a process that waits for a dead one fails, and the suite goes on


def train(model: Any, adapted: nn.Module, batches: list[Tensor]) -> list[dict[str, Tensor]]:
    """The gradient that the optimizer saw at each step, by parameter name of `adapted`."""
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for batch in batches:
            (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
        seen.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        optimizer.step()
    return seen


def meet(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=TIMEOUT)


def work(rank: int, folder: Path) -> None:
    meet(rank, folder)
    sizes: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *rest, **named)

    distributed.all_reduce = counted
    model = lora()
    loge.apply(model, 16, exact_every=2)
    parallel = DistributedDataParallel(model)
    assert loge.schedule_of(parallel) is not None
    seen = train(parallel, model, [tokens()[rank : rank + 1]])
    # One for each of the exact steps, of every trained parameter.
    assert sizes == [sum(p.numel() for p in model.parameters() if p.requires_grad)] * (STEPS // 2)
    torch.save(seen, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(work, (tmp_path,), nprocs=WORLD)
    model = lora()
    loge.apply(model, 16, exact_every=2)
    expected = train(model, model, [tokens()[:1], tokens()[1:]])
    for rank in range(WORLD):
        for got, right in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert_close(got, right)


def alone(rank: int, folder: Path) -> None:
    meet(rank, folder)
    groups = [distributed.new_group([each]) for each in range(WORLD)]  # both on both ranks, as torch wants it
    model = lora()
    parallel = DistributedDataParallel(model, process_group=groups[rank])
    mine = tokens()[rank : rank + 1]
    batches = [{"input_ids": mine, "labels": mine}]
    loge.apply(parallel, 16, exact_every=2, calibration=batches, refresh_every=3)
    torch.save(train(parallel, model, [mine]), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_the_wrappers_process_group_is_the_one_that_is_averaged_over(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(alone, (tmp_path,), nprocs=WORLD)
    for rank in range(WORLD):
        model, mine = lora(), tokens()[rank : rank + 1]
        loge.apply(model, 16, exact_every=2, calibration=[{"input_ids": mine, "labels": mine}], refresh_every=3)
        for got, right in zip(torch.load(tmp_path / f"{rank}.pt"), train(model, model, [mine]), strict=True):
            assert_close(got, right)


class Branches(nn.Module):
    """A rank's tokens reach one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.below = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.above = nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.above(self.below[expert](x)).square().mean()


def route(rank: int, folder: Path) -> None:
    meet(rank, folder)
    model = Branches()
    loge.apply(model, subspace="dropped", exact_every=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(torch.ones(4, 32), rank).backward()
    mine = {name: p.grad / WORLD for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    schedule = loge.schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    torch.save((schedule.correction.means, mine), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_that_reach_different_parameters(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(route, (tmp_path,), nprocs=WORLD)
    (means, first), (others, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert_close(means, first | second)  # nothing comes through the dropped layer
    assert_close(others, means)
