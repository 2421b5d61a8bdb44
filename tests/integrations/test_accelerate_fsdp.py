"""Accelerate's own FSDP2 around an applied model, on two ranks: the training of one process, and checkpoints."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import accelerating
import pytest
import torch
from accelerating import POLICIES, alone, fsdp2, model_of, optimizer_of, train
from models import lora, tokens
from ranks import error_of, on_two_ranks
from torch import Tensor

pytest.importorskip("accelerate", reason="Accelerate is not installed")

FEW, HALF, LONG = 6, 4, 100
OUT = "LOGE_TEST_OUT"


def rows_of(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def losses(rank: int, name: str, efficient: bool, steps: int, meta: bool = False, **plugin: Any) -> list[float]:
    with fsdp2(rank, efficient, **plugin) as accelerator:
        model = model_of(POLICIES[name], meta and rank > 0)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        return train(model, optimizer, accelerator.backward, rows_of(rank), range(steps))


def resumed(rank: int, efficient: bool, kind: str) -> dict[str, Any]:
    """The losses of a run that stops half-way, and goes on in another process' stead; rank 0 keeps the adapter."""
    folder = Path(os.environ[OUT]) / f"{kind}-{efficient}"
    found: dict[str, Any] = {"losses": []}
    for steps in (range(HALF), range(HALF, FEW)):
        with fsdp2(rank, efficient, kind) as accelerator:
            model = model_of(POLICIES["every"])
            model, optimizer = accelerator.prepare(model, optimizer_of(model))
            if steps.start:
                accelerator.load_state(folder)
            found["losses"] += train(model, optimizer, accelerator.backward, rows_of(rank), steps)
            if not steps.start:
                accelerator.save_state(folder)
                continue
            state = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                accelerator.unwrap_model(model).save_pretrained(folder / "adapter", state_dict=state)
                found["state"] = {name: tensor for name, tensor in state.items() if "lora_" in name}
    return found


def other_weights(rank: int) -> str:
    """What a step says after a checkpoint of other frozen weights was read into the shards."""
    with fsdp2(rank, efficient=False) as accelerator:
        model = model_of(POLICIES["low"])
        model, _ = accelerator.prepare(model, optimizer_of(model))
        state = model.state_dict()
        for name, tensor in state.items():  # as torch.distributed.checkpoint.load does
            if ".base_layer." in name:
                tensor.to_local().detach().mul_(2.0)
        model.load_state_dict(state)
        return error_of(lambda: model(input_ids=tokens(), labels=tokens()))


def work(rank: int) -> dict[str, Any]:
    return {
        "every, whole": losses(rank, "every", False, FEW),
        "int8, efficient": losses(rank, "int8", True, FEW),
        "residual, meta": losses(rank, "residual", True, FEW, meta=True),
        "calibrated, whole": losses(rank, "calibrated", False, FEW),
        "calibrated, efficient": error_of(lambda: losses(rank, "calibrated", True, FEW)),
        "full": resumed(rank, True, "FULL_STATE_DICT"),
        "other weights": other_weights(rank),
    }


def long_work(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sharded": resumed(rank, False, "SHARDED_STATE_DICT")}
    for name in POLICIES:
        efficient = name != "calibrated"  # refused
        found[f"{name}, long"] = losses(rank, name, efficient, LONG)
        found[f"{name}, whole"] = losses(rank, name, False, FEW)
        found[f"{name}, checkpointed"] = losses(rank, name, efficient, FEW, activation_checkpointing=True)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> None:
    accelerating.save_base(tmp_path_factory.mktemp("base"))
    os.environ[OUT] = str(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def ranks(base: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def long_ranks(base: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(long_work, tmp_path_factory.mktemp("long"))


@cache
def expected(name: str, steps: int) -> Tensor:
    return alone(POLICIES.get(name), steps)


def difference(ranks: list[dict[str, Any]], setting: str, other: str) -> float:
    """The largest over all steps, from one process with the policy `other`."""
    got = torch.tensor([rank[setting] for rank in ranks]).mean(0)
    return (got - expected(other, len(got))).abs().max().item()


@pytest.mark.parametrize("setting", ["every, whole", "int8, efficient", "residual, meta", "calibrated, whole"])
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], setting: str) -> None:
    assert difference(ranks, setting, setting.split(",")[0]) < 5e-5
    assert difference(ranks, setting, "peft") > 1e-4, "the policy is in force"


def test_efficient_loading_refuses_calibrated_factors(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "subspace='gradient' lost their values on the meta device" in rank["calibrated, efficient"]


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("setting", ["long", "whole", "checkpointed"])
def test_every_policy(long_ranks: list[dict[str, Any]], name: str, setting: str) -> None:
    found = difference(long_ranks, f"{name}, {setting}", name)
    print(f"{name}, {setting}: largest difference {found:.1e}")
    assert found < 1e-3


@pytest.mark.parametrize("kind", ["full", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_run_goes_on_and_peft_loads_its_adapter(kind: str, request: pytest.FixtureRequest) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ranks = request.getfixturevalue("ranks" if kind == "full" else "long_ranks")
    # Half of the steps is even: the count of `exact_every` starts anew as it went on.
    got = torch.tensor([rank[kind]["losses"] for rank in ranks]).mean(0)
    assert (got - expected("every", FEW)).abs().max() < 1e-4
    (folder,) = Path(os.environ[OUT]).glob(f"{kind.upper()}*")
    state = ranks[0][kind]["state"]
    base = os.environ[accelerating.BASE]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    trained = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    assert set(trained) == set(state)
    assert all(torch.equal(trained[name], tensor) for name, tensor in state.items())
    untrained = lora(AutoModelForCausalLM.from_pretrained(base), r=8).state_dict()
    assert all((untrained[name] - tensor).abs().max() > 1e-4 for name, tensor in state.items())


def test_other_frozen_weights_are_told(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "has changed since it was sharded" in rank["other weights"]
