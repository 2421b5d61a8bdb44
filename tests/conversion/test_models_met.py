"""Models, ways to adapt them and wrappers that users meet: what is converted has PEFT's gradients, what is not has a
reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from models import assert_close, llama, lora
from quantized_layers import K, N
from ranks import broadcasts
from situations import (
    EXACT,
    LOW,
    ONE_IN_TWO,
    applied,
    assert_same_gradients,
    assert_same_weights,
    derived,
    loss_of,
    pair,
    train,
    trained,
)
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge

SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
BOTH = pytest.mark.parametrize("policy", [EXACT, LOW], ids=["exact", "low rank"])


# PEFT around a model that was applied first

CONFIGS: dict[str, dict[str, Any]] = {
    "adapters alone": {},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "a trained head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "a trained layer beside adapters": {"modules_to_save": ["o_proj"], "target_modules": ["q_proj", "down_proj"]},
    "a trained layer, tied words": {"modules_to_save": ["o_proj"], "target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("error:.*weight has changed")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("policy", [EXACT, LOW, ONE_IN_TWO], ids=["exact", "low rank", "one in two"])
def test_peft_around_an_applied_model(policy: dict[str, Any], config: dict[str, Any]) -> None:
    """As `apply` on the PEFT model: what is trained whole has its exact gradient, and passes an exact one on."""
    base = llama(tied="words" in str(config)).requires_grad_(False)
    plain = lora(copy.deepcopy(base), **config).train()
    first = lora(applied(base, policy), **config).train()
    twin = plain if policy is EXACT else applied(copy.deepcopy(plain), policy)
    for seed in range(2):
        assert_close(derived(first, seed), derived(twin, seed), 3e-5)
        for one in (first, twin):
            train(one, [seed])
    assert_same_weights(first, twin, 3e-5)


# Embeddings that are sparse


def test_sparse_embeddings_train_beside_adapters() -> None:
    plain = pair()[0]
    embedding = plain.get_base_model().model.embed_tokens
    embedding.sparse = True
    embedding.weight.requires_grad_()
    model = applied(copy.deepcopy(plain))
    found = []
    for one in (plain, model):
        gradients = derived(one)
        (name,) = [name for name in gradients if "embed_tokens" in name]
        assert gradients[name].is_sparse
        found.append({**gradients, name: gradients[name].to_dense()})
    assert_close(*reversed(found), 1e-5)


# GPT-2


def gpt2() -> Any:
    torch.manual_seed(3)
    config = hf.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return hf.GPT2LMHeadModel(config)


def adapted_gpt2() -> Any:
    return lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True).train()


GPT2 = {"PEFT": adapted_gpt2, "plain": lambda: gpt2().requires_grad_(False)}


@pytest.mark.parametrize("make", GPT2.values(), ids=GPT2)
def test_what_keeps_gpt2_from_being_applied_is_said(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="nothing to convert") as raised:
        loge.apply(make(), **EXACT)
    assert all(part in str(raised.value) for part in ("Conv1D", "transposed", "c_attn", "and 6 more"))


def test_gpt2s_layers_are_in_the_report() -> None:
    plain = adapted_gpt2()
    plain.get_base_model().add_module("extra", nn.Linear(32, 32).requires_grad_(False))
    model = copy.deepcopy(plain)
    report = loge.apply(model, **EXACT)
    rows = {row.name: row for row in report.layers if "Conv1D" in row.reason}
    assert len(rows) == 8
    assert {row.path for row in rows.values()} == {"skipped"}
    assert rows["base_model.model.transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert rows["base_model.model.transformer.h.1.mlp.c_proj"].shape == (32, 128)
    assert [row.name for row in report.converted] == ["base_model.model.extra"]
    assert "c_attn" in str(report)
    assert_close(derived(model), derived(plain), 1e-5)


# Mixtures of experts, whose weights are one parameter of three dimensions

EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, num_local_experts=4)),
    "qwen3": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**SIZE, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
}
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "every expert": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make", EXPERTS.values(), ids=EXPERTS)
def test_experts_are_counted_and_named(make: Callable[[], nn.Module], targets: dict[str, Any]) -> None:
    torch.manual_seed(6)
    plain = lora(make(), **targets).train()
    model = copy.deepcopy(plain)
    report = loge.apply(model, **EXACT)
    rows = {row.name: row for row in report.layers if "experts" in row.name}
    names = {f"base_model.model.model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in SHAPES}
    assert set(rows) == names
    for name, row in rows.items():
        assert row.path == "skipped"
        assert "experts" in row.reason
        E, N, K = row.shape
        assert (E, {N, K}) == (4, SHAPES[name.rpartition(".")[2]])  # gpt-oss has [K, N]
    assert all(line in str(report) for line in ("4 x ", "several weights in one parameter"))
    assert len(report.converted) == 8
    assert_close(derived(model), derived(plain), 1e-5)
    counted = {n: p.numel() for n, p in plain.named_parameters() if n.rpartition(".")[2] in SHAPES or is_linear(n)}
    ours = sum(count for name, count in counted.items() if "self_attn" in name)
    assert report.share_converted == pytest.approx(ours / sum(counted.values()))


SHAPES = {"gate_up_proj": {96, 32}, "down_proj": {32, 48}}


def is_linear(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in ("_proj.", "lm_head")) and "lora" not in name


# Quantised layers that cannot be converted


def left_alone(layer: nn.Module) -> str:
    model = nn.Sequential(layer, nn.Linear(N, N)).requires_grad_(False)
    before = type(layer)
    row = loge.apply(model, 0.25).layers[0]
    assert row.path == "skipped"
    assert type(model[0]) is before
    return row.reason


def test_layers_that_are_left_alone() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    assert "not quantised yet" in left_alone(bnb.nn.Linear4bit(K, N))
    assert "not quantised yet" in left_alone(bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False))
    assert "has_fp16_weights=False" in left_alone(bnb.nn.Linear8bitLt(K, N))

    class Own(bnb.nn.Linear4bit):
        pass

    assert "Own" in left_alone(Own(K, N).to("cpu"))
    turned = bnb.nn.Linear4bit(K, N).to("cpu")
    turned.in_features, turned.out_features = N, K
    assert f"({N}, {K})" in left_alone(turned)


def test_activations_that_torchao_quantises_too() -> None:
    pytest.importorskip("torchao")
    from torchao import quantization

    model = nn.Sequential(nn.Linear(K, N))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    assert "weight-only" in left_alone(model[0])


@pytest.mark.parametrize("library", ["gptqmodel", "awq"])
def test_gptq_and_awq_are_refused(library: str) -> None:
    """By name: these are no layers of the libraries, whose packages cannot be installed for the tests."""

    class TorchLinear(nn.Module):
        in_features, out_features = K, N

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(K // 8, N, dtype=torch.int32))

    TorchLinear.__module__ = f"{library}.nn_modules.qlinear.torch"
    model = nn.Sequential(TorchLinear(), nn.Linear(N, N)).requires_grad_(False)
    row = loge.apply(model, 0.25).layers[0]
    assert (row.shape, row.path) == ((N, K), "skipped")
    assert f"of {library}: GPTQ and AWQ" in row.reason


# Wrappers around an optimizer and around models


def test_an_optimizer_around_another(one_rank: None) -> None:
    def wrapped(model: nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(trained(model).values(), torch.optim.AdamW, lr=1e-2, eps=1e-3)

    plain, model = pair()
    for one in (plain, model):
        train(one, range(4), wrapped(one))
    assert_same_weights(plain, model, 5e-5)
    # Which forwards are exact is no matter of the optimizer: the first and the third are.
    plain, model = pair(policy=ONE_IN_TWO)
    other = applied(pair()[0], LOW)
    optimizer = wrapped(model)
    for seed in range(4):
        exact = seed % 2 == 0
        loss_of(model, seed).backward()
        twin = plain if exact else other
        twin.load_state_dict(model.state_dict())
        loss_of(twin, seed).backward()
        assert_same_gradients(twin, model)
        optimizer.step()
        for one in (model, plain, other):
            one.zero_grad()


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no broadcast of buffers": {"broadcast_buffers": False},
    "unused parameters": {"find_unused_parameters": True},
    "gradients are views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
}


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True")
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@BOTH
def test_distributed_data_parallel(policy: dict[str, Any], options: dict[str, Any], one_rank: None) -> None:
    found = []
    plain, model = pair(policy=policy)
    twin = plain if policy is EXACT else applied(pair()[0], policy)
    for one in (plain, model):
        with broadcasts() as sent:
            wrapped = DistributedDataParallel(one, **options)
            for seed in range(3):
                one.zero_grad()
                loss_of(wrapped, seed).backward()
        found.append(sent)
        del wrapped
    assert found[0] == found[1]
    if twin is not plain:
        for seed in range(3):
            twin.zero_grad()
            loss_of(twin, seed).backward()
    assert_same_gradients(twin, model)
