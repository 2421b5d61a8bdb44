"""FSDP2 over quantised bases (FSDP-QLoRA) on two ranks: the same training, and the bytes of packed weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import lora
from quantized_layers import TORCHAO, quantised_llama
from ranks import Collectives, error_of, on_two_ranks, train
from situations import EXACT, LOW
from test_fsdp import by_torch, by_us, layers_of
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import loge_kernels as loge
from loge_kernels.layers.quantized import QuantizedLinear

STEPS = 4
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
POLICIES = {"low rank": LOW, "exact": EXACT, "int8": {"exact_dtype": "int8"}}
KINDS = ("nf4", "nf4 in bfloat16", "fp4", "int8")
OPTIONS: dict[str, dict[str, Any]] = {
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept": {"reshard_after_forward": False},
}


def applied(kind: str, policy: dict[str, Any]) -> Any:
    model = lora(quantised_llama(kind))
    loge.apply(model, **policy)
    return model


def one(model: Any, rows: slice) -> dict[str, Any]:
    with Collectives() as seen:
        losses = train(model, rows, STEPS)
    ways = {way: seen.total("allgather", way == "backward") // STEPS for way in ("forward", "backward")}
    return {"losses": losses, **ways}


def work(rank: int) -> dict[str, Any]:
    rows = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {"peft": one(by_torch(lora(quantised_llama("nf4"))), rows)}
    for kind in KINDS:
        for policy, arguments in POLICIES.items():
            found[f"{kind}, {policy}"] = one(by_us(applied(kind, arguments)), rows)
    for option, arguments in OPTIONS.items():
        found[f"nf4, {option}"] = one(by_us(applied("nf4", LOW), **arguments), rows)
    found["16-bit storage"] = one(by_us(stored_in(torch.bfloat16, LOW), mp_policy=BF16), rows)
    found["cast"] = error_of(lambda: by_us(stored_in(torch.float32, LOW), mp_policy=BF16))
    for kind in TORCHAO:
        found[kind] = error_of(lambda kind=kind: by_us(applied(kind, LOW)))
    model = by_us(stored_in(torch.bfloat16, LOW), mp_policy=BF16)
    model.load_state_dict(model.state_dict(), strict=False)  # read as bfloat16, packed numbers may be NaN
    found["loaded again"] = one(model, rows)
    return found


def stored_in(dtype: torch.dtype, policy: dict[str, Any]) -> Any:
    """With packed weights that say they were of `dtype`, as `bnb_4bit_quant_storage` has them."""
    model = lora(quantised_llama("nf4 in bfloat16", dtype=torch.bfloat16))
    for layer in list(model.modules()):
        if type(layer).__name__ == "Linear4bit":
            layer.weight.data = layer.weight.data.flatten().view(dtype).view(-1, 1)
            layer.weight.quant_storage = layer.quant_storage = dtype
    loge.apply(model, **policy)
    return model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def bytes_of(kind: str) -> dict[str, int]:
    """What the blocks hold."""
    model = applied(kind, LOW)
    layers = [module for module in layers_of(model).modules() if isinstance(module, QuantizedLinear)]
    found = {"weights": sum(layer.weight.nbytes for layer in layers)}
    found["factors"] = sum(t.nbytes for layer in layers if layer.factors for t in layer.factors.tensors)
    found["rest"] = sum(p.nbytes for p in layers_of(model).parameters()) - found["weights"]
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], kind: str, policy: str) -> None:
    mean = torch.tensor([rank[f"{kind}, {policy}"]["losses"] for rank in ranks]).mean(0)
    alone = torch.tensor(train(applied(kind, POLICIES[policy]), slice(None), STEPS))
    assert (mean - alone).abs().max() < (5e-3 if "bfloat16" in kind else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_low_rank_backward_gathers_no_packed_weight(ranks: list[dict[str, Any]], kind: str) -> None:
    held = bytes_of(kind)
    for rank in ranks:
        assert rank[f"{kind}, low rank"]["backward"] == held["factors"] + held["rest"]
        for policy in ("exact", "int8"):
            assert rank[f"{kind}, {policy}"]["backward"] == held["weights"] + held["rest"]
    if kind != "int8":  # which bitsandbytes itself cannot run sharded
        assert ranks[0]["peft"]["backward"] == held["weights"] + held["rest"]


@pytest.mark.parametrize("option", OPTIONS)
def test_options(ranks: list[dict[str, Any]], option: str) -> None:
    for rank in ranks:
        assert rank[f"nf4, {option}"]["losses"] == pytest.approx(rank["nf4, low rank"]["losses"], abs=1e-5)
        assert rank["loaded again"]["losses"] == rank["16-bit storage"]["losses"]


def test_packed_in_16_bits(ranks: list[dict[str, Any]]) -> None:
    """Under `MixedPrecisionPolicy` of the same dtype they are not cast; of another one they would be."""
    mean = torch.tensor([rank["16-bit storage"]["losses"] for rank in ranks]).mean(0)
    alone = torch.tensor(train(stored_in(torch.bfloat16, LOW), slice(None), STEPS))
    assert (mean - alone).abs().max() < 0.05
    assert "load the model with bnb_4bit_quant_storage=torch.bfloat16, or torch.uint8" in ranks[1]["cast"]


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchaos_tensors_cannot_be_split(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        assert "FSDP2 cannot split a" in rank[kind]
        assert "use DDP, or quantise by bitsandbytes" in rank[kind]
