"""The specification against dense autograd of the surrogate, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from surrogate import Case, assert_within_twice, case, gradients, heaviest

from loge_kernels import reference
from loge_kernels.dropout import keep_mask
from loge_kernels.problem import BackwardProblem

SEED = torch.tensor([17, 23])
NEEDS = ("need_dx", "need_dweight", "need_dbias", "need_dA", "need_dB")
SHAPES = {
    "ragged": {},
    "wide": {"N": 5, "K": 31},
    "one row": {"M": 1},
    "no rows": {"M": 0},
    "rank one": {"R": 1, "P": 1},
    "adapter wider than factors": {"R": 2, "P": 9},
    "exact": {"R": None},
    "no adapter": {"P": None},
    "exact, no adapter": {"R": None, "P": None},
    "no bias": {"bias": False},
}


def problem(
    c: Case, dropout: float = 0.0, exact_fraction: float = 0.0, needs: tuple[str, ...] = NEEDS
) -> BackwardProblem:
    p = 0 if c.lora_A is None else c.lora_A.shape[0]
    seed = SEED if dropout else None
    _, xa = reference.forward(c.x, c.weight, c.bias, c.lora_A, c.lora_B, c.scaling, dropout, seed)
    assert xa is None or xa.shape == (c.x.shape[0], p)
    wanted = {name: name in needs for name in NEEDS}
    if c.lora_A is None:
        wanted["need_dA"] = wanted["need_dB"] = False
    return BackwardProblem(
        dy=c.dy,
        x=c.x,
        xa=xa,
        weight=c.weight,
        left=c.left,
        right=c.right,
        lora_A=c.lora_A,
        lora_B=c.lora_B,
        scaling=c.scaling,
        dropout=dropout,
        seed=seed,
        exact_fraction=exact_fraction,
        deterministic=False,
        **wanted,
    )


def mask(c: Case, dropout: float) -> torch.Tensor | None:
    return keep_mask(SEED, *c.x.shape, dropout).double() / (1 - dropout) if dropout else None


def compare(p: BackwardProblem, expected: dict[str, torch.Tensor]) -> None:
    g = reference.backward(p)
    pairs = {"x": g.dx, "weight": g.dweight, "bias": g.dbias, "lora_A": g.dA, "lora_B": g.dB}
    for (name, got), need in zip(pairs.items(), NEEDS, strict=True):
        assert (got is not None) == getattr(p, need), name
        if got is not None and name in expected:
            torch.testing.assert_close(got, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape: dict[str, int | None], dropout: float) -> None:
    c = case(**shape)
    expected = gradients(c, mask(c, dropout))
    y, _ = reference.forward(c.x, c.weight, c.bias, c.lora_A, c.lora_B, c.scaling, dropout, SEED)
    torch.testing.assert_close(y, expected["y"], rtol=1e-12, atol=1e-12)
    compare(problem(c, dropout), expected)


@pytest.mark.parametrize("R", [5, None])
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)))
def test_computes_what_is_needed_and_nothing_else(wanted: tuple[bool, ...], R: int | None) -> None:
    needs = tuple(name for name, want in zip(NEEDS, wanted, strict=True) if want)
    c = case(R=R)
    compare(problem(c, 0.3, needs=needs), gradients(c, mask(c, 0.3)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 1), (0.3, 3), (0.5, 4), (1.0, 7)])
@pytest.mark.parametrize("P", [3, None])
def test_heaviest_rows_are_exact(fraction: float, rows: int, dropout: float, P: int | None) -> None:
    c = case(P=P)
    expected = gradients(c, mask(c, dropout), heaviest(c.dy, rows))
    compare(problem(c, dropout, fraction), expected)


def test_heaviest_rows_counts_in_wide_precision() -> None:
    for row in range(4):
        dy = torch.full((4, 1000), 6000.0, dtype=torch.float16)  # norms beyond float16
        dy[row] = 20_000.0
        assert reference.heaviest_rows(dy, 0.25).tolist() == [row]
    assert reference.heaviest_rows(dy[:0], 0.5).tolist() == []


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_low_precision_within_twice_plain_pytorch(dtype: torch.dtype, dropout: float) -> None:
    narrow = case(M=33, N=48, K=40, R=16, P=8).to(dtype)
    wide = narrow.to(torch.float64)
    scale = mask(wide, dropout)
    truth = gradients(wide, scale)
    plain = gradients(narrow, None if scale is None else scale.to(dtype))
    g = reference.backward(problem(narrow, dropout))
    got = {"x": g.dx, "weight": g.dweight, "bias": g.dbias, "lora_A": g.dA, "lora_B": g.dB}
    for name, tensor in got.items():
        assert tensor is not None
        assert tensor.dtype == dtype
        assert_within_twice(tensor, plain[name], truth[name], name)


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapter_over_a_16_bit_base(dtype: torch.dtype) -> None:
    c = case(M=33, N=48, K=40, R=16, P=8).to(dtype)
    truth = gradients(c.to(torch.float64))
    plain = gradients(c)
    c.lora_A, c.lora_B = c.lora_A.float(), c.lora_B.float()
    g = reference.backward(problem(c))
    assert (g.dx.dtype, g.dA.dtype, g.dB.dtype) == (dtype, torch.float32, torch.float32)
    for name, got in (("x", g.dx), ("lora_A", g.dA), ("lora_B", g.dB)):
        assert_within_twice(got, plain[name], truth[name], name)


def test_strides_do_not_matter() -> None:
    c = case(M=8)
    expected = gradients(c)
    wide_x, wide_dy = torch.zeros(16, 22, dtype=torch.float64), torch.zeros(26, 8, dtype=torch.float64)
    wide_x[::2, ::2], wide_dy[::2] = c.x, c.dy.t()
    c.x, c.dy = wide_x[::2, ::2], wide_dy[::2].t()
    c.weight, c.left, c.lora_A = c.weight.t().contiguous().t(), c.left.t().contiguous().t(), c.lora_A.flip(0).flip(0)
    compare(problem(c), expected)


def test_expanded_dy() -> None:
    c = case()
    c.dy = torch.ones(1, 1, dtype=torch.float64).expand_as(c.dy)
    compare(problem(c), gradients(c))
