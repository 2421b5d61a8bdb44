"""FSDP2 with activation checkpoints around some parts of a model: no backward gathers more than PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import llama, lora
from quantized_layers import quantised_llama
from ranks import on_two_ranks, train, train_counted
from situations import EXACT
from test_fsdp import EVERY, INT8, LOW, Autocast, applied, block_bytes, by_torch, by_us, layers_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.slow
STEPS = 3
UPPER = {**LOW, "exact_layers": 0.5}
Change = Callable[[Any], Any]


def made(policy: dict[str, Any] | None, base: Any = None) -> Any:
    """PEFT's model, applied where there is a policy. Without a cache, to which a recomputation would add once more."""
    model = lora(llama(use_cache=False) if base is None else base)
    return model if policy is None else applied(policy, model)


def sharded(policy: dict[str, Any] | None, change: Change = lambda model: model, base: Any = None) -> Any:
    """The model of `made`, by torch's own `fully_shard` where there is no policy."""
    return (by_torch if policy is None else by_us)(change(made(policy, base)))


def part(name: str, reentrant: bool = False) -> Change:
    """A checkpoint around this part of every block."""

    def change(model: Any) -> Any:
        if reentrant:
            model.enable_input_require_grads()
        for layer in layers_of(model):
            module = layer.get_submodule(name)

            def forward(hidden_states: Tensor, run: Any = module.forward, **rest: Any) -> Any:
                return checkpoint(lambda x: run(x, **rest), hidden_states, use_reentrant=reentrant)

            module.forward = forward
        return model

    return change


def block(index: int) -> Change:
    """A checkpoint around this one of the two blocks."""

    def change(model: Any) -> Any:
        run = layers_of(model)[index].forward
        layers_of(model)[index].forward = lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
        return model

    return change


def beside_compiled_mlps(model: Any) -> Any:
    for layer in layers_of(model):
        layer.mlp.compile(backend="aot_eager")
    return part("self_attn")(model)


class Switched(nn.Module):
    """With a checkpoint around the MLPs in every other forward; so many forwards come before a backward."""

    def __init__(self, model: Any, forwards: int = 1) -> None:
        super().__init__()
        self.model, self.forwards, self.on = model, forwards, False
        model.enable_input_require_grads()  # or FSDP keeps the first block gathered until the last forward's backward
        for layer in layers_of(model):
            layer.mlp.forward = lambda x, run=layer.mlp.forward: self.run(run, x)

    def run(self, mlp: Any, x: Tensor) -> Tensor:
        return checkpoint(mlp, x, use_reentrant=False) if self.on else mlp(x)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        outputs = []
        for ids in (input_ids, input_ids.flip(1))[: self.forwards]:
            self.on = not self.on
            outputs.append(self.model(input_ids=ids, labels=ids))
        outputs[0].loss = sum(output.loss for output in outputs)
        return outputs[0]


PARTS = {
    "MLP": part("mlp"),
    "MLP, reentrant": part("mlp", reentrant=True),
    "attention": part("self_attn"),
    "attention, reentrant": part("self_attn", reentrant=True),
}
POLICIES: dict[str, dict[str, Any]] = {
    "rank": LOW,
    "int8": INT8,
    "exact_every": EVERY,
    "exact_every, int8": {**EVERY, **INT8},
    "exact_layers": UPPER,
    "exact_layers, int8": {**UPPER, **INT8},
    "exact_fraction": {**LOW, "exact_fraction": 0.5},
    "exact_fraction, int8": {**LOW, **INT8, "exact_fraction": 0.5},
    "residual": {**LOW, "residual": 0.2},
}
COMBINED = [(policy, "MLP") for policy in POLICIES] + [(policy, name) for policy in ("rank", "int8") for name in PARTS]
COMBINED = list(dict.fromkeys(COMBINED))
BLOCKS = [(policy, index) for policy in ("rank", "int8") for index in (0, 1)]


def variants() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {f"PEFT, {name}": lambda c=c: sharded(None, c) for name, c in PARTS.items()}
    for policy, name in COMBINED:
        found[f"{policy}, {name}"] = lambda p=POLICIES[policy], c=PARTS[name]: sharded(p, c)
    for policy in ("rank", "int8", "exact_layers"):
        found[f"{policy}, switched"] = lambda p=POLICIES[policy]: Switched(sharded(p))
    for policy, index in BLOCKS:
        found[f"{policy}, block {index}"] = lambda p=POLICIES[policy], i=index: sharded(p, block(i))
    found["PEFT, two forwards"] = lambda: Switched(sharded(None), 2)
    found["rank, two forwards"] = lambda: Switched(sharded(LOW), 2)
    found["PEFT, autocast"] = lambda: Autocast(sharded(None, PARTS["MLP"]))
    found["int8, autocast"] = lambda: Autocast(sharded(INT8, PARTS["MLP"]))
    found["PEFT, nf4"] = lambda: sharded(None, PARTS["MLP"], quantised_llama("nf4", use_cache=False))
    found["rank, nf4"] = lambda: sharded(LOW, PARTS["MLP"], quantised_llama("nf4", use_cache=False))
    for policy in ("rank", "int8"):
        found[f"{policy}, compiled"] = lambda p=POLICIES[policy]: sharded(p, beside_compiled_mlps)
    return found


