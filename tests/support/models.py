"""Tiny models for the tests of `apply`: a LLaMA from a config, with PEFT adapters or without, and a plain stack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import loge_kernels as loge

VOCABULARY = 50
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 2, **options: Any) -> LlamaForCausalLM:
    """64 wide; the same weights at every call."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype)


def lora(model: nn.Module | None = None, **options: Any) -> Any:
    """A PEFT model with adapters that are not zero; the same at every call."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": LINEARS, **options})
    base: Any = llama() if model is None else model
    torch.manual_seed(9)
    return randomised(get_peft_model(base, config))


def randomised(model: nn.Module) -> Any:
    """Every LoRA matrix that starts at zero gets values, so that each gradient has something to say."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = values.to(parameter.dtype)
    return model


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module, **options: Any) -> Tensor:
    return model(input_ids=tokens(), **options).logits.detach().clone()


def gradients(model: nn.Module, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """The gradient of every trainable parameter after one forward and backward; `.grad` is cleared."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens(), **options).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def modules_of(model: nn.Module, kind: type | Callable[[Any], bool]) -> list[str]:
    """Names of the modules that are exactly of a class, or that a predicate picks."""
    test = (lambda module: type(module) is kind) if isinstance(kind, type) else kind
    return [name for name, module in model.named_modules() if test(module)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """The same keys; each tensor within `tolerance` of the expected one's largest value."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        error = (got[name].double() - tensor.double()).abs().max().item()
        assert error <= tolerance * tensor.abs().max().item() + 1e-12, f"{name}: {error}"


def assert_within_twice_pefts(got: dict[str, Tensor], pefts: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """The same dtypes as PEFT's gradients, and at most twice their relative error, and a rounding to 8 bits."""
    assert set(got) == set(pefts) == set(truth)
    for name, expected in truth.items():
        assert got[name].dtype == pefts[name].dtype, name
        ours, theirs = ((g[name].double() - expected).norm() / expected.norm() for g in (got, pefts))
        assert ours <= 2 * theirs + 2**-8, (name, ours, theirs)


def assert_differ(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """At least one gradient is visibly another."""
    assert any((got[n].double() - t.double()).norm() > 0.01 * t.double().norm() for n, t in expected.items())


class SurrogateLinear(torch.autograd.Function):
    """x Wᵀ whose input gradient uses `stand_in`: what a low-rank layer must do, in two lines."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stand_in: Tensor) -> Tensor:
        ctx.save_for_backward(stand_in)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (stand_in,) = ctx.saved_tensors
        return dy @ stand_in, None, None


def use_surrogate(model: nn.Module, stand_ins: dict[str, Tensor]) -> None:
    """Give the named linear layers of `model` the input gradient of `stand_ins`, by another road than the package."""
    for name, stand_in in stand_ins.items():
        layer: Any = model.get_submodule(name)

        def forward(x: Tensor, layer: Any = layer, stand_in: Tensor = stand_in) -> Tensor:
            y = SurrogateLinear.apply(x, layer.weight, stand_in)
            return y if layer.bias is None else y + layer.bias

        layer.forward = forward


def stand_ins(model: nn.Module, names: list[str], rank: int | float = 0.25) -> dict[str, Tensor]:
    """left @ right of each named layer, computed anew."""
    made = {name: loge.factorize(model.get_submodule(name).weight, rank) for name in names}
    return {name: factors.left @ factors.right for name, factors in made.items()}


# PEFT models in pairs: one converted, one of PEFT alone with the surrogate's gradient

RANK = 0.25
POWER_OF_TWO = {"r": 4, "lora_alpha": 8}  # a scaling that does not round: outputs can be compared bit for bit


def bases(model: nn.Module) -> list[str]:
    """The names of the frozen linear layers inside PEFT's LoRA layers."""
    return [f"{name}.base_layer" for name in modules_of(model, lambda module: isinstance(module, LoraLinear))]


def twins(rank: int | float = RANK, **options: Any) -> tuple[Any, Any, loge.Report]:
    """A converted PEFT model, and PEFT's own of the same numbers whose base layers have a surrogate gradient."""
    model, other = lora(**options), lora(**options)
    report = loge.apply(model, rank)
    use_surrogate(other, stand_ins(other, bases(other), rank))
    return model, other, report


def paths(report: loge.Report) -> set[str]:
    return {row.path for row in report.layers if row.name.rpartition(".")[2] in LINEARS}


def input_gradient(model: Any) -> Tensor:
    """The gradient of the embeddings: there even when no adapter is active."""
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=tokens()).loss.backward()
    model.zero_grad()
    assert embeddings.grad is not None
    return embeddings.grad


def assert_low_rank_of_its_weights(model: Any, other: Any) -> None:
    """`model`'s input gradient is that of `other` with fresh factors of `other`'s weights as they are."""
    twin = copy.deepcopy(other)
    use_surrogate(twin, stand_ins(twin, bases(twin), RANK))
    assert_close({"x": input_gradient(model)}, {"x": input_gradient(twin)}, 1e-3)


def two(adapters: Callable[[Any], None] = lambda model: None, after: bool = False) -> tuple[Any, Any]:
    """Converted and surrogate twins with adapters "default" and "second", made before or after `apply`."""
    model, other = lora(), lora()
    second = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    if after:
        loge.apply(model, RANK)
    for one in (model, other):
        torch.manual_seed(21)
        one.add_adapter("second", second)
        randomised(one)
        adapters(one)
    if not after:
        loge.apply(model, RANK)
    use_surrogate(other, stand_ins(other, bases(other), RANK))
    return model, other
