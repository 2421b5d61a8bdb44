"""`LoGELinear`: an `nn.Linear` to everyone, with another backward."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import LoGELinear

LORA = {"lora_rank": 4, "lora_alpha": 6}


def layer_pair(rank: int | float | None = 8, bias: bool = True, **options: Any) -> tuple[nn.Linear, LoGELinear]:
    linear = nn.Linear(24, 20, bias=bias)
    layer = LoGELinear.from_linear(linear, rank=rank, **{**LORA, **options})
    if layer.lora_B is not None:
        nn.init.normal_(layer.lora_B)
    return linear, layer


def input_gradient(layer: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(5, 24, requires_grad=True)
    (layer(x) * torch.randn(5, 20)).sum().backward()
    return x.grad


def expected_gradient(layer: LoGELinear, frozen: Tensor, seed: int = 0) -> Tensor:
    """dX when `frozen` stands for the weight."""
    torch.manual_seed(seed)
    torch.randn(5, 24)
    dy = torch.randn(5, 20)
    dx = dy @ frozen
    return dx if layer.lora_A is None else dx + layer.scaling * dy @ layer.lora_B @ layer.lora_A


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(bias: bool) -> None:
    linear, layer = layer_pair(bias=bias)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert not layer.weight.requires_grad
    assert linear.weight.requires_grad, "the given layer stays as it is"
    assert (layer.bias is None) == (not bias)
    assert layer.scaling == 1.5
    assert layer.factors.rank == 8
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(layer(x), linear(x) + 1.5 * x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(
        input_gradient(layer), expected_gradient(layer, layer.factors.left @ layer.factors.right), rtol=1e-4, atol=1e-5
    )
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_A", "lora_B"}


def test_defaults_are_the_documented_ones() -> None:
    layer = LoGELinear.from_linear(nn.Linear(300, 280))
    assert (layer.factors.rank, layer.lora_A.shape[0], layer.scaling, layer.lora_dropout) == (256, 16, 2.0, 0.0)


def test_adapter_starts_like_pefts() -> None:
    for dtype, name in (("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")):
        dtype, expected = getattr(torch, dtype), getattr(torch, name)
        layer = LoGELinear.from_linear(nn.Linear(24, 20, dtype=dtype), rank=8, **LORA)
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (expected, expected)
        assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 24), (20, 4))
        assert layer.lora_B.abs().max() == 0
        bound = 1 / math.sqrt(24)  # Kaiming uniform with a = sqrt(5)
        assert 0.5 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad


@pytest.mark.parametrize(("rank", "lora_rank"), [(None, 4), (1.0, 4), (None, 0), (1.0, 0), (8, 0)])
def test_exact_mode_and_no_adapter(rank: float | None, lora_rank: int) -> None:
    linear, layer = layer_pair(rank, lora_rank=lora_rank)
    assert (layer.factors is None) == (rank is None)
    assert (layer.lora_A is None) == (lora_rank == 0)
    frozen = linear.weight.detach() if rank != 8 else layer.factors.left @ layer.factors.right
    torch.testing.assert_close(input_gradient(layer), expected_gradient(layer, frozen), rtol=1e-4, atol=1e-5)
    if lora_rank == 0:
        assert torch.equal(layer(torch.ones(2, 24)), linear(torch.ones(2, 24)))
    assert LoGELinear(24, 20, bias=False).bias is None


def test_plain_constructor_is_exact_and_trainable() -> None:
    torch.manual_seed(1)
    layer = LoGELinear(24, 20)
    torch.manual_seed(1)
    linear = nn.Linear(24, 20)
    assert torch.equal(input_gradient(layer), input_gradient(linear))
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def test_dropout_only_in_training() -> None:
    linear, layer = layer_pair(lora_dropout=0.5)
    x = torch.randn(4, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), linear(x) + 1.5 * x @ layer.lora_A.t() @ layer.lora_B.t())
    assert not LoGELinear.from_linear(linear.eval(), rank=8).training


def test_exact_fraction_and_backend_reach_the_op() -> None:
    linear, layer = layer_pair(exact_fraction=1.0, backend="reference")
    torch.testing.assert_close(input_gradient(layer), expected_gradient(layer, linear.weight), rtol=1e-4, atol=1e-5)
    layer.backend = "nope"
    with pytest.raises(ValueError, match="nope"):
        layer(torch.ones(1, 24))


def test_state_dict_is_that_of_a_linear_layer_and_an_adapter() -> None:
    linear, layer = layer_pair()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert set(layer_pair(lora_rank=0)[1].state_dict()) == {"weight", "bias"}
    _, other = layer_pair()
    other.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(input_gradient(other), input_gradient(layer))
    plain = LoGELinear(24, 20)
    plain.load_state_dict(linear.state_dict(), strict=True)
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "lora_A", "lora_B"}
    assert not list(layer.buffers())
    assert len(list(layer.modules())) == 1


# Factors follow the weight


def follows(layer: LoGELinear) -> None:
    """The next training gradient is that of fresh factors of the weight as it is."""
    expected = loge.factorize(layer.weight.detach().clone(), 8)
    torch.testing.assert_close(
        input_gradient(layer), expected_gradient(layer, expected.left @ expected.right), rtol=1e-3, atol=1e-4
    )


def other_weight() -> dict[str, Tensor]:
    return {"weight": torch.randn(20, 24), "bias": torch.randn(20)}


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_frozen_weight_is_followed(assign: bool) -> None:
    _, layer = layer_pair()
    follows(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict(other_weight(), strict=False, assign=assign)
        layer.weight.requires_grad_(False)
        follows(layer)
        with torch.no_grad():
            layer.weight.mul_(-2)
        follows(layer)


def test_refresh_after_an_uncounted_change() -> None:
    _, layer = layer_pair()
    layer.weight.data = torch.randn(20, 24)
    layer.refresh()
    follows(layer)
    layer.weight.data.mul_(-1)
    layer.invalidate()
    follows(layer)
    layer_pair(None)[1].refresh()
    layer.factors = loge.Factors(layer.factors.left, layer.factors.right)
    with pytest.raises(ValueError, match="given by hand"):
        layer.refresh()


def test_without_gradients_nothing_is_recomputed_nor_said() -> None:
    _, layer = layer_pair()
    layer.load_state_dict(other_weight(), strict=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(1, 24))
        assert layer.factors.made_of.changed(layer.weight)
    follows(layer)


def test_trainable_weight_warns_once() -> None:
    _, layer = layer_pair()
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    heard = []
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            input_gradient(layer)
        heard.append([str(w.message) for w in caught])
        optimizer.step()
    assert heard[0] == []
    assert len(heard[1]) == 1
    assert "weight has changed" in heard[1][0]
    assert heard[2] == []
    layer.refresh()
    follows(layer)


def test_a_replaced_trainable_weight_is_not_silently_stale() -> None:
    _, layer = layer_pair()
    layer.weight.requires_grad_(True)
    layer.load_state_dict(other_weight(), strict=False, assign=True)
    assert layer.weight.requires_grad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradient = input_gradient(layer)
    fresh = loge.factorize(layer.weight.detach(), 8)
    expected = expected_gradient(layer, fresh.left @ fresh.right)
    assert caught or torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(way: Any) -> None:
    _, layer = layer_pair()
    other = way(layer)
    assert torch.equal(input_gradient(other), input_gradient(layer))
    with torch.no_grad():
        other.weight.mul_(-3)
    follows(other)
    follows(layer)


@pytest.mark.parametrize("how", ["loaded", "declared"])
def test_a_copy_of_a_stale_layer_is_stale(how: str) -> None:
    _, layer = layer_pair()
    if how == "loaded":
        layer.load_state_dict(other_weight(), strict=False)
    else:
        layer.weight.data.copy_(torch.randn(20, 24))
        layer.invalidate()
    follows(copy.deepcopy(layer))


# In place


def test_convert_and_revert() -> None:
    linear = nn.Linear(24, 20)
    before = dict(vars(linear)), list(linear.state_dict())
    factors = loge.factorize(linear.weight, 8)
    LoGELinear.convert_(linear, factors, 0.25, "reference")
    assert type(linear) is LoGELinear
    assert linear.converted
    assert (linear.factors, linear.exact_fraction, linear.backend) == (factors, 0.25, "reference")
    linear.revert_()
    assert type(linear) is nn.Linear
    assert (dict(vars(linear)), list(linear.state_dict())) == before
    assert not LoGELinear(2, 2).converted


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"linear": nn.Conv1d(2, 2, 1)}, TypeError, ["linear", "Conv1d", "torch.nn.Linear"]),
        ({"rank": 21}, ValueError, ["rank=21", "1 to 20"]),
        ({"rank": 1.5}, ValueError, ["rank=1.5", "(0, 1]"]),
        ({"lora_rank": -1}, ValueError, ["lora_rank=-1", "0"]),
        ({"lora_rank": 2.0}, ValueError, ["lora_rank=2.0", "int"]),
        ({"lora_rank": True}, ValueError, ["lora_rank=True"]),
        ({"lora_dropout": 1.0}, ValueError, ["lora_dropout=1.0", "[0, 1)"]),
        ({"exact_fraction": 2}, ValueError, ["exact_fraction=2", "[0, 1]"]),
        ({"backend": "nope"}, ValueError, ["backend='nope'", "'reference'"]),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        LoGELinear.from_linear(**{"linear": nn.Linear(24, 20), "rank": 8, **options})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_repr_shows_the_adapter_and_the_factors() -> None:
    text = repr(layer_pair()[1])
    for part in ("in_features=24", "lora_rank=4", "scaling=1.5", "rank=8"):
        assert part in text
