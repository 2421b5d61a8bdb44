"""FSDP2 over a base in 8 bits on two ranks: the same training, and half of the bytes of 16 bits both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, lora
from ranks import Collectives, error_of, on_two_ranks, train
from test_fsdp import by_torch, by_us, layers_of
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import loge_kernels as loge
from loge_kernels.layers.eight_bit_base import EightBitLinear

pytestmark = pytest.mark.slow
STEPS = 4
POLICIES: dict[str, dict[str, Any]] = {
    "int8": {"base_dtype": "int8"},
    "float8": {"base_dtype": "float8"},
    "int8, rank": {"base_dtype": "int8", "rank": 8, "exact_layers": 0.5},
}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def applied(policy: str) -> Any:
    model = lora(llama(torch.bfloat16))
    loge.apply(model, **POLICIES[policy])
    return model


def one(model: Any, rows: slice) -> dict[str, Any]:
    with Collectives() as seen:
        losses = train(model, rows, STEPS)
    ways = {way: seen.total("allgather", way == "backward") // STEPS for way in ("forward", "backward")}
    return {"losses": losses, **ways}


def work(rank: int) -> dict[str, Any]:
    rows = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {"peft": one(by_torch(lora(llama(torch.bfloat16))), rows)}
    for policy in POLICIES:
        found[policy] = one(by_us(applied(policy)), rows)
    found["torch"] = one(by_torch(applied("int8")), rows)
    found["mixed"] = one(by_us(applied("int8"), mp_policy=BF16), rows)
    found["ddp"] = one(DistributedDataParallel(applied("int8")), rows)
    checkpointed = applied("int8")
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    found["checkpointed"] = one(by_us(checkpointed.train()), rows)
    part = applied("int8, rank").train()
    for layer in layers_of(part):
        run = layer.mlp.forward  # a checkpoint around a part of the block
        layer.mlp.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
    found["part"] = one(by_us(part), rows)
    model = by_us(applied("int8"))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    found["loaded again"] = one(model, rows)
    other = lora(llama(torch.bfloat16))
    loge.apply(other, base_dtype="int8" if rank else "float8")
    found["disagreement"] = error_of(lambda: by_us(other))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], policy: str) -> None:
    mean = torch.tensor([rank[policy]["losses"] for rank in ranks]).mean(0)
    alone = torch.tensor(train(applied(policy), slice(None), STEPS))
    assert (mean - alone).abs().max() < 5e-2  # bfloat16, and gradients of half a batch


def test_half_the_bytes_both_ways(ranks: list[dict[str, Any]]) -> None:
    model = applied("int8")
    layers = [module for module in layers_of(model).modules() if isinstance(module, EightBitLinear)]
    weights = sum(layer.weight.numel() for layer in layers)
    rest = sum(p.nbytes for p in layers_of(model).parameters()) - weights
    for rank in ranks:
        for way in ("forward", "backward"):
            outside = rank["peft"][way] - 2 * weights - rest  # embedding, head and last norm
            for name in ("int8", "float8", "torch", "checkpointed"):
                assert rank[name][way] == weights + rest + outside, (name, way)
        assert rank["int8, rank"]["backward"] < rank["peft"]["backward"]
        assert rank["part"]["backward"] == rank["int8"]["backward"]


def test_the_same_by_other_ways(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in ("torch", "checkpointed", "loaded again", "ddp"):
            assert rank[name]["losses"] == pytest.approx(rank["int8"]["losses"], abs=2e-2), name
        assert rank["part"]["losses"] == pytest.approx(rank["int8"]["losses"], abs=2e-2)
        assert rank["mixed"]["losses"] == pytest.approx(rank["int8"]["losses"], abs=5e-2)
        assert "base_dtype='float8' on rank 0, base_dtype='int8' on rank 1" in rank["disagreement"]
