"""`loge_kernels.linear`: gradients, what is saved, compilation, errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from surrogate import (
    NAMES,
    Case,
    assert_same,
    assert_within_twice,
    call,
    case,
    drawn_mask,
    gradients,
    heaviest,
    leaves_of,
    run,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import loge_kernels as loge
from loge_kernels.backend import reference
from loge_kernels.numerics import matmul

# Gradients


@pytest.mark.parametrize("adapter", [True, False])
def test_gradcheck_exact(adapter: bool) -> None:
    c = case(M=4, N=6, K=5, R=None, P=2 if adapter else None)
    leaves = leaves_of(c)
    assert torch.autograd.gradcheck(lambda *given: call(c, dict(zip(leaves, given, strict=True))), [*leaves.values()])


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"N": 5, "K": 31},
        {"M": 1, "bias": False},
        {"M": 0},
        {"R": 2, "P": 9},
        {"R": None},
        {"P": None, "R": 1},
        {"P": None, "R": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_the_surrogate(shape: dict[str, Any], dropout: float) -> None:
    c = case(**shape)
    scale = drawn_mask(c, dropout)
    got = run(c, dropout=dropout)
    assert set(got) == {"y", *(n for n in NAMES if getattr(c, n) is not None)}
    assert_same(got, gradients(c, scale))


@pytest.mark.parametrize("R", [5, None])
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)))
def test_each_subset_of_gradients(wanted: tuple[bool, ...], R: int | None) -> None:
    c = case(R=R)
    need = tuple(n for n, want in zip(NAMES, wanted, strict=True) if want)
    scale = drawn_mask(c, 0.3)
    got = run(c, need, dropout=0.3)
    assert set(got) == {"y", *need}
    assert_same(got, gradients(c, scale))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("fraction", "rows"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.5, 4), (1.0, 7)])
@pytest.mark.parametrize("P", [3, None])
def test_exact_fraction(fraction: float, rows: int, dropout: float, P: int | None) -> None:
    c = case(P=P)
    expected = gradients(c, drawn_mask(c, dropout), heaviest(c.dy, rows))
    assert_same(run(c, dropout=dropout, exact_fraction=fraction), expected)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 1, 3), (2, 0, 3)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    rows = int(torch.tensor(lead).prod()) if lead else 1
    c = case(M=rows)
    x = c.x.view(*lead, c.x.shape[1]).requires_grad_()
    y = call(c, leaves_of(c, ()), x=x)
    assert y.shape == (*lead, c.weight.shape[0])
    y.backward(c.dy.view(y.shape))
    expected = gradients(c)
    assert_same({"y": y.detach().reshape(rows, 13), "x": x.grad.reshape(rows, 11)}, expected)


def test_strides() -> None:
    c = case(M=12)
    expected = gradients(c)
    c.weight, c.left, c.lora_A = (t.t().contiguous().t() for t in (c.weight, c.left, c.lora_A))
    wide = torch.zeros(4, 3, 22, dtype=torch.float64)
    wide[..., ::2] = c.x.view(4, 3, 11)
    permuted = c.x.view(4, 3, 11).transpose(0, 1).contiguous().transpose(0, 1)  # no view of two dimensions
    for x, rows in ((wide[..., ::2], (4, 3)), (permuted, (4, 3)), (c.x.t().contiguous().t(), (12,))):
        x = x.detach().requires_grad_()
        y = call(c, leaves_of(c, ()), x=x)
        y.backward(c.dy.t().contiguous().t().view(*rows, 13) if rows == (12,) else c.dy.view(*rows, 13))
        assert_same({"x": x.grad.reshape(12, 11)}, expected)
    x = c.x.clone().requires_grad_()
    call(c, leaves_of(c, ()), x=x).sum().backward()  # an expanded dY
    c.dy = torch.ones_like(c.dy)
    assert_same({"x": x.grad}, gradients(c))


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_low_precision_within_twice_plain_pytorch(dtype: torch.dtype, dropout: float) -> None:
    narrow = case(M=33, N=48, K=40, R=16, P=8).to(dtype)
    wide = narrow.to(torch.float64)
    scale = drawn_mask(wide, dropout)
    got = run(narrow, dropout=dropout)
    plain = gradients(narrow, None if scale is None else scale.to(dtype))
    for name, truth in gradients(wide, scale).items():
        assert got[name].dtype == dtype
        assert_within_twice(got[name], plain[name], truth, name)


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapter_over_a_16_bit_base(dtype: torch.dtype) -> None:
    c = case(M=33, N=48, K=40, R=16, P=8).to(dtype)
    truth, plain = gradients(c.to(torch.float64)), gradients(c)
    c.lora_A, c.lora_B = c.lora_A.float(), c.lora_B.float()
    got = run(c)
    for name in truth:
        assert got[name].dtype == (torch.float32 if "lora" in name else dtype)
        assert_within_twice(got[name], plain[name], truth[name], name)


def test_double_backward_raises() -> None:
    c = case(R=None)
    leaves = leaves_of(c, ("x", "lora_A"))
    for loss in (Tensor.sum, lambda y: y.square().sum()):  # dY that does not, and that does, depend on x

        def second(loss: Callable[[Tensor], Tensor] = loss) -> None:
            (dA,) = torch.autograd.grad(loss(call(c, leaves)), leaves["lora_A"], create_graph=True)
            dA.sum().backward()

        with pytest.raises(RuntimeError, match="create_graph"):
            second()


# Autocast


@pytest.mark.usefixtures("either_processor")
def test_autocast_casts_like_torchs_own() -> None:
    c = case(M=33, N=48, K=40, R=16, P=8, dtype=torch.float32)
    half = c.to(torch.bfloat16)
    half.lora_A, half.lora_B = c.lora_A, c.lora_B  # adapters stay in float32
    expected = run(half)
    leaves = leaves_of(c)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(c, leaves)
        assert y.dtype == torch.bfloat16
        y.backward(half.dy)  # inside the block, as many training loops do
    assert torch.equal(y, expected["y"])
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[name].float()), name


def test_products_run_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is computed in float32 on purpose must not be cast down again, nor take the slow 16-bit path of a CPU.
    inside: list[bool] = []

    def spy(*arguments: Any) -> Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return matmul.matmul(*arguments)

    monkeypatch.setattr(reference, "matmul", spy)
    with torch.autocast("cpu", torch.bfloat16):
        run(case(dtype=torch.float32))
    assert len(inside) > 4
    assert not any(inside)


def test_autocast_leaves_float64_alone() -> None:
    c = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(c), gradients(c))


# What is kept for backward


def kept(c: Case, need: tuple[str, ...], **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The tensors that autograd keeps for the op, and the leaves."""
    leaves = leaves_of(c, need)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = call(c, leaves, **options)
    y.backward(c.dy)
    return saved, leaves


