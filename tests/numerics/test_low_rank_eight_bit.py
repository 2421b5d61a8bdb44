"""The low-rank product in 8 bits: rounded as the formula says, only where the frozen path is low-rank, counted half."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import gradients, lora
from quantized_layers import K, N, quantised
from test_eight_bit import FLOATS, NAMED, adapter_part, in_float32, rounded_rows, run
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import Factors, LoGELinear
from loge_kernels.check.accuracy import judge
from loge_kernels.numerics import eight_bit


def rounded_chain(dy: Tensor, left: Tensor, right: Tensor, name: str, inside: torch.dtype = torch.float64) -> Tensor:
    """dY left right in `inside`, every operand rounded to 8 bits, T to dY's dtype before that."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return rounded_rows(a, name).to(inside) @ rounded_rows(b.t(), name).t().to(inside)

    return product(product(dy, left).to(dy.dtype), right)


class InEightBits:
    """A case whose factors are taken in 8 bits."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **shape: Any) -> None:
        self.case = in_float32(dtype, **shape)
        self.name = name

    def run(self, **options: Any) -> dict[str, Tensor]:
        return run(self.case, **{"factors": self.factors(), **options})

    def factors(self) -> Factors:
        made = self.case.factors()
        made.low_rank_dtype = self.name
        return made

    def truth(self, inside: torch.dtype = torch.float64) -> Tensor:
        return rounded_chain(self.case.dy, self.case.left, self.case.right, self.name, inside)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("shape", [{}, {"P": None}, {"R": 1}])
def test_both_products_round_as_the_formula(name: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    eight = InEightBits(name, dtype, **shape)
    got, plain = eight.run(), run(eight.case)
    more = adapter_part(eight.case)
    yardstick = eight.truth(torch.float32) + more.float()
    assert judge(got["x"], yardstick.to(dtype), eight.truth() + more).passed
    assert not torch.equal(got["x"], plain["x"])
    for other in set(got) - {"x"}:  # the adapter's own path is not touched
        torch.testing.assert_close(got[other], plain[other])


@pytest.mark.parametrize("name", NAMED)
def test_exact_rows_and_residual_rows_stay_exact(name: str) -> None:
    eight = InEightBits(name)
    c = eight.case
    assert torch.equal(eight.run(exact_fraction=1.0)["x"], run(c, exact_fraction=1.0)["x"])
    low, exact, some = eight.run()["x"], run(c, exact_fraction=1.0)["x"], eight.run(exact_fraction=0.3)["x"]
    heavy = c.dy.norm(dim=1) >= c.dy.norm(dim=1).sort(descending=True).values[2]
    torch.testing.assert_close(some, torch.where(heavy[:, None], exact, low))
    with_rows = eight.factors().with_residual(c.weight, 5)
    assert with_rows.low_rank_dtype == name
    got = run(c, factors=with_rows)["x"]
    torch.testing.assert_close(got, low + c.dy[:, with_rows.rows] @ with_rows.residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_dropout_is_the_adapters(name: str) -> None:
    eight = InEightBits(name)
    results = []
    for B in (eight.case.lora_B, torch.zeros_like(eight.case.lora_B)):  # type: ignore[arg-type]
        torch.manual_seed(4)
        eight.case = replace(eight.case, lora_B=B)
        results.append(eight.run(dropout=0.5)["x"])
    masked = ((results[0] - results[1]).abs() < 1e-6).float().mean()
    assert 0.3 < masked < 0.7
    torch.testing.assert_close(results[1].double(), eight.truth(), rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    eight = InEightBits("int8", P=None)
    x = eight.case.x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = loge.linear(x, eight.case.weight, eight.factors())
    y.backward(eight.case.dy.bfloat16())
    c = eight.case
    truth = rounded_chain(c.dy.bfloat16(), c.left, c.right, "int8")  # type: ignore[arg-type]
    torch.testing.assert_close(x.grad.double(), truth, rtol=1e-2, atol=1e-3)  # type: ignore[union-attr]


# Copies


def follows(layer: LoGELinear) -> None:
    """Whether dX comes from the factors as they are."""
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 20)
    (got,) = torch.autograd.grad(layer(x), x, dy)
    factors = layer.factors
    torch.testing.assert_close(
        got.double(), rounded_chain(dy, factors.left, factors.right, "int8"), rtol=1e-5, atol=1e-5
    )


def layer() -> LoGELinear:
    made = LoGELinear.from_linear(nn.Linear(24, 20), rank=8, lora_rank=0)
    made.factors.low_rank_dtype = "int8"
    return made


def test_copies_are_made_once_and_follow_the_factors() -> None:
    one = layer()
    factors = one.factors
    follows(one)
    held = factors.left_copy.tensor
    follows(one)
    assert factors.left_copy.tensor is held
    one.load_state_dict({"weight": torch.randn(20, 24), "bias": torch.randn(20)})
    follows(one)
    assert factors.left_copy.tensor is not held
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin.factors.low_rank_dtype == "int8"
        assert twin.factors.left_copy.tensor is None
        follows(twin)
    assert set(one.state_dict()) == {"weight", "bias"}
    factors.low_rank_dtype = None
    assert factors.left_copy is factors.right_copy is None


def test_nothing_is_quantised_that_nobody_reads() -> None:
    eight = InEightBits("int8", P=None)
    made = eight.factors()
    loge.linear(eight.case.x, eight.case.weight, made)
    with torch.no_grad():
        loge.linear(eight.case.x.clone().requires_grad_(), eight.case.weight, made)
    assert made.left_copy.tensor is None


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="low_rank_dtype='fp8' is unknown; choose one of 'float8', 'int8'"):
        InEightBits("fp8").factors()


def test_float64_is_refused() -> None:
    made = Factors(torch.ones(4, 2).double(), torch.ones(2, 4).double())
    made.low_rank_dtype = "int8"
    with pytest.raises(TypeError, match=r"low_rank_dtype='int8' with x in torch\.float64"):
        loge.linear(torch.ones(1, 4).double(), torch.ones(4, 4).double(), made)


@pytest.mark.parametrize(
    ("module", "argument", "reason"),
    [("op.linear", "exact_dtype", "no such type"), ("factors.factors", "low_rank_dtype", "of left, no such type")],
)
def test_where_it_cannot_run_the_other_product_does_and_says_so_once(
    module: str, argument: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"loge_kernels.{module}.why_not", lambda *arguments: "no such type")
    monkeypatch.setattr(eight_bit, "_announced", set())
    c = in_float32(torch.bfloat16, R=None if argument == "exact_dtype" else 5)
    made = c.factors()
    if made is not None:
        made.low_rank_dtype = "int8"
    options = {"factors": made} if made is not None else {"exact_dtype": "int8"}
    for _ in range(2):
        assert torch.equal(run(c, **options)["x"], run(c)["x"])
    # A choice of backend may be told too, once a process.
    (record,) = [r for r in caplog.records if r.name == "loge_kernels" and r.levelname == "WARNING"]
    products = argument.removesuffix("_dtype").replace("_", "-")
    assert record.getMessage() == (
        f"{argument}='int8' cannot run here: {reason}; the {products} products run in torch.bfloat16"
    )


# In a model


@pytest.mark.parametrize("name", NAMED)
def test_a_model(name: str) -> None:
    plain, model = lora(), lora()
    whole, report = loge.apply(plain, 16), loge.apply(model, 16, low_rank_dtype=name)
    assert {row.dx for row in report.converted if row.rank} == {f"rank 16 in {name}"}
    assert report.flops_saved == whole.flops_saved > 0, "8 bits save time, and no flops"
    found = []
    for each in (plain, model):
        found.append(torch.cat([g.flatten() for g in gradients(each).values()]))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 1e-4 < error < 0.2


def test_over_a_quantised_base() -> None:
    model = nn.Sequential(quantised("nf4"))
    loge.apply(model, 0.5, low_rank_dtype="int8")
    one: Any = model[0]
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, N)
    (got,) = torch.autograd.grad(one(x), x, dy)
    f = one.factors
    inside = one.product_dtype(x)
    truth = rounded_chain(dy.to(inside), f.left, f.right, "int8")
    torch.testing.assert_close(got.double(), truth, rtol=1e-2, atol=1e-2)
