"""Hybrid sharding (HSDP) on four ranks: two copies of the model, each over two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import lora
from ranks import Collectives, on_ranks, train
from situations import LOW, checkpointed
from test_fsdp import INT8, alone, applied, block_bytes
from torch.distributed.device_mesh import init_device_mesh

import loge_kernels as loge

pytestmark = pytest.mark.slow  # four processes

STEPS = 4
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "low rank": (LOW, False),
    "int8": (INT8, False),
    "low rank, checkpointed": (LOW, True),
}
READS = {"low rank": "factors", "int8": "copies", "low rank, checkpointed": "weights"}


def work(rank: int) -> dict[str, Any]:
    meshes = {
        "hybrid": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
        "flat": init_device_mesh("cpu", (4,)),
    }
    found: dict[str, Any] = {}
    for name, (policy, again) in MODELS.items():
        for kind, mesh in meshes.items():
            model = applied(policy, checkpointed(lora(), False if again else None))
            loge.fully_shard(model, mesh=mesh)
            with Collectives() as seen:
                losses = train(model, slice(rank, rank + 1), STEPS)
            found[f"{name}, {kind}"] = {"losses": losses, "backward": seen.total("allgather", True) // STEPS}
            found[f"{name}, {kind}"]["reduced"] = seen.total("allreduce", True)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(work, tmp_path_factory.mktemp("ranks"), 4)


@pytest.mark.parametrize("mesh", ["hybrid", "flat"])
@pytest.mark.parametrize("name", MODELS)
def test_four_ranks_train_as_one_process(ranks: list[dict[str, Any]], name: str, mesh: str) -> None:
    policy, again = MODELS[name]
    mean = torch.tensor([rank[f"{name}, {mesh}"]["losses"] for rank in ranks]).mean(0)
    expected = alone(STEPS, {"exact_dtype": None} if again else policy)
    assert (mean - expected).abs().max() < 1e-4
    held = block_bytes()
    for rank in ranks:
        assert rank[f"{name}, {mesh}"]["backward"] == held[READS[name]] + held["rest"]
        assert (rank[f"{name}, {mesh}"]["reduced"] > 0) == (mesh == "hybrid")
