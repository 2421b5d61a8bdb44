"""FSDP2 on two ranks: the same training, and a backward that gathers no frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import lora, tokens
from ranks import Collectives, error_of, on_two_ranks, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import loge_kernels as loge
from loge_kernels import sharding

RANK = 16
STEPS = 20
FEW = 4
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
EXACT: dict[str, Any] = {"exact_every": 1.5, "correction": None}


def applied(**options: Any) -> Any:
    model = lora()
    loge.apply(model, RANK, **options)
    return model


def layers_of(model: Any) -> Any:
    return model.base_model.model.model.layers


@cache
def mesh() -> Any:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def by_torch(model: Any, **options: Any) -> Any:
    """Torch's own recipe: every layer, then the model."""
    for layer in layers_of(model):
        torch_fully_shard(layer, mesh=mesh(), **options)
    return torch_fully_shard(model, mesh=mesh(), **options)


def by_us(model: Any, **options: Any) -> Any:
    return loge.fully_shard(model, mesh=mesh(), **options)


def checkpointed(model: Any, reentrant: bool = False) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def hooked_checkpoints(model: Any) -> Any:
    """The checkpoint around FSDP's hooks, which then run once more in backward."""
    for layer in layers_of(model):
        call = type(layer).__call__

        def checkpointing(self: Any, *args: Any, call: Any = call, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(call, self, *args, use_reentrant=False, **kwargs)

        layer.__class__ = type("Checkpointed", (type(layer),), {"__call__": checkpointing})
    return model


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


VARIANTS: dict[str, Callable[[], Any]] = {
    "peft": lambda: by_torch(lora()),
    "loge": lambda: by_us(applied()),
    "torch's own": lambda: by_torch(applied()),
    "offloaded": lambda: by_us(applied(), offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "exact steps": lambda: by_us(applied(**EXACT)),
    "checkpointed": lambda: by_us(checkpointed(applied())),
    "reentrant": lambda: by_us(checkpointed(applied(), reentrant=True)),
    "hooks inside": lambda: hooked_checkpoints(by_us(applied())),
    "kept": lambda: by_us(applied(), reshard_after_forward=False),
    "frozen": lambda: by_us(applied(freeze_below=1)),
    "dropped": lambda: by_us(applied(subspace="dropped")),
    "bf16": lambda: by_us(applied(), **BF16),
    "bf16 by torch": lambda: by_torch(applied(), **BF16),
    "autocast": lambda: Autocast(by_us(applied())),
    "autocast by torch": lambda: Autocast(by_torch(applied())),
}


def work(rank: int) -> dict[str, Any]:
    rows = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {}
    for name, make in VARIANTS.items():
        model = make()
        losses = train(model, rows, STEPS if name == "loge" else FEW)
        with Collectives() as seen:
            train(model, rows, 1)
        sent = {way: seen.total("allgather", way == "backward") for way in ("forward", "backward")}
        found[name] = {"losses": losses, **sent, "reduced": seen.total("reduce_scatter", True)}
        if name == "loge":
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            found["state"] = get_model_state_dict(model, options=options)
            found["own share"] = sum(_local(p).nbytes for p in layers_of(model).parameters())
    found["changed"] = changed_weights()
    found["random"] = random_factors(rank)
    return found


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def changed_weights() -> dict[str, str]:
    """What the forward says after a state dict came: the same numbers, and others."""
    model = by_us(applied())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = {}
    for what in ("same", "other"):
        model.load_state_dict(state)
        said[what] = error_of(lambda: model(input_ids=tokens(), labels=tokens()))
        state = {name: 2 * tensor if ".base_layer." in name else tensor for name, tensor in state.items()}
    model = by_us(applied())
    state = model.state_dict()
    for name, tensor in state.items():  # as torch.distributed.checkpoint.load does
        if ".base_layer." in name:
            _local(tensor).detach().mul_(2.0)
    model.load_state_dict(state)
    said["in place"] = error_of(lambda: model(input_ids=tokens(), labels=tokens()))
    return said


def random_factors(rank: int) -> list[Tensor]:
    """The product of the factors of one layer, drawn otherwise on each rank, as backward sees it."""
    model = lora()
    torch.manual_seed(rank)
    loge.apply(model, RANK, "random")
    by_us(model)
    factors = layers_of(model)[0].self_attn.q_proj.base_layer.factors
    return [factors.left.full_tensor(), factors.right.full_tensor()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def mean_losses(ranks: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([rank[name]["losses"] for rank in ranks]).mean(0)


def alone(steps: int, **options: Any) -> Tensor:
    return torch.tensor(train(applied(**options), slice(None), steps))


def block_bytes() -> dict[str, int]:
    """What the blocks hold, in bytes."""
    found = {"weights": 0, "factors": 0, "rest": 0}
    for name, p in layers_of(applied()).named_parameters():
        kind = "factors" if ".factors." in name else "weights" if ".base_layer." in name else "rest"
        found[kind] += p.nbytes
    return found


def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]]) -> None:
    assert (mean_losses(ranks, "loge") - alone(STEPS)).abs().max() < 1e-3
    exact = mean_losses(ranks, "peft")
    assert (exact - mean_losses(ranks, "loge")[:FEW]).abs().max() > 1e-3  # backward is the low-rank one


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch's own", {}),
        ("offloaded", {}),
        ("exact steps", EXACT),
        ("checkpointed", {}),
        ("reentrant", {}),
        ("hooks inside", {}),
        ("kept", {}),
        ("frozen", {"freeze_below": 1}),
        ("dropped", {"subspace": "dropped"}),
    ],
)
def test_in_every_setting(ranks: list[dict[str, Any]], name: str, options: dict[str, Any]) -> None:
    assert (mean_losses(ranks, name) - alone(FEW, **options)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["bf16", "autocast"])
