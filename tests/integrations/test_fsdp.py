"""FSDP2 on two ranks: the same training, and a backward that gathers no frozen weight where it reads none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import lora, tokens
from ranks import error_of, on_two_ranks, train, train_counted
from situations import checkpointed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import loge_kernels as loge

STEPS = 20
FEW = 4
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
LOW: dict[str, Any] = {"rank": 16, "exact_dtype": None}
EVERY = {**LOW, "exact_every": 2}
UPPER = {**LOW, "exact_layers": 0.5}
INT8: dict[str, Any] = {"exact_dtype": "int8"}
RESIDUAL = {**LOW, "residual": 0.2}
CALIBRATED = {**LOW, "calibration": [{"input_ids": tokens(), "labels": tokens()}]}


def applied(policy: dict[str, Any] = LOW, model: Any = None) -> Any:
    model = lora() if model is None else model
    loge.apply(model, **policy)
    return model


def layers_of(model: Any) -> Any:
    return model.base_model.model.model.layers


def factors_of(model: Any) -> list[Any]:
    found = [module.factors for module in model.modules() if isinstance(module, loge.LoGELinear)]
    return [factors for factors in found if factors is not None]


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


def by_fsdp1(model: Any) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


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


class Several(nn.Module):
    """Three forwards before their backward, whose kinds are exact, low-rank, exact under `EVERY`."""

    def __init__(self, model: nn.Module, flipped: bool = False) -> None:
        super().__init__()
        self.model, self.flipped = model, flipped

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        outputs = [self.model(input_ids=ids, labels=ids) for ids in (input_ids, input_ids.flip(1), input_ids.flip(0))]
        outputs[0].loss = sum(output.loss for output in (outputs[::-1] if self.flipped else outputs))
        return outputs[0]


class NowAndThen(nn.Module):
    """Checkpointed in every other step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.steps = model, 0

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        if self.steps % 2 == 0:
            checkpointed(self.model, False)
        else:
            self.model.gradient_checkpointing_disable()
        self.steps += 1
        return self.model(input_ids=input_ids, labels=labels)