ADAPTER = ("x", "lora_A", "lora_B")


@pytest.mark.parametrize(
    ("shape", "need", "options", "x_kept", "weight_kept"),
    [
        ({}, ADAPTER, {}, True, False),
        ({}, ADAPTER, {"dropout": 0.5}, True, False),
        ({}, ("x",), {}, False, False),
        ({}, ("x", "lora_B"), {}, False, False),
        ({"P": None}, ("x",), {}, False, False),
        ({"P": None}, ("x", "weight"), {}, True, False),
        ({}, ("lora_A", "lora_B"), {"exact_fraction": 0.5}, True, False),
        ({}, ADAPTER, {"exact_fraction": 0.5}, True, True),
        ({}, ADAPTER, {"exact_fraction": 1.0}, True, True),
        ({"R": None}, ADAPTER, {}, True, True),
        ({"R": None}, ("lora_A", "lora_B"), {}, True, False),
    ],
)
def test_kept_for_backward(
    shape: dict[str, Any], need: tuple[str, ...], options: dict[str, Any], x_kept: bool, weight_kept: bool
) -> None:
    c = case(**shape)
    saved, leaves = kept(c, need, **options)
    kept_pointers = {t.data_ptr() for t in saved}
    assert (leaves["x"].data_ptr() in kept_pointers) == x_kept
    assert (leaves["weight"].data_ptr() in kept_pointers) == weight_kept
    small = [c.left, c.right, c.lora_A, c.lora_B, c.x, c.weight]
    known = {t.data_ptr() for t in small if t is not None}
    rest = [t for t in saved if t.data_ptr() not in known and t.numel() > 2]  # two numbers: the seed
    assert [tuple(t.shape) for t in rest] == ([(7, 3)] if "lora_B" in need else []), "xa and nothing else"
    for leaf in leaves.values():
        assert leaf.grad is None or leaf.grad.untyped_storage().data_ptr() not in {
            t.untyped_storage().data_ptr() for t in saved
        }


