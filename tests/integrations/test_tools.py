"""torch's own tools around an applied model: what they save, move, copy, transform and export is PEFT's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import assert_close, lora, modules_of
from situations import (
    EXACT,
    LOW,
    ONE_IN_TWO,
    adamw,
    applied,
    assert_same_weights,
    batch,
    derived,
    gradients_of,
    loss_of,
    pair,
    train,
    trained,
)
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.checkpoint import state_dict as checkpoints
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import loge_kernels as loge

POLICIES = {"exact": EXACT, "low rank": LOW, "8 bits": {"exact_dtype": "int8"}, "one in two": ONE_IN_TWO}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


# Selective activation checkpointing

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default}
SAVED: dict[str, Callable[[Any], bool]] = {
    "products": lambda op: op in PRODUCTS,
    "mm": lambda op: op == aten.mm.default,
    "addmm": lambda op: op == aten.addmm.default,
    "all but products": lambda op: op not in PRODUCTS,
    "nothing": lambda op: False,
}


def selectively_checkpointed(model: Any, saved: Callable[[Any], bool]) -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.get_base_model().config.use_cache = False  # a cache would grow when the layers run again
    for layer in model.get_base_model().model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
@every_policy
def test_selective_checkpointing(policy: dict[str, Any], saved: Callable[[Any], bool]) -> None:
    # PEFT's own dropout can be recomputed, but not kept: torch's writes in place.
    plain, model = pair(policy=policy, lora_dropout=0.2 if not saved(aten.bernoulli_.float) else 0.0)
    same = copy.deepcopy(model)
    for one in (plain, model):
        selectively_checkpointed(one, saved)
    for seed in range(2):
        torch.manual_seed(4)
        expected = derived(same, seed)
        torch.manual_seed(4)
        assert_close(derived(model, seed), expected, 1e-5)
    if policy is EXACT:
        assert_close(derived(model.eval()), derived(plain.eval()), 1e-5)


# Saved tensors that are packed and moved


def written(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor.detach(), file)
    return file.getvalue()


def as_bytes() -> saved_tensors_hooks:
    return saved_tensors_hooks(written, lambda packed: torch.load(io.BytesIO(packed)))


@pytest.mark.parametrize("hooks", [save_on_cpu, as_bytes])
@every_policy
def test_saved_tensors_elsewhere(policy: dict[str, Any], hooks: Callable[[], Any]) -> None:
    plain, model = pair(policy=policy)
    expected = derived(plain if policy is EXACT else applied(pair()[0], policy))
    with hooks():
        loss = loss_of(model)
    loss.backward()
    assert_close({name: p.grad for name, p in trained(model).items()}, expected, 1e-5)


@every_policy
def test_activations_offloaded_by_trl(policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes is no more than PEFT's, so neither factors nor 8-bit copies do."""
    offloading = pytest.importorskip("trl.models.activation_offloading")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    plain, model = pair(policy=policy)
    expected = derived(plain if policy is EXACT else applied(pair()[0], policy))
    moved = {}
    for name, one in (("plain", plain), ("ours", model)):
        context = offloading.OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=0)
        context.update_model_params(one)
        with context:
            loss = loss_of(one)
        moved[name] = sum(entry[0].nbytes for entry in context.tracker.values() if entry[1])
        loss.backward()
        assert not context.tracker
    assert_close({name: p.grad for name, p in trained(model).items()}, expected, 1e-5)
    assert 0 < moved["ours"] <= moved["plain"]


# Files and optimizers

