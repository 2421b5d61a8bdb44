"""Ranks that applied a model differently, one that dies in a sharded backward, a sharded checkpoint cut short."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import error_of, on_two_ranks
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import loge_kernels as loge
from loge_kernels.integrations import agreement

LOW: dict[str, Any] = {"rank": 16, "exact_dtype": None, "targets": r"layers\.\d\.frozen"}
OTHERWISE: dict[str, dict[str, Any]] = {
    "rank": {**LOW, "rank": 32},
    "targets": {**LOW, "targets": ["layers.0.frozen"]},
    "exact": {**LOW, "rank": None},
    "exact_every": {**LOW, "exact_every": 2},
    "exact_layers": {**LOW, "exact_layers": 0.5},
    "residual": {**LOW, "residual": 0.2},
}


class Block(nn.Module):
    """A layer that trains under one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.trains = nn.Linear(64, 64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(self.trains(x)))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def applied(policy: dict[str, Any] | None = LOW) -> Tower:
    model = Tower()
    if policy is not None:
        loge.apply(model, **policy)
    return model


def said_of(rank: int, *policies: dict[str, Any] | None) -> str:
    """What `fully_shard` says on this rank, whose model is applied by its own policy, None for not at all."""
    model = applied(policies[rank])
    before = dict(model.named_parameters())
    said = error_of(lambda: loge.fully_shard(model))
    after = dict(model.named_parameters())
    assert not said or all(after[name] is p for name, p in before.items()), "changed before it was refused"
    return said


def work(rank: int) -> dict[str, str]:
    said = {what: said_of(rank, LOW, policy) for what, policy in OTHERWISE.items()}
    eight = {**LOW, "rank": None, "exact_dtype": "int8"}
    said["exact_dtype"] = said_of(rank, {**eight, "exact_dtype": None}, eight)
    said["none"] = said_of(rank, LOW, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loge, "__version__", f"0.{rank}.0")
        said["version"] = said_of(rank, LOW, LOW)
    said["backend"] = said_of(rank, LOW, {**LOW, "backend": "reference"})
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


FIRST, SECOND, LAST = (f"ranks differ in layer 'layers.{index}.frozen': " for index in range(3))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rank", f"{FIRST}rank=16 on rank 0, rank=32 on rank 1; give loge_kernels.apply the same model"),
        ("targets", f"{SECOND}applied on rank 0, not applied on rank 1; "),
        ("exact", f"{FIRST}rank=16 on rank 0, rank=None on rank 1; "),
        ("exact_dtype", f"{FIRST}exact_dtype=None on rank 0, exact_dtype='int8' on rank 1; "),
        ("exact_every", f"{FIRST}exact_every=None on rank 0, exact_every=2 on rank 1; "),
        ("exact_layers", f"{LAST}rank=16 on rank 0, rank=None on rank 1; "),
        ("residual", f"{FIRST}residual rows=0 on rank 0, residual rows=13 on rank 1; "),
        ("version", "ranks have different versions of loge_kernels: 0.0.0 on rank 0, 0.1.0 on rank 1; "),
    ],
)
def test_every_rank_refuses_and_names_both(what: str, words: str, said: list[dict[str, str]]) -> None:
    assert said[0][what] == said[1][what]
    assert words in said[0][what]


def test_the_error_of_one_rank_is_told_to_all(said: list[dict[str, str]]) -> None:
    assert said[1]["none"].startswith("no layer of this Tower is applied")
    assert said[0]["none"] == f"the model cannot be sharded on rank 1: {said[1]['none']}"


def test_a_backend_of_its_own_is_a_ranks_own_affair(said: list[dict[str, str]]) -> None:
    assert [one["backend"] for one in said] == ["", ""]


def test_many_ranks_are_counted_and_freezing_is_named_first() -> None:
    of_each: list[Any] = [{"layer 'a'": {"rank": 16 if rank % 8 else 32}} for rank in range(64)]
    words = "'a': rank=32 on ranks 0, 8, 16, 24 and 4 more, rank=16 on ranks 1, 2, 3, 4 and 52 more; "
    with pytest.raises(ValueError, match=words):
        agreement._refuse_policies(list(range(64)), of_each)
    of_each[63]["freezing of 'b'"] = {}
    with pytest.raises(ValueError, match=r"in freezing of 'b': not applied on ranks 0, .*, applied on rank 63; "):
        agreement._refuse_policies(list(range(64)), of_each)


