"""Gloo ranks on this machine, what they train, and what they sent each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed

from loge_kernels.bench.measure.collectives import Collectives
from loge_kernels.op import linear

WORLD = 2
TIMEOUT = timedelta(seconds=120)  # a process that waits for a dead one fails, and the suite goes on


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """`on_ranks` on two."""
    return on_ranks(work, folder, WORLD)


def on_ranks(work: Callable[[int], Any], folder: Path, world: int) -> list[Any]:
    """What `work(rank)`, a module's function, returned on each rank: tensors, numbers and strings in containers."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ranks are forks of a process that has imported what they need and has done nothing else: importing it in each of
    # them takes longer than most of their work.
    multiprocessing.set_forkserver_preload(["peft", "transformers", "loge_kernels", "torch.distributed.fsdp"])
    mp.start_processes(_rank, (work, folder, dict(os.environ), world), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _rank(rank: int, work: Callable[[int], Any], folder: Path, environment: dict[str, str], world: int) -> None:
    os.environ.update(environment)  # the process that forked has that of its own start
    torch.set_num_threads(1)
    linear._SMALL_ON_CPU = -1  # as in conftest.py
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=TIMEOUT)
    # `work` has returned, and what it wrapped is gone, before the group ends: DDP's reducer, destroyed afterwards, may
    # wait for ever.
    torch.save(work(rank), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def launched(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The variables that a launcher gives to this rank."""
    for name in ("RANK", "LOCAL_RANK"):
        patch.setenv(name, str(rank))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        patch.setenv(name, str(WORLD))


def batch(step: int) -> Tensor:
    """Four sequences, of which each rank has two."""
    from models import VOCABULARY  # it brings transformers and PEFT, which not every rank of every test needs

    return torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(step % 5))


def train(model: Any, rows: slice, steps: int, lr: float = 1e-3, batch: Callable[[int], Tensor] = batch) -> list[float]:
    """The loss of every step on these rows of its batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        ids = batch(step)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_counted(model: Any, rows: slice, steps: int) -> tuple[list[float], list[Collectives]]:
    """The loss of every step, and what it sent."""
    begins: list[int] = []
    with Collectives() as seen:
        model.register_forward_pre_hook(lambda *args: begins.append(len(seen.sent)), prepend=True)  # before FSDP's
        losses = train(model, rows, steps)
    parts = [Collectives() for _ in begins]
    for part, begin, end in zip(parts, begins, [*begins[1:], None], strict=True):
        part.sent = seen.sent[begin:end]
    return losses, parts


@contextmanager
def broadcasts() -> Iterator[list[int]]:
    """The bytes of each broadcast of a DistributedDataParallel in the block."""
    sent: list[int] = []
    broadcast = distributed._broadcast_coalesced

    def counted(group: Any, tensors: list[Tensor], *rest: Any) -> Any:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        return broadcast(group, tensors, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_broadcast_coalesced", counted)
        yield sent


def error_of(call: Callable[[], Any]) -> str:
    """The message of the ValueError that `call` raises in a rank, to be looked at where the test is; "" for none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
