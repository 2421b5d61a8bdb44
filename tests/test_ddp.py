"""DistributedDataParallel on two ranks: the same training, nothing sent for factors, the reduction beside backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import lora
from ranks import on_two_ranks, train
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge

RANK = 16
STEPS = 20
POLICY: dict[str, Any] = {"exact_every": 3}  # with its correction, the default


def applied(**options: Any) -> Any:
    model = lora()
    loge.apply(model, RANK, **options)
    return model


def events_of_a_step(model: Any, rows: slice) -> list[str]:
    """Gradients as they are ready ("g") and buckets as they are reduced ("r"), with buckets of 8 KiB."""
    wrapped = DistributedDataParallel(model, bucket_cap_mb=2**-7)
    seen: list[str] = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient: seen.append("g"))

    def reduce(state, bucket):  # no annotations: DDP would read them
        seen.append("r")
        whole = bucket.buffer().div_(distributed.get_world_size())
        future = distributed.all_reduce(whole, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, reduce)
    train(wrapped, rows, 2)  # DDP orders its buckets after the first step
    seen.clear()
    train(wrapped, rows, 1)
    return seen


def work(rank: int) -> dict[str, Any]:
    rows = slice(2 * rank, 2 * rank + 2)
    sent: list[int] = []
    broadcast = distributed._broadcast_coalesced

    def counted(group: Any, tensors: list[Tensor], *rest: Any) -> Any:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        return broadcast(group, tensors, *rest)

    distributed._broadcast_coalesced = counted
    found: dict[str, Any] = {}
    for name, model in (("peft", lora()), ("loge", applied()), ("corrected", applied(**POLICY))):
        sent.clear()
        found[name] = train(DistributedDataParallel(model), rows, STEPS)
        found[f"{name} broadcasts"] = list(sent)
    found["peft events"] = events_of_a_step(lora(), rows)
    found["loge events"] = events_of_a_step(applied(), rows)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "options"), [("loge", {}), ("corrected", POLICY)])
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], name: str, options: dict[str, Any]) -> None:
    together = torch.tensor([rank[name] for rank in ranks]).mean(0)
    assert (together - torch.tensor(train(applied(**options), slice(None), STEPS))).abs().max() < 1e-3
    exact = torch.tensor([rank["peft"] for rank in ranks]).mean(0)
    assert (together - exact).abs().max() > 1e-3  # backward is the low-rank one


@pytest.mark.parametrize("name", ["loge", "corrected"])
def test_factors_are_not_broadcast(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[f"{name} broadcasts"] == rank["peft broadcasts"]
        assert sum(rank["peft broadcasts"]) > 0


def test_gradients_are_reduced_while_backward_runs(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        peft, ours = rank["peft events"], rank["loge events"]
        assert sorted(ours) == sorted(peft)
        assert ours.count("r") > 2
        assert "g" in ours[ours.index("r") :]
        assert abs(ours.index("r") - peft.index("r")) <= 1  # an adapter's A and B come in another order


def test_remove_tells_ddp_nothing() -> None:
    model = lora()
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    loge.apply(model, RANK)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert ignored[0] == "mine"
    assert {n for n, p in model.named_parameters() if ".factors." in n} == set(ignored[1:])
    loge.remove(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]
    other = applied()
    loge.remove(other)
    assert not hasattr(other, "_ddp_params_and_buffers_to_ignore")


def long_run(rank: int) -> list[float]:
    return train(DistributedDataParallel(applied(**POLICY)), slice(2 * rank, 2 * rank + 2), 200)


@pytest.mark.slow
def test_200_steps(tmp_path: Path) -> None:
    together = torch.tensor(on_two_ranks(long_run, tmp_path)).mean(0)
    assert (together - torch.tensor(train(applied(**POLICY), slice(None), 200))).abs().max() < 1e-3
