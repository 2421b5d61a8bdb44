"""`freeze` beside `DistributedDataParallel`, and one plan for all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import assert_close, gradients, llama, lora, tokens
from ranks import on_two_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge


@pytest.mark.usefixtures("one_rank")
def test_before_the_wrapper_not_after_it() -> None:
    model = lora()
    wrapped: Any = DistributedDataParallel(model)
    name = next(name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=f"would wait for the gradient of {name}: freeze before it is made"):
        loge.apply(wrapped, 0.25, freeze_below=1)
    assert_close(gradients(model), gradients(lora()), 0.0)
    model = lora()
    loge.freeze(model, 1)
    wrapped = DistributedDataParallel(model)
    expected = {f"module.{name}": g for name, g in gradients(lora()).items() if ".layers.0." not in name}
    for _ in range(2):  # the second forward raises where the first left a gradient out
        assert_close(gradients(wrapped), expected)
    loge.remove(wrapped)


@pytest.mark.usefixtures("one_rank")
def test_a_wrapper_of_a_model_whose_prefix_never_trained_is_looked_through() -> None:
    model = llama()
    model.requires_grad_(False)
    model.lm_head.requires_grad_()
    wrapped: Any = DistributedDataParallel(model)
    assert loge.freeze(wrapped, loge.plan_freezing(wrapped, batches(0))).layers == 1
    assert gradients(wrapped).keys() == {"module.lm_head.weight"}


def batches(rank: int) -> list[dict[str, Tensor]]:
    ids = [tokens(), tokens().flip(0), tokens().flip(1)]
    return [{"input_ids": one, "labels": one} for one in (ids[:2] if rank == 0 else ids[2:])]


def plan(rank: int) -> tuple[dict[str, Any], str]:
    with pytest.raises(ValueError, match=r"batch 0|another rank") as failure:
        loge.plan_freezing(llama(), batches(0) if rank == 0 else [{"input_ids": tokens()}])
    found = loge.plan_freezing(llama(), batches(rank))
    return found.to_dict(), str(failure.value)


def test_every_rank_gets_the_plan_of_all_batches(tmp_path: Path) -> None:
    (first, elsewhere), (second, here) = on_two_ranks(plan, tmp_path)
    assert "batch 0 has no 'labels'" in here
    assert "planning failed on another rank" in elsewhere
    assert first == second
    whole = loge.plan_freezing(llama(), batches(0) + batches(1))
    assert first["trace"] == pytest.approx(whole.trace)
    assert first["tokens"] == whole.tokens