# A rank dies between two gathers of a sharded backward


def dying(rank: int) -> str:
    """Rank 1 goes in the backward of the middle block, having gathered for the last one; rank 0 tells what it met."""
    folder = Path(os.environ["LOGE_TEST_FOLDER"])
    model = applied()
    loge.fully_shard(model)

    def die(gradient: Tensor) -> None:
        torch.save("", folder / "1.pt")
        os._exit(0)  # any other status, and rank 0 would be ended from outside

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(die)

    loss = model(torch.randn(4, 64)).square().mean()
    loss.backward()  # one step that works
    if rank == 1:
        model.layers[1].register_forward_hook(hook)
    loss = model(torch.randn(4, 64)).square().mean()
    start = time.monotonic()
    try:
        loss.backward()
    except RuntimeError as error:
        return f"{time.monotonic() - start:.1f} s: {error}"
    return "nothing"


@pytest.mark.slow
def test_a_rank_that_dies_in_a_sharded_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGE_TEST_FOLDER", str(tmp_path))
    met, _ = on_two_ranks(dying, tmp_path)
    assert "onnection" in met
    assert float(met.split()[0]) < 60, "half of the group's timeout"


# A sharded checkpoint that was cut short


def state_of(model: nn.Module) -> dict[str, Any]:
    return {"model": get_model_state_dict(model)}


def load(model: nn.Module, folder: Path) -> None:
    state = state_of(model)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().to_local().clone() for name, p in model.named_parameters()}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("policy", [LOW, {**LOW, "rank": None, "exact_dtype": "int8"}], ids=["factors", "copies"])
def test_a_checkpoint_cut_short(policy: dict[str, Any], tmp_path: Path) -> None:
    model = applied(policy)
    loge.fully_shard(model)
    checkpoint.save(state_of(model), checkpoint_id=tmp_path / "first")
    saved = values_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    checkpoint.save(state_of(model), checkpoint_id=tmp_path / "second")
    (file,) = (tmp_path / "second").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-3000])
    for damage in (lambda: None, file.unlink):
        damage()
        with pytest.raises(checkpoint.CheckpointException):
            checkpoint.load(state_of(model), checkpoint_id=tmp_path / "second")
    for name, parameter in values_of(model).items():
        assert "frozen" not in name or torch.equal(parameter, saved[name])
    load(model, tmp_path / "first")
    torch.testing.assert_close(values_of(model), saved, rtol=0, atol=0)
    model(torch.randn(4, 64)).sum().backward()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("policy", [LOW, {**LOW, "rank": None, "exact_dtype": "int8"}], ids=["factors", "copies"])
def test_frozen_weights_of_another_model_cut_short(policy: dict[str, Any], tmp_path: Path) -> None:
    """Some frozen weights are those of the file when the load fails: the next backward would follow the old ones."""
    model, other = applied(policy), applied(policy)
    with torch.no_grad():
        for layer in other.layers:
            layer.frozen.weight.mul_(2)
    for one in (model, other):
        loge.fully_shard(one)
    checkpoint.save(state_of(other), checkpoint_id=tmp_path / "other")
    checkpoint.save(state_of(model), checkpoint_id=tmp_path / "own")
    (file,) = (tmp_path / "other").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-3000])
    before = values_of(model)

    def fail_half_way() -> None:
        with pytest.raises(checkpoint.CheckpointException):
            checkpoint.load(state_of(model), checkpoint_id=tmp_path / "other")
        after = values_of(model)
        assert any("frozen" in name and not torch.equal(after[name], before[name]) for name in before)

    fail_half_way()
    load(model, tmp_path / "own")
    torch.testing.assert_close(values_of(model), before, rtol=0, atol=0)
    model(torch.randn(4, 64)).sum().backward()
    fail_half_way()
    with pytest.raises(ValueError, match="has changed since it was sharded"):
        model(torch.randn(4, 64)).sum().backward()
