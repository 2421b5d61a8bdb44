"""Exact rows (`exact_fraction`): which they are, what they cost, and that all of them are an exact layer."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
from surrogate import assert_same, call, case, gradients, heaviest, leaves_of, run
from torch import Tensor

from loge_kernels.backend import reference

registry = import_module("loge_kernels.backend.choice")
WANTED = ("x", "lora_A", "lora_B")


@pytest.mark.parametrize("P", [3, None])
def test_all_rows_are_an_exact_layer(P: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is chosen, and nothing multiplied but by the weight and the adapter."""
    c = case(P=P)
    products, sums = Mock(side_effect=reference.matmul), Mock(side_effect=reference.add_matmul)
    monkeypatch.setattr(reference, "matmul", products)
    monkeypatch.setattr(reference, "add_matmul", sums)
    monkeypatch.setattr(reference, "heaviest_rows", None)
    made = c.factors().with_residual(c.weight, 3)
    made.low_rank_dtype = "int8"  # refuses float64, where it is asked
    leaves = leaves_of(c, ("x",))
    y = call(c, leaves, factors=made, exact_fraction=1.0)
    products.reset_mock()
    sums.reset_mock()
    y.backward(c.dy)
    taken = [call.args[-2:] for mock in (products, sums) for call in mock.call_args_list]
    shapes = sorted((*a.shape, b.shape[1]) for a, b in taken)
    assert shapes == ([(7, 3, 11), (7, 13, 3), (7, 13, 11)] if P else [(7, 13, 11)])
    assert_same({"x": leaves["x"].grad}, gradients(replace(c, left=None, right=None)))


def test_a_backend_without_exact_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so; the dense product of no factors, or of all rows, is PyTorch's whatever backend is named."""
    picky = replace(
        registry._REGISTRY["reference"],
        why_not=lambda p: "low rank only" if p.left is None or p.exact_fraction > 0.0 else None,
        about="picky",
    )
    monkeypatch.setattr(registry, "_REGISTRY", {"picky": picky, **registry._REGISTRY})
    c = case()
    assert_same(run(c, WANTED, backend="picky"), gradients(c))
    exact = gradients(c, exact_rows=heaviest(c.dy, 7))
    assert_same(run(c, WANTED, backend="picky", exact_fraction=1.0), exact)
    assert_same(run(c, WANTED, backend="picky", factors=None), exact)
    with pytest.raises(ValueError, match="low rank only"):
        run(c, WANTED, backend="picky", exact_fraction=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_equal_norms_are_distinct(dtype: torch.dtype) -> None:
    """Ties do not make a row count twice: exactly ceil(fraction · M) rows are exact."""
    c = case(M=16, P=None).to(dtype)
    c.dy = torch.nn.functional.one_hot(torch.arange(16) % 13, 13).to(dtype)
    for fraction, count in ((0.25, 4), (0.3, 5), (0.99, 16)):
        dx = run(c, ("x",), exact_fraction=fraction)["x"]
        assert ((dx - c.dy @ c.weight).abs().amax(1) < 1e-4).sum() == count


def test_nothing_is_read_on_the_host() -> None:
    """On the meta device any host read, and any shape that depends on data, raises."""
    c = case(M=10, dtype=torch.float32)
    made = c.factors().with_residual(c.weight, 3)
    made.apply_(lambda tensor: tensor.to("meta"))
    c = replace(c, **{name: t.to("meta") for name, t in vars(c).items() if isinstance(t, Tensor)})
    for fraction in (0.0, 0.35, 1.0):
        for name, g in run(c, WANTED, factors=made, exact_fraction=fraction, backend="reference").items():
            assert g.shape == (c.dy if name == "y" else getattr(c, name)).shape
