"""Tensor-parallel plans of torch and of transformers: refused on every rank alike, before and after `apply`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import accelerating
import pytest
from models import lora, tokens
from peft import LoraConfig, get_peft_model
from ranks import WORLD, error_of, on_two_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

import loge_kernels as loge

pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers shards no tensors by DTensor")

POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"exact_dtype": None},
    "int8": {"exact_dtype": "int8"},
    "low": {"rank": 16, "exact_dtype": None},
    "every": {"rank": 16, "exact_dtype": None, "exact_every": 2},
    "calibrated": {"rank": 16, "exact_dtype": None, "calibration": [{"input_ids": tokens(), "labels": tokens()}]},
}
LAYER = "base_model.model.model.layers.1"
COLUMNS = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])  # PEFT 0.21's adapters over rows do not run
STYLES = {"mlp.up_proj": (ColwiseParallel, "colwise_gather_output"), "mlp.down_proj": (RowwiseParallel, "rowwise_rep")}


def loss_of(model: Any) -> float:
    """Of a step whose backward ran: no rank waits for another."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.item()


def applied(policy: dict[str, Any]) -> Any:
    model = lora()
    loge.apply(model, **policy)
    return model


def planned(path: str, style: str) -> dict[str, str]:
    """As transformers resolves a plan: the module and its parameter."""
    return {path: style, f"{path}.weight": style}


def refusals(ranks: int) -> dict[str, str]:
    """What a plan over one layer of an applied model says, or else a step."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (ranks,))
    found = {}
    for policy, options in POLICIES.items():
        for name, styles in STYLES.items():
            path = f"{LAYER}.{name}.base_layer"
            calls = {
                "torch": partial(parallelize_module, applied(options), mesh, {path: styles[0]()}),
                "transformers": partial(apply_tensor_parallelism, applied(options), mesh, planned(path, styles[1])),
            }
            for kind, call in calls.items():
                found[f"{kind}, {policy}, {name}"] = error_of(lambda call=call: loss_of(call()))
    return found


def work(rank: int) -> dict[str, Any]:
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_RANK"] = str(rank)
    base = os.environ[accelerating.BASE]
    model = AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(tp_size=WORLD))
    peft = get_peft_model(model, COLUMNS)
    return {
        "columns": error_of(lambda: loge.apply(peft)),
        "rows": error_of(lambda: loge.apply(peft, targets=["o_proj", "down_proj"])),
        "loss": loss_of(peft),
        "refusals": refusals(WORLD),
    }


def check(said: dict[str, str]) -> None:
    for policy in POLICIES:
        for name in STYLES:
            by_torch, by_transformers = (said[f"{kind}, {policy}, {name}"] for kind in ("torch", "transformers"))
            path, out = f"'{LAYER}.{name}'", "out of the plan or out of targets="
            assert by_torch.startswith(f"layer {path}, which loge_kernels.apply has converted, cannot be split by a te")
            assert f"of layer {path} is a DTensor with placements (Shard" in by_transformers
            assert "tensor parallelism is not supported" in by_transformers
            assert out in by_torch
            assert out in by_transformers


@pytest.mark.usefixtures("one_rank")
def test_a_plan_over_an_applied_model() -> None:
    check(refusals(1))


@pytest.mark.slow
def test_on_two_ranks_all_refuse_and_what_is_refused_still_trains(tmp_path: Path) -> None:
    accelerating.save_base(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(os.environ[accelerating.BASE])
    expected = loss_of(get_peft_model(base, COLUMNS))
    for rank in on_two_ranks(work, tmp_path):
        check(rank["refusals"])
        assert "layers.0.self_attn.q_proj its weight is a DTensor with placements (Shard(dim=0),)" in rank["columns"]
        assert "layers.0.self_attn.o_proj its weight is a DTensor with placements (Shard(dim=1),)" in rank["rows"]
        assert "tensor parallelism is not supported" in rank["columns"]
        assert rank["loss"] == pytest.approx(expected, abs=1e-5)
