"""Accelerate's FSDP2 on gloo ranks. It shards on GPUs alone, so it is told that these ranks are some; all else is its
own code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from models import lora
from ranks import WORLD, launched
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import loge_kernels as loge


def ids(step: int) -> Tensor:
    """Four sequences, of which each rank has two."""
    return torch.randint(200, (4, 12), generator=torch.Generator().manual_seed(step % 5))


POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"exact_dtype": None},
    "int8": {"exact_dtype": "int8"},
    "low": {"rank": 0.25, "exact_dtype": None},
    "upper": {"rank": 0.25, "exact_layers": 0.5, "exact_dtype": None},
    "every": {"rank": 0.25, "exact_every": 2, "exact_dtype": None},
    "residual": {"rank": 0.25, "residual": 0.2, "exact_dtype": None},
    "calibrated": {"rank": 0.25, "exact_dtype": None, "calibration": [{"input_ids": ids(0), "labels": ids(0)}]},
}
BASE = "LOGE_TEST_BASE"  # the variable that names the model's directory to the ranks


def model_of(policy: dict[str, Any] | None, meta: bool = False) -> Any:
    """The three lines of a user; `meta`: with frozen weights that wait for those of rank 0."""
    model = lora(AutoModelForCausalLM.from_pretrained(os.environ[BASE]), r=8).train()
    if meta:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if not p.requires_grad:
                    module.register_parameter(name, nn.Parameter(p.detach().to("meta"), requires_grad=False))
    if policy is not None:
        loge.apply(model, **policy)
    return model


def save_base(folder: Path) -> None:
    os.environ[BASE] = str(tiny_llama.save(folder))


@contextmanager
def fsdp2(rank: int, efficient: bool, kind: str = "SHARDED_STATE_DICT", **more: Any) -> Iterator[Any]:
    """An Accelerator as `accelerate launch` with `fsdp_version: 2` makes it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import ParallelismConfig

    with as_gpus(rank):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=efficient,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type=kind,
            **more,
        )
        yield Accelerator(fsdp_plugin=plugin, parallelism_config=ParallelismConfig(dp_shard_size=WORLD))


@contextmanager
def as_gpus(rank: int) -> Iterator[None]:
    """Let Accelerate take this rank for a GPU whose memory is the CPU's."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    with pytest.MonkeyPatch.context() as patch:
        launched(patch, rank)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set again by the plugin
        patch.setattr(PartialState, "_prepare_backend", lambda *args: ("gloo", DistributedType.MULTI_GPU))
        try:
            yield
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train(model: Any, optimizer: Any, backward: Any, rows: slice, steps: range) -> list[float]:
    """The loss of every step on these rows of its batch."""
    losses = []
    for step in steps:
        batch = ids(step)[rows]
        loss = model(input_ids=batch, labels=batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def alone(policy: dict[str, Any] | None, steps: int) -> Tensor:
    """The losses of one process."""
    model = model_of(policy)
    return torch.tensor(train(model, optimizer_of(model), Tensor.backward, slice(None), range(steps)))
