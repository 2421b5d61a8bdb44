"""Quantised linear layers: the library's forward to the bit, a backward that never sees the weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from quantized_layers import (
    BITSANDBYTES,
    KINDS,
    K,
    N,
    derive,
    draw,
    give_full_rank,
    pair,
    quantised,
    weights_out_of_reach,
)
from surrogate import assert_within_twice
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import LoGELinear

WHOLE = [kind for kind in KINDS if "bfloat16" not in kind]  # their products are in float32
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def product_error(kind: str) -> float:
    return 2e-2 if "bfloat16" in kind else 1e-5


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


# Forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 5, K), (1, K), (0, K), (K,)], ids=str)
def test_the_forward_is_the_librarys_to_the_bit(kind: str, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(kind)
    x = draw(*shape).requires_grad_()
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        try:
            expected = theirs(x)
        except (RuntimeError, IndexError, ValueError) as error:
            with pytest.raises(type(error)):
                ours(x)
            continue
        got = ours(x)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert got.requires_grad
        with torch.no_grad():
            again = ours(x.detach())
            # bitsandbytes 0.50 ends the process here when there are no rows.
            assert torch.equal(again, theirs(x.detach()) if x.numel() else expected)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_activations(kind: str) -> None:
    ours, theirs = pair(kind)
    x, dy = draw(K, 10).t(), draw(N, 20).t()[::2]
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(derive(ours, x, dy), derive(ours, x.contiguous(), dy.contiguous()))


def test_inference_repacks_the_weight_and_the_backward_goes_on() -> None:
    """On a CPU with AVX-512 bitsandbytes lays the weight out anew in the first inference, and has no backward then."""
    ours, theirs = pair("nf4")
    x, dy = draw(6, K), draw(6, N)
    before = derive(ours, x, dy)
    weight = ours.dense_weight()
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(derive(ours.train(), x, dy), before)
    assert_near(ours.dense_weight(), weight, 1e-2)
    late = nn.Sequential(theirs.train())
    loge.apply(late, 0.25)
    assert_near(derive(late[0], x, dy), before, 2e-2)


# Backward


@pytest.mark.parametrize("kind", KINDS)
def test_dx_goes_through_the_factors(kind: str) -> None:
    ours, _ = pair(kind)
    x, dy = draw(2, 7, K), draw(2, 7, N)
    left, right = ours.factors.left, ours.factors.right
    dtype = ours.product_dtype(x)
    truth = dy.double() @ left.to(dtype).double() @ right.to(dtype).double()
    plain = (dy.to(dtype) @ left.to(dtype) @ right.to(dtype)).to(x.dtype)
    assert_within_twice(derive(ours, x, dy), plain, truth)
    assert 0 < ours.factors.rank < 100
    assert not torch.allclose(truth.float(), (dy @ ours.dense_weight().float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_factors_give_the_librarys_gradient(kind: str) -> None:
    ours, theirs = pair(kind, 1.0)
    x, dy = draw(12, K), draw(12, N)
    assert ours.factors is None, "dense is cheaper at full rank"
    assert_near(derive(ours, x, dy), derive(theirs, x, dy), product_error(kind))
    give_full_rank(ours)
    # The factors of int8 are kept in float16.
    assert_near(derive(ours, x, dy), derive(theirs, x, dy), 1e-3 if kind == "int8" else product_error(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_never_sees_the_weight(kind: str) -> None:
    ours, theirs = pair(kind)
    x, dy = draw(6, K), draw(6, N)
    expected = derive(ours, x, dy)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(leaf), theirs(other)
    with weights_out_of_reach(ours):
        y.backward(dy)
    assert torch.equal(leaf.grad, expected)
    if kind in BITSANDBYTES:  # torchao's own backward keeps what its forward dequantised
        with weights_out_of_reach(theirs), pytest.raises(Exception, match=r"dequantised|CB matrix"):
            z.backward(dy)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_the_backward(kind: str) -> None:
    ours, _ = pair(kind)
    factors = {ours.factors.left.data_ptr(), ours.factors.right.data_ptr()}

    def kept(call: Callable[..., Tensor], *arguments: Any) -> list[tuple[int, ...]]:
        """The shapes of what is kept beside the factors."""
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            call(draw(50, K).requires_grad_(), *arguments)
        assert factors <= {t.data_ptr() for t in found}
        return sorted(tuple(t.shape) for t in found if t.data_ptr() not in factors)

    A, B = (draw(*shape).requires_grad_() for shape in ((4, K), (N, 4)))
    assert kept(ours) == []
    assert kept(ours.run, A, B, 2.0, 0.0) == sorted([(4, K), (N, 4), (50, K), (50, 4)])
    # No activations for an adapter that is not trained.
    assert kept(ours.run, A.detach(), B.detach(), 2.0, 0.0) == sorted([(4, K), (N, 4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_an_adapter(kind: str, dropout: float) -> None:
    """Against a plain LoGELinear op over the dequantised weight."""
    ours, _ = pair(kind)
    x, dy, A, B = draw(2, 7, K), draw(2, 7, N), draw(4, K), draw(N, 4)
    dtype = ours.product_dtype(x)
    weight, bias = ours.dequantize(ours, dtype), ours.bias.to(dtype)
    made = loge.Factors(ours.factors.left.to(dtype), ours.factors.right.to(dtype))

    def plain(*leaves: Tensor) -> Tensor:
        x, A, B = (leaf.to(dtype) for leaf in leaves)
        return loge.linear(x, weight, made, bias=bias, lora_A=A, lora_B=B, scaling=0.7, dropout=dropout).to(dy.dtype)

    results = []
    for call in (lambda *leaves: ours.run(*leaves, 0.7, dropout), plain):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        torch.manual_seed(2)
        y = call(*leaves)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, product_error(kind) if kind != "torchao int8" else 1e-4)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_trained_bias(kind: str) -> None:
    ours, _ = pair(kind)
    ours.bias.requires_grad_()
    dy = draw(2, 7, N)
    ours(draw(2, 7, K)).backward(dy)
    torch.testing.assert_close(ours.bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    ours, _ = pair(kind)
    A, B = (draw(*shape).requires_grad_() for shape in ((4, K), (N, 4)))
    x = torch.empty(2, 0, K, requires_grad=True)
    ours.run(x, A, B, 1.0, 0.0).sum().backward()
    assert x.grad.shape == (2, 0, K)
    assert not A.grad.any()
    assert not B.grad.any()


def test_no_second_derivative() -> None:
    ours, _ = pair("nf4")
    x = draw(3, K).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


# Dtypes


@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_under_autocast(kind: str, cast: torch.dtype) -> None:
    ours, theirs = pair(kind)
    give_full_rank(ours)
    x = draw(9, K)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", cast, enabled=cast != torch.float32):
        y, z = ours(leaf), theirs(other)
        assert torch.equal(y, z)
        assert y.dtype == z.dtype
        dy = draw(9, N).to(y.dtype)
        y.backward(dy)
    z.backward(dy)
    assert_near(leaf.grad, other.grad, 2e-2)


@pytest.mark.parametrize("kind", ["nf4", "nf4 in bfloat16", "int8"])
def test_bfloat16_activations(kind: str) -> None:
    ours, theirs = pair(kind)
    give_full_rank(ours)
    x, dy = draw(9, K, dtype=torch.bfloat16), draw(9, N, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x))
    assert_near(derive(ours, x, dy), derive(theirs, x, dy), 2e-2)


def test_products_run_in_the_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("nf4 in bfloat16")
    reference = import_module("loge_kernels.backend.reference")
    seen = []
    matmul = reference.matmul
    monkeypatch.setattr(reference, "matmul", lambda a, *rest: seen.append(a.dtype) or matmul(a, *rest))
    assert derive(ours, draw(3, K), draw(3, N)).dtype == torch.float32
    assert seen == [torch.bfloat16] * 2
    assert ours.factors.left.dtype == torch.bfloat16


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_exact_rows(kind: str) -> None:
    ours, theirs = pair(kind, exact_fraction=1.0)
    x, dy = draw(8, K), draw(8, N) * torch.linspace(0.1, 3.0, 8)[:, None]
    exact = derive(theirs, x, dy)
    assert_near(derive(ours, x, dy), exact, product_error(kind))
    ours.exact_fraction = 0.25
    got = derive(ours, x, dy)
    assert_near(got[6:], exact[6:], product_error(kind))
    ours.exact_fraction = 0.0
    assert_near(got[:6], derive(ours, x, dy)[:6], product_error(kind))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("exact_dtype", "most"), [("int8", 0.06), ("float8", 0.06), ("nvfp4", 0.3), ("mxfp4", 0.35)])
def test_exact_products_in_fewer_bits(kind: str, exact_dtype: str, most: float) -> None:
    ours, theirs = pair(kind, exact_fraction=1.0, exact_dtype=exact_dtype)
    x, dy = draw(6, K), draw(6, N)
    exact, got = derive(theirs, x, dy), derive(ours, x, dy)
    error = (got - exact).norm() / exact.norm()
    assert 1e-3 < error < most
    assert ours.eight_bit.tensor is None, "a second copy of the weight would undo the quantisation"


def test_8_bits_that_cannot_run_are_announced(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    ours, theirs = pair("nf4", exact_fraction=1.0, exact_dtype="int8")
    monkeypatch.setattr(import_module("loge_kernels.layers.quantized"), "why_not", lambda *_: "a test says so")
    x, dy = draw(6, K), draw(6, N)
    assert_near(derive(ours, x, dy), derive(theirs, x, dy), 1e-5)
    assert "a test says so" in caplog.text


@pytest.mark.parametrize("kind", WHOLE)
def test_residual(kind: str) -> None:
    x, dy = draw(6, K), draw(6, N)
    ours, _ = pair(kind, 16, residual=0.25)
    f = ours.factors
    stand_in = f.left.float() @ f.right.float()
    stand_in[f.rows] += f.residual.float()
    tolerance = 1e-3 if kind == "int8" else 1e-5
    assert_near(derive(ours, x, dy), dy @ stand_in, tolerance)
    assert_near(stand_in[f.rows], ours.dense_weight().float()[f.rows], tolerance)


# Life of a converted layer


@pytest.mark.parametrize("kind", KINDS)
def test_remove(kind: str) -> None:
    model, other = nn.Sequential(quantised(kind)), nn.Sequential(quantised(kind))
    layer, before = model[0], dict(vars(model[0]))
    loge.apply(model, 0.25)
    loge.remove(model)
    assert model[0] is layer
    assert type(layer) is type(other[0])
    assert vars(layer).keys() == before.keys() == vars(other[0]).keys()
    x, dy = draw(3, K), draw(3, N)
    assert torch.equal(derive(layer, x, dy), derive(other[0], x, dy))


def test_remove_gives_a_subclass_back() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.LinearNF4(K, N)).to("cpu")
    loge.apply(model, 0.25)
    loge.remove(model)
    assert type(model[0]) is bnb.nn.LinearNF4


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_copies_and_pickles(kind: str) -> None:
    ours, theirs = pair(kind)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    x, dy = draw(3, K), draw(3, N)
    expected = derive(ours, x, dy)
    twins = [copy.deepcopy(ours)]
    if kind in BITSANDBYTES:  # torchao's layers cannot be pickled
        twins.append(pickle.loads(pickle.dumps(ours)))
    for twin in twins:
        assert type(twin) is type(ours)
        assert torch.equal(derive(twin, x, dy), expected)
        twin.revert_()
        assert type(twin) is type(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_computed_once_and_follow_another_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(kind)
    linear = import_module("loge_kernels.layers.linear")
    made = []
    cached = linear.cached_factors
    monkeypatch.setattr(linear, "cached_factors", lambda *a: made.append(a[0].clone()) or cached(*a))
    x, dy = draw(3, K), draw(3, N)
    for training in (True, False, True):
        derive(ours.train(training), x, dy)
    assert not made
    first, before = ours.dense_weight(), derive(ours, x, dy)
    ours.weight = quantised(kind).weight
    if kind == "int8":
        ours.state.reset_grads()  # as PEFT does when it merges
    assert torch.equal(derive(ours, x, dy), before)
    assert len(made) == 1, "another parameter, if the same numbers"
    assert torch.equal(made[0], first)
    ours.invalidate()
    derive(ours, x, dy)
    derive(ours, x, dy)
    assert len(made) == 2


def test_the_residual_is_chosen_anew() -> None:
    ours, _ = pair("nf4", 16, residual=0.25)
    rows = ours.factors.rows.clone()
    values = ours.factors.residual.clone()
    ours.factors.residual.zero_()
    ours.refresh()
    assert torch.equal(ours.factors.rows, rows)
    assert torch.equal(ours.factors.residual, values)
    assert not ours.factors.made_of.changed(ours.weight)


def test_compiled() -> None:
    torch._dynamo.reset()
    ours, _ = pair("nf4")
    x, dy = draw(3, K), draw(3, N)
    expected = derive(ours, x, dy)
    assert torch.equal(derive(torch.compile(ours, backend="aot_eager"), x, dy), expected)


# What apply says


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("nf4", "NF4 base"),
        ("fp4", "FP4 base"),
        ("int8", "int8 base"),
        ("torchao int8", "torchao Int8Tensor base"),
        ("torchao float8", "torchao Float8Tensor base"),
        ("torchao int4", "torchao IntxUnpackedToInt8Tensor base"),
    ],
)
def test_rows_of_the_report(kind: str, label: str) -> None:
    (row,) = loge.apply(nn.Sequential(quantised(kind)), 0.25).layers
    assert (row.shape, row.path, row.reason) == ((N, K), "plain", label)
    assert row.flops_saved == pytest.approx(1 - row.rank * (N + K) / (N * K))
    dtype = "float16" if kind == "int8" else "float32"
    exact = [loge.apply(nn.Sequential(quantised(kind)), rank).layers[0] for rank in (None, 1.0)]
    assert {(row.path, row.dx, row.rank, row.flops_saved) for row in exact} == {("plain", dtype, None, 0.0)}
    assert exact[0].reason == f"{label}; dequantised in backward, and rounding it to 8 bits would be another pass"
    assert exact[1].reason.startswith(f"{label}; dense is cheaper")


def test_a_weight_that_is_not_finite() -> None:
    layer = quantised("nf4")
    layer.weight.quant_state.absmax.fill_(0)
    layer.weight.quant_state.offset.fill_(float("nan"))
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match="NaN or inf"):
        loge.apply(model, 0.25)
    assert not isinstance(layer, LoGELinear)
