"""DistributedDataParallel on two ranks: the same training, nothing sent for factors, the reduction beside backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import lora, tokens
from ranks import broadcasts, on_two_ranks, train
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge

STEPS = 20
POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"exact_dtype": None},
    "low rank": {"rank": 16, "exact_dtype": None},
    "exact every": {"rank": 16, "exact_every": 3, "exact_dtype": None},
    "int8": {"exact_dtype": "int8"},
    "calibrated": {"rank": 16, "exact_dtype": None, "calibration": [{"input_ids": tokens(), "labels": tokens()}]},
}


def applied(name: str) -> Any:
    model = lora()
    loge.apply(model, **POLICIES[name])
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
    found: dict[str, Any] = {}
    for name in ("peft", *POLICIES):
        model = lora() if name == "peft" else applied(name)
        with broadcasts() as found[f"{name} broadcasts"]:
            found[name] = train(DistributedDataParallel(model), rows, STEPS)
    found["peft events"] = events_of_a_step(lora(), rows)
    found["low rank events"] = events_of_a_step(applied("low rank"), rows)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", POLICIES)
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    together, peft = (torch.tensor([rank[kind] for rank in ranks]).mean(0) for kind in (name, "peft"))
    assert (together - torch.tensor(train(applied(name), slice(None), STEPS))).abs().max() < 1e-3
    assert ((together - peft).abs().max() > 1e-4) == (name != "exact")
    for rank in ranks:  # nothing is sent for factors
        assert rank[f"{name} broadcasts"] == rank["peft broadcasts"]
        assert sum(rank["peft broadcasts"]) > 0


def test_gradients_are_reduced_while_backward_runs(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        peft, ours = rank["peft events"], rank["low rank events"]
        assert sorted(ours) == sorted(peft)
        assert ours.count("r") > 2
        assert "g" in ours[ours.index("r") :]
        assert abs(ours.index("r") - peft.index("r")) <= 1  # an adapter's A and B come in another order