def test_mixed_precision_is_as_under_torchs_own(ranks: list[dict[str, Any]], name: str) -> None:
    assert torch.equal(mean_losses(ranks, name), mean_losses(ranks, f"{name} by torch"))
    assert (mean_losses(ranks, name) - mean_losses(ranks, "loge")[:FEW]).abs().max() < 0.05


def test_backward_gathers_factors_and_adapters_alone(ranks: list[dict[str, Any]]) -> None:
    peft, ours, blocks = ranks[0]["peft"], ranks[0]["loge"], block_bytes()
    assert peft["backward"] == blocks["weights"] + blocks["rest"]
    assert ours["backward"] == blocks["factors"] + blocks["rest"]
    share = blocks["factors"] / blocks["weights"]
    assert ours["backward"] <= share * peft["backward"] + blocks["rest"]
    assert ours["forward"] == peft["forward"]
    assert ours["reduced"] == peft["reduced"]
    assert ranks[1]["loge"]["backward"] == ours["backward"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("offloaded", {"factors", "rest"}),  # what is not gathered is not copied to the device either
        ("kept", {"factors"}),
        ("dropped", {"rest"}),
        ("checkpointed", {"weights", "factors", "rest"}),  # computed again, from the weights
        ("hooks inside", {"weights", "factors", "rest"}),
    ],
)
def test_what_backward_gathers(ranks: list[dict[str, Any]], name: str, expected: set[str]) -> None:
    blocks = block_bytes()
    assert ranks[0][name]["backward"] == sum(blocks[kind] for kind in expected)
    assert ranks[0][name]["forward"] == ranks[0]["peft"]["forward"]


def test_frozen_layers_gather_nothing_in_backward(ranks: list[dict[str, Any]]) -> None:
    blocks = block_bytes()
    assert ranks[0]["frozen"]["backward"] == (blocks["factors"] + blocks["rest"]) // 2


def test_autocast_reads_factors_in_forward(ranks: list[dict[str, Any]]) -> None:
    blocks = block_bytes()
    assert ranks[0]["autocast"]["forward"] == ranks[0]["peft"]["forward"] + blocks["factors"]
    assert ranks[0]["autocast"]["backward"] == ranks[0]["loge"]["backward"]


def test_a_rank_keeps_its_share(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["own share"] + ranks[1]["own share"] == sum(block_bytes().values())


def test_the_full_state_is_pefts(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict

    model, state = lora(), ranks[0]["state"]
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = PeftModel.from_pretrained(lora().unload(), tmp_path)
    expected = lora()
    trained = {name: tensor for name, tensor in state.items() if "lora_" in name}
    set_peft_model_state_dict(expected, {name.replace(".default", ""): tensor for name, tensor in trained.items()})
    got = loaded.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in trained.items())
    assert torch.equal(loaded(input_ids=tokens()).logits, expected(input_ids=tokens()).logits)


def test_a_weight_that_changes_under_its_factors_is_told(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["changed"]["same"] == ""
        assert "has changed since it was sharded" in rank["changed"]["other"]
        assert "has changed since it was sharded" in rank["changed"]["in place"]


def test_ranks_agree_on_factors(ranks: list[dict[str, Any]]) -> None:
    model = lora()
    torch.manual_seed(0)
    loge.apply(model, RANK, "random")
    factors = layers_of(model)[0].self_attn.q_proj.base_layer.factors
    for rank in ranks:
        assert torch.equal(rank["random"][0], factors.left)
        assert torch.equal(rank["random"][1], factors.right)


# Refusals, in this process


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lora, "has factors: call loge_kernels.apply"),
        (lambda: applied(exact_every=2), "apply with correction=None before you shard"),
        (lambda: applied(exact_every=2, correction=None, exact_dtype="int8"), "has exact_dtype='int8'"),
        (lambda: applied(low_rank_dtype="int8"), "has low_rank_dtype='int8'"),
    ],
)
def test_what_cannot_be_sharded(make: Callable[[], Any], words: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=words):
        loge.fully_shard(model)


def test_refreshes_cannot_be_sharded() -> None:
    model = lora()
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    loge.apply(model, RANK, calibration=batches, refresh_every=3)
    with pytest.raises(ValueError, match="refresh_every=3 needs whole weights"):
        loge.fully_shard(model)


def test_what_is_not_a_model_of_blocks() -> None:
    with pytest.raises(TypeError, match="model is a int"):
        loge.fully_shard(3)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    loge.apply(plain, RANK)
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


def test_a_weight_that_trains_cannot_be_sharded() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    loge.apply(model, RANK, targets=["0"])
    with pytest.raises(ValueError, match="layer '0' has factors of a weight that trains"):
        loge.fully_shard(model)


def test_of_lists_of_lists_the_members_are_blocks() -> None:
    model = nn.ModuleList([nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(2)])
    model.requires_grad_(False)
    loge.apply(model, RANK)
    assert sharding._blocks(model, None) == [layer for pair in model for layer in pair]


def test_rows_of_the_residual_move_with_the_rest() -> None:
    factors = loge.factorize(torch.randn(64, 48), RANK).with_residual(torch.randn(64, 48), 8)
    sharding._move_whole(factors, set(), torch.device("meta"))
    assert factors.rows is not None
    assert factors.rows.is_meta
    assert not factors.left.is_meta


@pytest.mark.slow
def test_200_steps(tmp_path: Path) -> None:
    losses = torch.tensor(on_two_ranks(long_run, tmp_path)).mean(0)
    assert (losses - alone(200)).abs().max() < 1e-3


def long_run(rank: int) -> list[float]:
    return train(by_us(applied()), slice(2 * rank, 2 * rank + 2), 200)