@pytest.mark.parametrize("more", ["", "residual", "int8"])
def test_backward_does_not_read_the_weight(more: str) -> None:
    c = case(dtype=torch.float32)
    made = c.factors().with_residual(c.weight, 5) if more == "residual" else c.factors()
    made.low_rank_dtype = more if more == "int8" else None
    expected = run(c, ADAPTER, factors=made)
    leaves = leaves_of(c, ADAPTER)
    y = call(c, leaves, factors=made)
    c.weight.data.fill_(float("nan"))
    y.backward(c.dy)
    assert_same({n: leaves[n].grad for n in ADAPTER}, expected, 0.0)


def test_a_changed_input_is_noticed() -> None:
    c = case()
    y = call(c, leaves_of(c, ("lora_A",)))
    c.x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(c.dy)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(reentrant: bool, fraction: float) -> None:
    c = case(M=40, K=30)

    def layer(*given: Tensor) -> Tensor:
        return call(c, dict(zip(NAMES, given, strict=True)), dropout=0.5, exact_fraction=fraction)

    plain, again = leaves_of(c, ADAPTER), leaves_of(c, ADAPTER)
    torch.manual_seed(3)
    y = layer(*plain.values())
    y.backward(c.dy)
    torch.manual_seed(3)
    z = checkpoint(layer, *again.values(), use_reentrant=reentrant)
    torch.rand(7)  # the recomputation must not depend on what was drawn since
    z.backward(c.dy)
    assert torch.equal(y, z)
    for name in ADAPTER:
        assert torch.equal(plain[name].grad, again[name].grad), name


# Staleness


@pytest.mark.parametrize("autocast", [False, True])
def test_says_once_that_the_weight_has_changed(autocast: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(20, 18))
    x = torch.randn(3, 18, requires_grad=True)
    made = loge.factorize(weight, 16)

    def said() -> list[str]:
        with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            warnings.simplefilter("always")
            loge.linear(x, weight, made)
        return [str(w.message) for w in caught]

    assert said() == []
    with torch.no_grad():
        weight.mul_(2.0)
    (message,) = said()
    assert "weight has changed" in message
    assert "refresh" in message
    assert said() == []
    made.refresh(weight)
    assert said() == []
    with torch.no_grad():
        weight.mul_(2.0)
    assert len(said()) == 1


# Errors

