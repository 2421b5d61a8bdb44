"""Bias correction under DDP: two processes with half a batch each are one process with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import assert_close, lora, tokens
from ranks import WORLD, on_two_ranks
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge

STEPS = 4


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


def work(rank: int) -> list[dict[str, Tensor]]:
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
    return seen


def test_two_processes_are_one(tmp_path: Path) -> None:
    ranks = on_two_ranks(work, tmp_path)
    model = lora()
    loge.apply(model, 16, exact_every=2)
    expected = train(model, model, [tokens()[:1], tokens()[1:]])
    for rank in ranks:
        for got, right in zip(rank, expected, strict=True):
            assert_close(got, right)


def alone(rank: int) -> list[dict[str, Tensor]]:
    groups = [distributed.new_group([each]) for each in range(WORLD)]  # both on both ranks, as torch wants it
    model = lora()
    parallel = DistributedDataParallel(model, process_group=groups[rank])
    mine = tokens()[rank : rank + 1]
    batches = [{"input_ids": mine, "labels": mine}]
    loge.apply(parallel, 16, exact_every=2, calibration=batches, refresh_every=3)
    return train(parallel, model, [mine])


def test_the_wrappers_process_group_is_the_one_that_is_averaged_over(tmp_path: Path) -> None:
    for rank, seen in enumerate(on_two_ranks(alone, tmp_path)):
        model, mine = lora(), tokens()[rank : rank + 1]
        loge.apply(model, 16, exact_every=2, calibration=[{"input_ids": mine, "labels": mine}], refresh_every=3)
        for got, right in zip(seen, train(model, model, [mine]), strict=True):
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


def route(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Branches()
    loge.apply(model, subspace="dropped", exact_every=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(torch.ones(4, 32), rank).backward()
    mine = {name: p.grad / WORLD for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    schedule = loge.schedule_of(model)
    assert schedule is not None
    assert schedule.correction is not None
    return schedule.correction.means, mine


def test_ranks_that_reach_different_parameters(tmp_path: Path) -> None:
    (means, first), (others, second) = on_two_ranks(route, tmp_path)
    assert_close(means, first | second)  # nothing comes through the dropped layer
    assert_close(others, means)