def work(rank: int) -> dict[str, Any]:
    found = {}
    for name, make in variants().items():
        losses, steps = train_counted(make(), slice(2 * rank, 2 * rank + 2), STEPS)
        ways = {way: [s.total("allgather", way == "backward") for s in steps] for way in ("forward", "backward")}
        found[name] = {"losses": losses, **ways}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def assert_trains_as(ranks: list[dict[str, Any]], name: str, model: Any, tolerance: float = 1e-4) -> None:
    mean = torch.tensor([rank[name]["losses"] for rank in ranks]).mean(0)
    assert (mean - torch.tensor(train(model, slice(None), STEPS))).abs().max() < tolerance


def shares(ranks: list[dict[str, Any]], name: str, of: str) -> list[float]:
    """What the backward of each step gathers, of PEFT's bytes; its forward gathers as much as PEFT's."""
    assert ranks[0][name] == {**ranks[1][name], "losses": ranks[0][name]["losses"]}
    assert ranks[0][name]["forward"] == ranks[0][of]["forward"]
    return [ours / pefts for ours, pefts in zip(ranks[0][name]["backward"], ranks[0][of]["backward"], strict=True)]


@pytest.mark.parametrize(("policy", "name"), COMBINED)
def test_a_checkpoint_in_a_block_makes_all_of_it_exact(ranks: list[dict[str, Any]], policy: str, name: str) -> None:
    """Its weights are there, so nothing else is gathered, from the first step on."""
    assert shares(ranks, f"{policy}, {name}", f"PEFT, {name}") == [1.0] * STEPS
    assert_trains_as(ranks, f"{policy}, {name}", made(EXACT), 1e-3 if "int8" in policy else 1e-4)


@pytest.mark.parametrize(("policy", "low"), [("rank", LOW), ("int8", INT8), ("exact_layers", UPPER)])
def test_checkpoints_that_come_and_go(ranks: list[dict[str, Any]], policy: str, low: dict[str, Any]) -> None:
    on, off, again = shares(ranks, f"{policy}, switched", "PEFT, MLP")
    assert on == again == 1.0
    assert off < 0.8
    expected = made({**low, "exact_every": 2} if "rank" in low else low)
    assert_trains_as(ranks, f"{policy}, switched", expected)


@pytest.mark.parametrize(("policy", "index"), BLOCKS)
def test_a_checkpoint_around_one_block(ranks: list[dict[str, Any]], policy: str, index: int) -> None:
    """FSDP gathers for a block while it is in the backward of the next: what that one needs, not what the next does."""
    held = block_bytes()
    share = {"rank": held["factors"], "int8": held["copies"]}[policy] / held["weights"]
    expected = (held["weights"] * (1 + share) / 2 + held["rest"]) / (held["weights"] + held["rest"])
    assert shares(ranks, f"{policy}, block {index}", "PEFT, MLP") == pytest.approx([expected] * STEPS)


def test_forwards_with_and_without_a_checkpoint_before_a_backward(ranks: list[dict[str, Any]]) -> None:
    held = block_bytes()
    expected = (held["weights"] + held["factors"] + 2 * held["rest"]) / 2 / (held["weights"] + held["rest"])
    assert shares(ranks, "rank, two forwards", "PEFT, two forwards") == pytest.approx([expected] * STEPS)
    assert_trains_as(ranks, "rank, two forwards", Switched(made(EVERY), 2))  # exact, low rank


def test_quantised(ranks: list[dict[str, Any]]) -> None:
    assert shares(ranks, "rank, nf4", "PEFT, nf4") == [1.0] * STEPS
    assert_trains_as(ranks, "rank, nf4", made(EXACT, quantised_llama("nf4", use_cache=False)))


@pytest.mark.parametrize("policy", ["rank", "int8"])
def test_compiled_beside_it(ranks: list[dict[str, Any]], policy: str) -> None:
    assert shares(ranks, f"{policy}, compiled", "PEFT, attention") == [1.0] * STEPS
    assert_trains_as(ranks, f"{policy}, compiled", made(EXACT), 1e-3)


def test_autocast_over_float32_weights(ranks: list[dict[str, Any]]) -> None:
    assert shares(ranks, "int8, autocast", "PEFT, autocast") == [1.0] * STEPS
    ours, pefts = (
        torch.tensor([rank[name]["losses"] for rank in ranks]) for name in ("int8, autocast", "PEFT, autocast")
    )
    assert (ours - pefts).abs().max() < 0.02
