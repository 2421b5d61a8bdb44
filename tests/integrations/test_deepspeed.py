"""DeepSpeed's ZeRO on two ranks: stages 1 and 2 train as one process, stage 3 with exact layers alone.

DeepSpeed is in no extra: pip builds it, and Accelerate and transformers take other paths where it is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from models import lora, tokens
from ranks import batch, error_of, on_two_ranks, train
from torch import Tensor
from zero import deepspeed_on, engine

import loge_kernels as loge

if find_spec("deepspeed") is None:  # not imported here: it would choose its accelerator
    pytest.skip("DeepSpeed is not installed: pip install -c constraints.txt deepspeed", allow_module_level=True)
pytestmark = pytest.mark.slow

STEPS = 6
LOW: dict[str, Any] = {"rank": 16, "exact_dtype": None}
POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"exact_dtype": None},
    "int8": {"exact_dtype": "int8"},
    "low": LOW,
    "upper": {**LOW, "exact_layers": 0.5},
    "residual": {**LOW, "residual": 0.2},
    "every": {**LOW, "exact_every": 2},
    "calibrated": {**LOW, "calibration": [{"input_ids": tokens(), "labels": tokens()}]},
}
EXACT = ("exact", "int8")
FACTORS = [name for name in POLICIES if name not in EXACT]


def applied(name: str) -> Any:
    model = lora().train()
    if name != "peft":
        loge.apply(model, **POLICIES[name])
    return model


def losses(model: Any, rows: slice) -> list[float]:
    """Of every step on these rows of its batch, by DeepSpeed's own backward and step."""
    found = []
    for step in range(STEPS):
        ids = batch(step)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        model.backward(loss)
        model.step()
        found.append(loss.item())
    return found


def work(rank: int) -> dict[str, Any]:
    with deepspeed_on(rank):
        rows = slice(2 * rank, 2 * rank + 2)
        found: dict[str, Any] = {}
        for stage in (1, 2, 3):
            for name in POLICIES if stage < 3 else EXACT:
                found[f"{name}, {stage}"] = losses(engine(applied(name), stage), rows)
        for name in FACTORS:
            model = engine(applied(name), 3)
            found[f"{name}, 3"] = error_of(lambda model=model: losses(model, rows))
        partitioned = engine(lora().train(), 3)
        found["before apply"] = error_of(lambda: loge.apply(partitioned.module))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@cache
def alone(name: str) -> Tensor:
    return torch.tensor(train(applied(name), slice(None), STEPS))


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage in (1, 2, 3) for name in (POLICIES if stage < 3 else EXACT)]
)
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], stage: int, name: str) -> None:
    together = torch.tensor([rank[f"{name}, {stage}"] for rank in ranks]).mean(0)
    found = (together - alone(name)).abs().max().item()
    print(f"largest difference {found:.1e}")
    assert found < 1e-3
    if name != "exact":
        assert (together - alone("peft")).abs().max() > 1e-4, "the policy is in force"


def test_stage_3_refuses_factors_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in FACTORS:
            assert "_proj', which has factors, is partitioned by DeepSpeed ZeRO-3" in rank[f"{name}, 3"]
        assert "its weight is partitioned by DeepSpeed ZeRO-3: use stage 1 or 2" in rank["before apply"]