OPTIONS = {
    "all": StateDictOptions(),
    "what trains": StateDictOptions(ignore_frozen_params=True),
    "whole, on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_policy
def test_distributed_checkpoints_are_pefts(policy: dict[str, Any], options: StateDictOptions) -> None:
    models = pair(policy=policy)
    saved = []
    for one in models:
        optimizer = adamw(one)
        train(one, optimizer=optimizer)
        state = checkpoints.get_state_dict(one, optimizer, options=options)
        saved.append(copy.deepcopy((*state, optimizer.state_dict())))
    (weights, moments, numbered), (our_weights, our_moments, our_numbered) = saved
    assert list(our_weights) == list(weights)
    for ours, plain in ((our_moments, moments), (our_numbered, numbered)):
        assert list(ours["state"]) == list(plain["state"])
        assert ours["param_groups"] == plain["param_groups"]
    # Each takes the other's file, whole or as far as it goes.
    for one, (state, moment, number) in zip(models, reversed(saved), strict=True):
        optimizer = adamw(one)
        load = {"model_state_dict": state, "optim_state_dict": moment, "options": StateDictOptions(strict=False)}
        checkpoints.set_state_dict(one, optimizer, **load)
        assert_close(values(one), {name: tensor for name, tensor in state.items() if "lora" in name}, 0.0)
        optimizer.load_state_dict(number)
        train(one, optimizer=optimizer)
    if policy is EXACT:
        assert_close(our_weights, weights, 1e-5)
        assert_same_weights(*models)


# Functional calls and transforms


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each decomposition that torch.linalg computes."""
    monkeypatch.setenv("LOGE_CACHE", "off")
    names: list[str] = []
    for name in ("svd", "qr", "eigh", "svdvals"):
        original = getattr(torch.linalg, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    return names


GIVEN: dict[str, Callable[[Tensor], Tensor]] = {"detached": Tensor.detach, "cloned": lambda p: p.detach().clone()}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@every_policy
def test_functional_call(policy: dict[str, Any], given: Callable[[Tensor], Tensor], decompositions: list[str]) -> None:
    plain, model = pair(policy=policy)
    assert bool(decompositions) == ("rank" in policy)
    decompositions.clear()
    expected = derived(plain if policy is EXACT else applied(pair()[0], policy))
    decompositions.clear()
    for _ in range(1 if policy is ONE_IN_TWO else 2):
        leaves = {n: given(p).requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
        assert not any("factors" in name for name in leaves)
        output = functional_call(model, leaves, (), batch())
        torch.testing.assert_close(output.loss, loss_of(plain), rtol=1e-6, atol=1e-6)
        output.loss.backward()
        assert_close({n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}, expected, 1e-5)
    assert not decompositions


def functional_loss(model: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    model.get_base_model().config.use_cache = False

    def loss(leaves: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(model, leaves, (), {"input_ids": ids, "labels": ids}).loss

    return loss, values(model)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": grad,
    "jacrev": jacrev,
    "per sample": lambda loss: vmap(grad(lambda leaves, ids: loss(leaves, ids[None])), in_dims=(None, 0)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@every_policy
def test_transforms(policy: dict[str, Any], transform: Callable[..., Any]) -> None:
    plain, model = pair(policy=policy)
    ids = batch()["input_ids"]
    loss, leaves = functional_loss(model)
    expected = transform(functional_loss(plain)[0])(leaves, ids)
    with torch.no_grad():
        logits = [vmap(lambda row, one=one: one(input_ids=row[None]).logits)(ids) for one in (model, plain)]
    torch.testing.assert_close(*logits)
    if policy is ONE_IN_TWO or "rank" not in policy:
        assert_close(transform(loss)(leaves, ids), expected, 1e-5)
    if "rank" in policy:
        with pytest.raises(RuntimeError, match=r"loge_kernels.remove\(model\)"):
            transform(loss)(leaves, ids)
    loge.remove(model)
    assert_close(transform(loss)(leaves, ids), expected, 1e-5)


# Export


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        model.get_base_model().config.use_cache = False
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def traced(model: nn.Module, ids: Tensor) -> tuple[Any, set[str]]:
    made = torch.jit.trace(model, (ids,), check_trace=False)
    return made, {node.kind() for node in made.inlined_graph.nodes()}


def exported(model: nn.Module, ids: Tensor) -> tuple[Any, set[str]]:
    program = torch.export.export(model, (ids,))
    return program.module(), {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("export", "training"),
    [(traced, False), (traced, True), (exported, True), pytest.param(exported, False, marks=pytest.mark.slow)],
)
@every_policy
def test_what_is_exported_is_the_plain_model(policy: dict[str, Any], export: Any, training: bool) -> None:
    plain, model = (Logits(one).train(training) for one in pair(policy=policy))
    ids = batch()["input_ids"]
    made, operators = export(model, ids)
    assert not any("loge" in name or "PythonOp" in name for name in operators)
    torch.testing.assert_close(made(ids), plain(ids), rtol=1e-5, atol=1e-5)
    assert modules_of(model, loge.LoGELinear), "the model itself stays applied"


# Compiled


class Blocks(nn.Module):
    """Two residual blocks and a loss; `reentrant` is the kind of activation checkpointing, None for none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))
        return x.square().mean()


@pytest.mark.parametrize(
    ("reentrant", "autocast"),
    [(None, False), (False, False), pytest.param(True, False, marks=pytest.mark.slow), (None, True)],
    ids=["plain", "non-reentrant", "reentrant", "autocast"],
)
def test_compiled(reentrant: bool | None, autocast: bool, compiler: Any) -> None:
    """Two graphs, for exact forwards and the others, and nothing compiled after these."""
    torch.manual_seed(2)
    model = lora(Blocks(), target_modules=r"layers\.\d\.[02]").train()
    model.get_base_model().reentrant = reentrant
    other = copy.deepcopy(model)
    for one in (model, other):
        report = loge.apply(one, 8, exact_layers=0.3, exact_every=2, exact_dtype=None)
        assert [row.rank for row in report.layers] == [8, 8, 8, None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    optimizers = [torch.optim.SGD(trained(one).values(), lr=0.1) for one in (model, other)]
    for step in range(6):
        x = torch.randn(10, 32, generator=torch.Generator().manual_seed(step))
        found = []
        for one, call in ((model, compiled), (other, other)):
            given = x.clone().requires_grad_()
            with (
                torch.compiler.set_stance("fail_on_recompile" if step >= 2 else "default"),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                loss = call(given)
            loss.backward()
            found.append({**gradients_of(one), "x": given.grad})
        assert_close(*found, 1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert compiler["stats"]["unique_graphs"] == 2
    assert not compiler["graph_break"]