VARIANTS: dict[str, tuple[dict[str, Any] | None, Callable[[Any], Any]]] = {
    "peft": (None, by_torch),
    "loge": (LOW, by_us),
    "torch's own": (LOW, by_torch),
    "exact": ({"exact_dtype": None}, by_torch),
    "exact, FSDP1": ({"exact_dtype": None}, by_fsdp1),
    "int8, FSDP1": (INT8, by_fsdp1),
    "calibrated": (CALIBRATED, by_us),
    "calibrated by torch": (CALIBRATED, by_torch),
    "int8 by torch": (INT8, by_torch),
    "int8": (INT8, by_us),
    "int8, offloaded": (INT8, lambda model: by_us(model, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "int8, checkpointed": (INT8, lambda model: by_us(checkpointed(model, False))),
    "int8, reentrant": (INT8, lambda model: by_us(checkpointed(model, True))),
    "int8, now and then": (INT8, lambda model: NowAndThen(by_us(model))),
    "int8 every": ({**EVERY, **INT8}, by_us),
    "several, int8": ({**EVERY, **INT8}, lambda model: Several(by_us(model))),
    "float8": ({"exact_dtype": "float8"}, by_us),
    "bf16 int8": (INT8, lambda model: by_us(model, **BF16)),
    "bf16 int8 by torch": (INT8, lambda model: by_torch(model, **BF16)),
    "exact by us": ({"exact_dtype": None}, by_us),
    "offloaded": (LOW, lambda model: by_us(model, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "exact every": (EVERY, by_us),
    "several forwards": (EVERY, lambda model: Several(by_us(model))),
    "several, another order": (EVERY, lambda model: Several(by_us(model), flipped=True)),
    "several, checkpointed": (EVERY, lambda model: Several(by_us(checkpointed(model, False)))),
    "upper layers": (UPPER, by_us),
    "residual": (RESIDUAL, by_us),
    "exact rows": ({**LOW, "exact_fraction": 1.0}, by_us),
    "half of the rows": ({**LOW, "exact_fraction": 0.5}, by_us),
    "checkpointed": (LOW, lambda model: by_us(checkpointed(model, False))),
    "checkpointed, exact every": (EVERY, lambda model: by_us(checkpointed(model, False))),
    "reentrant": (LOW, lambda model: by_us(checkpointed(model, reentrant=True))),
    "hooks inside": (LOW, lambda model: hooked_checkpoints(by_us(model))),
    "now and then": (LOW, lambda model: NowAndThen(by_us(model))),
    "kept": (LOW, lambda model: by_us(model, reshard_after_forward=False)),
    "frozen": ({**LOW, "freeze_below": 1}, by_us),
    "bf16": (LOW, lambda model: by_us(model, **BF16)),
    "bf16 by torch": (LOW, lambda model: by_torch(model, **BF16)),
    "autocast": (LOW, lambda model: Autocast(by_us(model))),
    "autocast by torch": (LOW, lambda model: Autocast(by_torch(model))),
}


def compiled_blocks(model: Any) -> Any:
    for layer in layers_of(model):
        layer.compile(backend="aot_eager")
    return model


def compiled_mlps(model: Any) -> Any:
    for layer in layers_of(model):
        layer.mlp.compile(backend="aot_eager")
    return model


COMPILED: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled blocks": compiled_blocks,
    "compiled MLPs": compiled_mlps,
}


def work(rank: int) -> dict[str, Any]:
    rows = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {}
    for name, (policy, shard) in VARIANTS.items():
        model = shard(lora() if policy is None else applied(policy))
        losses, steps = train_counted(model, rows, STEPS if name == "loge" else FEW)
        found[name] = {"losses": losses, "reduced": steps[0].total("reduce_scatter", True)}
        found[name]["forward"], found[name]["backward"] = (
            [step.total("allgather", backward) for step in steps[:FEW]] for backward in (False, True)
        )
        if name == "loge":
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            found["state"] = get_model_state_dict(model, options=options)
            held = [*layers_of(model).parameters(), *(t for f in factors_of(model) for t in f.tensors)]
            found["own share"] = sum(_local(tensor).nbytes for tensor in held)
    for name, compile_ in COMPILED.items():
        found[name] = {"losses": train(compile_(by_us(applied())), rows, FEW)}
    found["changed"] = changed_weights()
    found["other factors"] = other_factors(rank)
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
    model = by_us(applied(INT8))
    state = {name: 2 * tensor if ".base_layer." in name else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    said["copies"] = error_of(lambda: model(input_ids=tokens(), labels=tokens()).loss.backward())
    for policy in (LOW, UPPER, RESIDUAL, CALIBRATED, EVERY):
        flat = by_fsdp1(applied(policy))
        said[f"FSDP1 {sorted(policy)}"] = error_of(lambda flat=flat: train(flat, slice(None), 2))
    return said


def other_factors(rank: int) -> list[Tensor]:
    """The factors of one layer, of another decomposition on rank 1, as backward sees them."""
    model = applied(RESIDUAL)
    for factors in factors_of(model) if rank == 1 else []:
        factors.left, factors.right = -factors.left, -factors.right
        factors.rows, factors.residual = factors.rows.roll(1), 2 * factors.residual
    by_us(model)
    factors = layers_of(model)[0].self_attn.q_proj.base_layer.factors
    return [*(tensor.full_tensor() for tensor in factors.tensors), factors.rows]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def mean_losses(ranks: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([rank[name]["losses"] for rank in ranks]).mean(0)


def alone(steps: int, policy: dict[str, Any] | None = LOW, wrap: Callable[[Any], Any] = lambda model: model) -> Tensor:
    model = lora() if policy is None else applied(policy)
    return torch.tensor(train(wrap(model), slice(None), steps))


def block_bytes() -> dict[str, int]:
    """What the blocks hold, in bytes."""
    model = applied()
    found = {"weights": 0, "factors": sum(t.nbytes for f in factors_of(model) for t in f.tensors), "rest": 0}
    for name, p in layers_of(model).named_parameters():
        found["weights" if ".base_layer." in name else "rest"] += p.nbytes
        if ".base_layer." in name:
            found["copies"] = found.get("copies", 0) + p.numel() + 4 * p.shape[1]  # bytes, and a scale for a column
    return found


def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]]) -> None:
    assert (mean_losses(ranks, "loge") - alone(STEPS)).abs().max() < 1e-3
    exact = mean_losses(ranks, "peft")
    for name in ("loge", "exact every", "upper layers"):  # backward is the low-rank one
        assert (exact - mean_losses(ranks, name)[:FEW]).abs().max() > 1e-4


# A layer that a checkpoint computes again is exact: its weight is there.
EXACT: dict[str, Any] = {"exact_dtype": None}
ALONE: dict[str, dict[str, Any]] = {
    **{name: EXACT for name in VARIANTS if "checkpointed" in name or "reentrant" in name or "hooks" in name},
    "int8, checkpointed": INT8,
    "int8, reentrant": INT8,
    "now and then": EVERY,
    "half of the rows": EXACT,  # theirs are the weights of all
}
SETTINGS = [name for name in VARIANTS if name not in ("peft", "loge") and name.split()[0] not in ("bf16", "autocast")]


@pytest.mark.parametrize("name", SETTINGS)
def test_in_every_setting(ranks: list[dict[str, Any]], name: str) -> None:
    policy = ALONE.get(name, VARIANTS[name][0])
    wrap = Several if name.startswith("several") else lambda model: model
    expected = alone(FEW, policy, wrap)
    assert (mean_losses(ranks, name) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(ranks: list[dict[str, Any]], name: str) -> None:
    """The sharded blocks run outside graphs; what is compiled inside them is."""
    assert (mean_losses(ranks, name) - mean_losses(ranks, "loge")[:FEW]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["bf16", "autocast"])
def test_mixed_precision_is_as_under_torchs_own(ranks: list[dict[str, Any]], name: str) -> None:
    assert torch.equal(mean_losses(ranks, name), mean_losses(ranks, f"{name} by torch"))
    assert (mean_losses(ranks, name) - mean_losses(ranks, "loge")[:FEW]).abs().max() < 0.05


def test_copies_are_of_the_weights_before_they_are_cast(ranks: list[dict[str, Any]]) -> None:
    """Under torch's own `fully_shard` they are of the 16-bit ones that a forward has."""
    assert (mean_losses(ranks, "bf16 int8") - mean_losses(ranks, "bf16 int8 by torch")).abs().max() < 0.01
    assert (mean_losses(ranks, "bf16 int8") - mean_losses(ranks, "int8")).abs().max() < 0.05


def test_backward_gathers_factors_and_adapters_alone(ranks: list[dict[str, Any]]) -> None:
    peft, ours, blocks = ranks[0]["peft"], ranks[0]["loge"], block_bytes()
    assert peft["backward"] == [blocks["weights"] + blocks["rest"]] * FEW
    assert ours["backward"] == [blocks["factors"] + blocks["rest"]] * FEW
    assert blocks["factors"] < 0.7 * blocks["weights"]
    assert ours["reduced"] == peft["reduced"]
    assert ranks[1]["loge"]["backward"] == ours["backward"]


PEFTS = {"weights": 1.0, "rest": 1.0}
COPIES = {"copies": 1.0, "rest": 1.0}
FACTORS = {"factors": 1.0, "rest": 1.0}


@pytest.mark.parametrize(
    ("name", "expected", "following"),
    [
        ("offloaded", FACTORS, FACTORS),  # what is not gathered is not copied to the device either
        ("kept", {"factors": 1.0}, {"factors": 1.0}),
        ("exact every", PEFTS, FACTORS),  # exact, then low-rank
        ("upper layers", {"weights": 0.5, "factors": 0.5, "rest": 1.0}, None),
        ("exact rows", PEFTS, PEFTS),
        ("half of the rows", PEFTS, PEFTS),
        ("frozen", {"factors": 0.5, "rest": 0.5}, None),
        ("checkpointed", PEFTS, PEFTS),  # computed again, from the weights, which then serve backward as well
        ("checkpointed, exact every", PEFTS, PEFTS),
        ("reentrant", PEFTS, PEFTS),
        ("hooks inside", PEFTS, PEFTS),
        ("now and then", PEFTS, FACTORS),
        ("int8", COPIES, COPIES),
        ("float8", COPIES, COPIES),
        ("int8, offloaded", COPIES, COPIES),
        ("int8, checkpointed", PEFTS, PEFTS),  # which then makes its copies of them
        ("int8, reentrant", PEFTS, PEFTS),
        ("int8, now and then", PEFTS, COPIES),
        ("int8 every", COPIES, FACTORS),
        ("exact by us", PEFTS, PEFTS),
    ],
)
def test_what_backward_gathers(
    ranks: list[dict[str, Any]], name: str, expected: dict[str, float], following: dict[str, float] | None
) -> None:
    blocks, found = block_bytes(), ranks[0][name]
    turns = [sum(share * blocks[kind] for kind, share in kinds.items()) for kinds in (expected, following or expected)]
    assert found["backward"] == turns * (FEW // 2)
    assert found["forward"] == ranks[0]["peft"]["forward"]


def test_autocast_reads_factors_in_forward(ranks: list[dict[str, Any]]) -> None:
    blocks = block_bytes()
    assert ranks[0]["autocast"]["forward"] == [n + blocks["factors"] for n in ranks[0]["peft"]["forward"]]
    assert ranks[0]["autocast"]["backward"] == ranks[0]["loge"]["backward"]


def test_a_rank_keeps_its_share(ranks: list[dict[str, Any]]) -> None:
    held = block_bytes()
    assert ranks[0]["own share"] + ranks[1]["own share"] == sum(held.values()) - held["copies"]


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
        assert "its 8-bit copy cannot follow" in rank["changed"]["copies"]
        flat = [said for name, said in rank["changed"].items() if name.startswith("FSDP1")]
        assert len(flat) == 5
        assert all("inside a FullyShardedDataParallel (FSDP1)" in said for said in flat)


def test_ranks_agree_on_factors(ranks: list[dict[str, Any]]) -> None:
    factors = layers_of(applied(RESIDUAL))[0].self_attn.q_proj.base_layer.factors
    for rank in ranks:
        for got, expected in zip(rank["other factors"], [*factors.tensors, factors.rows], strict=True):
            assert torch.equal(got, expected)
