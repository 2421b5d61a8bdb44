"""Exact steps (`exact_fraction=1`), exact rows, and one graph differentiated twice: cheaply and exactly."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

import pytest
import torch
from surrogate import Case, case, gradients, heaviest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loge_kernels as loge
from loge_kernels import LoGELinear, reference
from loge_kernels.ops import cheap_backward, in_cheap_backward

registry = import_module("loge_kernels.backends")


def graph(c: Case, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """y and its leaves that take a gradient."""
    leaves = {name: getattr(c, name).detach().clone().requires_grad_() for name in ("x", "lora_A", "lora_B")}
    x, A, B = leaves.values()
    return loge.linear(x, c.weight, c.factors(), c.bias, A, B, c.scaling, **options), leaves


def derive(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    got = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    return dict(zip(leaves, got, strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_one_graph_twice() -> None:
    c = case()
    exact, cheap = gradients(c, exact_rows=heaviest(c.dy, 7)), gradients(c)
    y, leaves = graph(c, exact_fraction=1.0)
    assert_same(derive(y, leaves, c.dy), exact)
    with cheap_backward():
        assert_same(derive(y, leaves, c.dy), cheap)
    assert_same(derive(y, leaves, c.dy), exact)
    with cheap_backward():
        z, leaves = graph(c, exact_fraction=1.0)
    assert_same(derive(z, leaves, c.dy), exact)


def test_the_cheap_pass_has_the_dropout_and_the_residual_of_the_exact_one() -> None:
    c = case()
    made = c.factors().with_residual(c.weight, 4)
    leaves = {name: getattr(c, name).clone().requires_grad_() for name in ("x", "lora_A", "lora_B")}
    x, A, B = leaves.values()
    results = []
    for fraction in (0.0, 1.0):
        torch.manual_seed(3)
        y = loge.linear(x, c.weight, made, c.bias, A, B, c.scaling, dropout=0.5, exact_fraction=fraction)
        with cheap_backward():
            results.append(derive(y, leaves, c.dy))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.4, 3)])
def test_other_layers_are_not_affected(fraction: float, count: int) -> None:
    c = case()
    y, leaves = graph(c, exact_fraction=fraction)
    with cheap_backward():
        assert_same(derive(y, leaves, c.dy), gradients(c, exact_rows=heaviest(c.dy, count)))
    dense = case(R=None)
    y, leaves = graph(dense, exact_fraction=1.0)
    with cheap_backward():
        assert_same(derive(y, leaves, dense.dy), gradients(dense))


def test_the_block_nests_and_ends_with_an_error() -> None:
    assert not in_cheap_backward()
    with cheap_backward():
        with cheap_backward():
            assert in_cheap_backward()
        assert in_cheap_backward()
        with pytest.raises(KeyError), cheap_backward():
            raise KeyError
        assert in_cheap_backward()
    assert not in_cheap_backward()


def test_the_block_holds_in_the_threads_of_autograd() -> None:
    c = case()
    y, leaves = graph(c, exact_fraction=1.0)
    results: list[dict[str, Tensor]] = []
    with cheap_backward():
        thread = threading.Thread(target=lambda: results.append(derive(y, leaves, c.dy)))
        thread.start()
        thread.join()
    assert_same(results[0], gradients(c))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_checkpointing(reentrant: bool, dropout: float) -> None:
    c = case(M=12)

    def block(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return loge.linear(
            x, c.weight, c.factors(), c.bias, A, B, c.scaling, dropout=dropout, exact_fraction=1.0
        ).tanh()

    def leaves() -> list[Tensor]:
        return [getattr(c, name).clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]

    plain, again = leaves(), leaves()
    torch.manual_seed(1)
    y = block(*plain)
    torch.manual_seed(1)
    z = checkpoint(block, *again, use_reentrant=reentrant)

    def both(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        results = []
        for cheap in (True, False):
            for leaf in inputs:
                leaf.grad = None
            if cheap:
                with cheap_backward():
                    output.backward(c.dy, retain_graph=True)
            else:
                output.backward(c.dy)
            results += [leaf.grad for leaf in inputs]
        return results

    for expected, got in zip(both(y, plain), both(z, again), strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(*(g for g in both(block(*plain), plain)[::3]))


def test_a_cheap_pass_inside_an_exact_one() -> None:
    """As the bias correction does: at the output of a stack, the cheap gradients of all below, then the exact ones."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(LoGELinear.from_linear(nn.Linear(24, 24), 4, 4) for _ in range(3)))
    for layer in stack:
        nn.init.normal_(layer.lora_B, std=0.1)
    trained = [p for p in stack.parameters() if p.requires_grad]
    x, dy = torch.randn(6, 24), torch.randn(6, 24)
    found: list[tuple[Tensor, ...]] = []

    class Tap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            ctx.source = value
            return value.view_as(value)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            with cheap_backward():
                found.append(torch.autograd.grad(ctx.source, trained, gradient, retain_graph=True))
            return gradient

    def derive_stack(fraction: float) -> tuple[Tensor, ...]:
        for layer in stack:
            layer.exact_fraction = fraction
        return torch.autograd.grad(stack(x), trained, dy)

    cheap, exact = derive_stack(0.0), derive_stack(1.0)
    for layer in stack:
        layer.exact_fraction = 1.0
    got = torch.autograd.grad(Tap.apply(stack(x)), trained, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0], cheap, strict=True))
    assert not torch.allclose(cheap[0], exact[0])


