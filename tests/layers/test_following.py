"""8-bit copies and factors follow their weight where nothing counts its changes: fused optimizers, compiled graphs,
tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import loge_kernels as loge
from loge_kernels.numerics import rotation


def two_layers(seed: int, size: int = 96) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)).requires_grad_(False)


def dx(model: Any, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    return gradient


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("exact_dtype", ["int8", "float8"])
def test_a_weight_that_a_fused_optimizer_trains(exact_dtype: str) -> None:
    model: Any = two_layers(0).requires_grad_(True)
    loge.apply(model, targets=["0", "1"], exact_dtype=exact_dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    x = torch.randn(64, 96, requires_grad=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    plain = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(2)))
    plain.load_state_dict(model.state_dict())
    assert error(dx(model, x), dx(plain, x)) < 0.06


POLICIES: list[dict[str, Any]] = [
    {"exact_dtype": "int8"},
    {"exact_dtype": "float8"},
    {"rank": 40},  # low enough to be taken
    {"rank": 40, "base_dtype": "int8"},
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model_that_loads_a_state_dict(policy: dict[str, Any], compiled_first: bool) -> None:
    model: Any = two_layers(0)
    loge.apply(model, targets=["0", "1"], **policy)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(64, 96, requires_grad=True)
    if compiled_first:
        dx(compiled, x)
    model.load_state_dict(two_layers(1).state_dict(), strict=False)
    assert error(dx(compiled, x), dx(two_layers(1), x)) < 0.3  # of the weights before it 1.4


def test_a_compiled_model_whose_factors_are_out_of_date_is_exact() -> None:
    model: Any = two_layers(0)
    loge.apply(model, targets=["0", "1"], rank=8)
    for layer in model:
        layer.weight.data.copy_(two_layers(1)[0].weight)
        layer.invalidate()
    plain = two_layers(0)
    for layer in plain:
        layer.weight.copy_(two_layers(1)[0].weight)
    x = torch.randn(64, 96, requires_grad=True)
    assert error(dx(torch.compile(model, backend="aot_eager"), x), dx(plain, x)) < 1e-5


def test_a_rotation_that_is_traced_first_leaves_nothing_behind() -> None:
    rotation._kept.cache_clear()
    x = torch.randn(4, 32)
    with FakeTensorMode() as mode:
        rotation.rotate(mode.from_tensor(x), 32)
    with torch.inference_mode():
        rotation.rotate(x, 32)
    torch.testing.assert_close(rotation.rotate(rotation.rotate(x.requires_grad_(), 32), 32), x)


def test_a_base_in_8_bits_is_exported_first() -> None:
    expected, model = two_layers(0), two_layers(0)
    loge.apply(model, targets=["0", "1"], base_dtype="int8")
    rotation._kept.cache_clear()
    x = torch.randn(8, 96)
    torch.export.export(model, (x,))
    assert error(model(x), expected(x)) < 0.05
