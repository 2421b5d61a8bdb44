"""What `fully_shard` refuses, and which modules it takes for blocks; in one process, and without a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import situations
from models import lora
from situations import LOW
from torch import nn

import loge_kernels as loge
from loge_kernels.integrations import fsdp as sharding


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lora, r"is applied: call loge_kernels.apply\(model\) first, or torch's own fully_shard"),
        (lambda: situations.applied(lora(), {**LOW, "low_rank_dtype": "int8"}), "has low_rank_dtype='int8'"),
        (lambda: situations.applied(lora(), {"exact_dtype": "nvfp4"}), "has exact_dtype='nvfp4', whose copies in 4"),
    ],
)
def test_what_cannot_be_sharded(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loge.fully_shard(make())


def test_what_is_not_a_model_of_blocks() -> None:
    with pytest.raises(TypeError, match="model is a int"):
        loge.fully_shard(3)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    loge.apply(plain, 16)
    with pytest.raises(ValueError, match="give blocks="):
        loge.fully_shard(plain)
    with pytest.raises(ValueError, match="blocks holds a Linear that is no module of model"):
        loge.fully_shard(plain, blocks=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="blocks holds no converted layer"):
        loge.fully_shard(plain, blocks=[])
    holding = nn.Sequential(nn.ModuleList(plain))
    with pytest.raises(ValueError, match="blocks holds a ModuleList, which has no forward: give its members"):
        loge.fully_shard(holding, blocks=[holding[0]])
    with pytest.raises(ValueError, match="init_process_group"):
        loge.fully_shard(plain, blocks=list(plain))
    trains = nn.Sequential(nn.Linear(64, 64))
    loge.apply(trains, 16, targets=["0"])
    with pytest.raises(ValueError, match="layer '0' has factors of a weight that trains"):
        loge.fully_shard(trains)


def test_of_lists_of_lists_the_members_are_blocks() -> None:
    model = nn.ModuleList([nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(2)])
    model.requires_grad_(False)
    loge.apply(model, 16)
    assert sharding._blocks(model, None) == [layer for pair in model for layer in pair]