def test_compiled() -> None:
    torch._dynamo.reset()
    c = case()

    def layer(x: Tensor) -> Tensor:
        return loge.linear(x.relu(), c.weight, c.factors(), c.bias, c.lora_A, c.lora_B, exact_fraction=1.0)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for cheap in (False, True):
        results = []
        for function in (layer, compiled):
            x = c.x.clone().requires_grad_()
            y = function(x)
            if cheap:
                with cheap_backward():
                    y.backward(c.dy)
            else:
                y.backward(c.dy)
            results.append(x.grad)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# What is computed


class Products:
    """Counts what the reference computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.chosen = 0
        matmul, heaviest_rows = reference.matmul, reference.heaviest_rows

        def count(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
            self.shapes.append((*a.shape, b.shape[1]))
            return matmul(a, b, *rest)

        def choose(*arguments: Any) -> Tensor:
            self.chosen += 1
            return heaviest_rows(*arguments)

        monkeypatch.setattr(reference, "matmul", count)
        monkeypatch.setattr(reference, "heaviest_rows", choose)


@pytest.mark.parametrize("P", [3, None])
def test_an_exact_step_is_the_dense_product_and_no_more(P: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(P=P)
    products = Products(monkeypatch)
    x = c.x.clone().requires_grad_()
    y = loge.linear(x, c.weight, c.factors().with_residual(c.weight, 3), None, c.lora_A, c.lora_B, exact_fraction=1.0)
    products.shapes.clear()
    y.backward(c.dy)
    assert products.chosen == 0
    assert sorted(products.shapes) == sorted([(7, 13, 11)] + ([(7, 13, 3)] if P else []))


def test_every_backend_takes_exact_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def refuse(problem: Any) -> str:
        return "low rank only" if problem.left is None or problem.exact_fraction > 0.0 else ""

    picky = replace(registry._REGISTRY["reference"], why_not=lambda p: refuse(p) or None, about="picky")
    monkeypatch.setattr(registry, "_REGISTRY", {"picky": picky, **registry._REGISTRY})
    c = case()
    y, leaves = graph(c, exact_fraction=1.0, backend="picky")
    assert_same(derive(y, leaves, c.dy), gradients(c, exact_rows=heaviest(c.dy, 7)))
    with cheap_backward():
        assert_same(derive(y, leaves, c.dy), gradients(c))
    y, leaves = graph(c, exact_fraction=0.5, backend="picky")
    with pytest.raises(ValueError, match="low rank only"):
        derive(y, leaves, c.dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rows_with_equal_norms_are_distinct(dtype: torch.dtype) -> None:
    """Ties do not make a row count twice: exactly ceil(fraction · M) rows are exact."""
    c = case(M=16, P=None).to(dtype)
    c.dy = torch.nn.functional.one_hot(torch.arange(16) % 13, 13).to(dtype)
    for fraction, count in ((0.25, 4), (0.3, 5), (0.99, 16)):
        x = c.x.clone().requires_grad_()
        loge.linear(x, c.weight, c.factors(), exact_fraction=fraction).backward(c.dy)
        exact = (x.grad - c.dy @ c.weight).abs().amax(1) < 1e-4
        assert exact.sum() == count


def test_exact_rows_read_nothing_on_the_host() -> None:
    """On the meta device any host read, and any shape that depends on data, raises."""
    c = case(M=10, dtype=torch.float32)
    made = c.factors().with_residual(c.weight, 3).to("meta")
    leaves = {n: getattr(c, n).to("meta").requires_grad_() for n in ("x", "lora_A", "lora_B")}
    x, A, B = leaves.values()
    for fraction in (0.0, 0.35, 1.0):
        y = loge.linear(x, c.weight.to("meta"), made, None, A, B, exact_fraction=fraction, backend="reference")
        for name, g in derive(y, leaves, c.dy.to("meta")).items():
            assert g.shape == leaves[name].shape