GOOD = {
    "x": torch.zeros(2, 6),
    "weight": torch.zeros(5, 6),
    "factors": loge.Factors(torch.zeros(5, 3), torch.zeros(3, 6)),
    "bias": torch.zeros(5),
    "lora_A": torch.zeros(2, 6),
    "lora_B": torch.zeros(5, 2),
}
IN_FLOAT64: dict[str, Any] = {
    **dict.fromkeys(GOOD),
    "x": torch.zeros(2, 6).double(),
    "weight": torch.zeros(5, 6).double(),
}
BAD: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"x": torch.zeros(2, 7)}, ValueError, ["x has shape (2, 7)", "K = 6"]),
    ({"x": torch.zeros(())}, ValueError, ["x has shape ()", "K = 6"]),
    ({"x": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, ["x has dtype torch.int64", "float32"]),
    ({"x": torch.zeros(2, 6, dtype=torch.complex64)}, TypeError, ["x has dtype torch.complex64", "bfloat16"]),
    ({"x": torch.zeros(2, 6, device="meta")}, ValueError, ["weight is on cpu", "meta"]),
    ({"weight": torch.zeros(5)}, ValueError, ["weight has shape (5,)", "[N, K]"]),
    ({"weight": torch.zeros(5, 6).half()}, TypeError, ["weight has dtype torch.float16", "expected torch.float32"]),
    ({"bias": torch.zeros(6)}, ValueError, ["bias has shape (6,)", "(5,)"]),
    ({"bias": torch.zeros(5).double()}, TypeError, ["bias has dtype torch.float64", "torch.float32"]),
    (
        {"factors": loge.Factors(torch.zeros(4, 3), torch.zeros(3, 6))},
        ValueError,
        ["factors.left has shape (4, 3)", "(5, 3)"],
    ),
    (
        {"factors": loge.Factors(torch.zeros(5, 3), torch.zeros(3, 7))},
        ValueError,
        ["factors.right has shape (3, 7)", "(3, 6)"],
    ),
    ({"lora_A": torch.zeros(2, 7)}, ValueError, ["lora_A has shape (2, 7)", "(2, 6)"]),
    ({"lora_A": torch.zeros(6)}, ValueError, ["lora_A has shape (6,)"]),
    ({"lora_B": torch.zeros(5, 3)}, ValueError, ["lora_B has shape (5, 3)", "(5, 2)"]),
    ({"lora_B": None}, ValueError, ["lora_A", "lora_B", "both or neither"]),
    ({"lora_A": None}, ValueError, ["lora_A", "lora_B", "both or neither"]),
    ({"lora_A": torch.zeros(2, 6).half()}, TypeError, ["lora_A has dtype torch.float16", "torch.float32"]),
    ({"lora_B": torch.zeros(5, 2).double()}, TypeError, ["lora_B has dtype torch.float64", "torch.float32"]),
    ({"dropout": 1.0}, ValueError, ["dropout=1.0", "[0, 1)"]),
    ({"dropout": -0.1}, ValueError, ["dropout=-0.1", "[0, 1)"]),
    ({"dropout": float("nan")}, ValueError, ["dropout=nan", "[0, 1)"]),
    ({"exact_fraction": 1.5}, ValueError, ["exact_fraction=1.5", "[0, 1]"]),
    ({"exact_fraction": float("nan")}, ValueError, ["exact_fraction=nan", "[0, 1]"]),
    ({"backend": "cublas"}, ValueError, ["backend='cublas'", "'auto'", "'reference'"]),
    ({"exact_dtype": "fp8"}, ValueError, ["exact_dtype='fp8'", "'float8'", "'int8'", "None"]),
    ({"exact_dtype": 8}, ValueError, ["exact_dtype=8", "'float8'"]),
    ({"exact_dtype": torch.int8}, ValueError, ["exact_dtype=torch.int8", "'int8'"]),
    ({**IN_FLOAT64, "exact_dtype": "int8"}, TypeError, ["exact_dtype='int8'", "float64", "bfloat16"]),
]


@pytest.mark.parametrize(("wrong", "error", "parts"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_errors_name_argument_value_and_what_works(
    wrong: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    loge.linear(**GOOD)
    with pytest.raises(error) as caught:
        loge.linear(**{**GOOD, **wrong})
    for part in parts:
        assert part in str(caught.value)
