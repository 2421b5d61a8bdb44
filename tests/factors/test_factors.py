"""`factorize`: how close to optimal, how deterministic, what is refused; and factors that follow their weight."""

from __future__ import annotations

import copy
import math
import pickle
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.factors.factors import resolve_rank

decompositions = import_module("loge_kernels.numerics.decompositions")


def orthogonal(*sizes: int) -> list[Tensor]:
    return [torch.linalg.qr(torch.randn(n, n)).Q for n in sizes]


def rotate(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(first kron second) @ rows, a random orthogonal matrix that is cheap to apply."""
    blocks = rows.view(first.shape[0], second.shape[0], -1)
    return torch.einsum("ai,bj,ijk->abk", first, second, blocks).reshape(rows.shape)


def with_spectrum(s: Tensor, N: tuple[int, int], K: tuple[int, int]) -> Tensor:
    """A matrix [prod(N), prod(K)], tall, with singular values `s`: the optimal error of any rank is known exactly."""
    middle = torch.zeros(math.prod(N), math.prod(K))
    middle.diagonal().copy_(s)
    return rotate(rotate(middle, *orthogonal(*N)).t().contiguous(), *orthogonal(*K)).t()


def error(factors: loge.Factors, weight: Tensor) -> float:
    return (weight.double() - factors.left.double() @ factors.right.double()).norm().item()


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that went through the randomised decomposition."""
    calls: list[tuple[int, ...]] = []
    original = decompositions._subspace_iteration

    def spy(W: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(tuple(W.shape))
        return original(W, width)

    monkeypatch.setattr(decompositions, "_subspace_iteration", spy)
    return calls


# The decomposition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(40, 30), (30, 40), (33, 33)])
def test_svd_is_optimal(N: int, K: int, dtype: torch.dtype, iterations: list[tuple[int, ...]]) -> None:
    weight = torch.randn(N, K, dtype=torch.float64).to(dtype)
    s = torch.linalg.svdvals(weight.double())
    factors = loge.factorize(weight, 12)
    assert (factors.left.shape, factors.right.shape) == ((N, 12), (12, K))
    assert (factors.left.dtype, factors.right.dtype) == (dtype, dtype)
    assert (factors.rank, factors.method) == (12, "svd")
    assert factors.left.is_contiguous()
    assert factors.right.is_contiguous()
    assert error(factors, weight) == pytest.approx(s[12:].norm().item(), rel=max(1e-5, torch.finfo(dtype).eps))
    assert factors.energy == pytest.approx((s[:12].square().sum() / s.square().sum()).item(), abs=1e-5)
    torch.testing.assert_close(
        factors.left.double().t() @ factors.left.double(), torch.eye(12).double(), rtol=0, atol=0.02
    )
    assert not iterations


def test_full_rank_is_the_weight() -> None:
    weight = torch.randn(24, 36)
    factors = loge.factorize(weight, 1.0)
    assert factors.rank == 24
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=1e-4, atol=1e-5)
    assert factors.energy == pytest.approx(1.0, abs=1e-6)


SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "1/i": lambda i: 1 / i,
    "1/i^2": lambda i: i**-2,
    "exponential": lambda i: torch.exp(-i / 40),
    "step": lambda i: torch.where(i <= 90, 1.0, 0.01),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_randomised_is_within_a_percent(spectrum: str, wide: bool, iterations: list[tuple[int, ...]]) -> None:
    s = SPECTRA[spectrum](torch.arange(1, 1201, dtype=torch.float64))
    weight = with_spectrum(s.float(), (50, 30), (40, 30))
    factors = loge.factorize(weight.t() if wide else weight, 100)
    assert iterations == [(1500, 1200)]
    assert error(factors, weight.t() if wide else weight) <= 1.01 * s[100:].norm().item()
    assert factors.energy == pytest.approx((s[:100].square().sum() / s.square().sum()).item(), rel=0.01)


def test_randomised_on_a_gaussian(iterations: list[tuple[int, ...]]) -> None:
    weight = torch.randn(1500, 1200)
    optimal = torch.linalg.svdvals(weight)[100:].norm().item()
    before = torch.random.get_rng_state()
    factors = loge.factorize(weight, 100)
    assert iterations
    assert error(factors, weight) <= 1.01 * optimal
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are not touched"
    torch.manual_seed(99)
    again = loge.factorize(weight, 100)
    assert torch.equal(factors.left, again.left)
    assert torch.equal(factors.right, again.right)


def test_weight_of_lower_rank_than_asked(iterations: list[tuple[int, ...]]) -> None:
    for weight in (torch.randn(1500, 40) @ torch.randn(40, 1200), torch.randn(50, 8) @ torch.randn(8, 40)):
        factors = loge.factorize(weight, 100 if weight.shape[0] > 100 else 20)
        assert error(factors, weight) <= 1e-4 * weight.norm()
    assert len(iterations) == 1


def test_zero_weight() -> None:
    factors = loge.factorize(torch.zeros(20, 30), 4)
    assert factors.energy == 1.0
    assert error(factors, torch.zeros(20, 30)) == 0.0


@pytest.mark.slow
def test_large_weight_in_time() -> None:
    torch.set_num_threads(2)
    s = 1 / torch.arange(1, 4097, dtype=torch.float64) ** 0.5  # decays as slowly as pre-trained weights do
    weight = with_spectrum(s.float(), (43, 256), (64, 64))
    started = time.perf_counter()
    factors = loge.factorize(weight, 512)
    seconds = time.perf_counter() - started
    assert error(factors, weight) <= 1.01 * s[512:].norm().item()
    assert seconds < 20


def loss(weight: Tensor, stand_in: Tensor, covariance: Tensor) -> float:
    """E||dY (W - stand_in)||^2 for E[dY^T dY] = covariance."""
    difference = (weight - stand_in).double()
    return torch.trace(difference.t() @ covariance.double() @ difference).item()


def test_gradient_beats_every_competitor() -> None:
    N, K, R = 30, 24, 6
    weight = torch.randn(N, K, dtype=torch.float64)
    dy = torch.randn(200, N, dtype=torch.float64) * torch.logspace(0, -3, N, dtype=torch.float64)
    covariance = dy.t() @ dy / 200
    factors = loge.factorize(weight, R, "gradient", covariance)
    reached = loss(weight, factors.left @ factors.right, covariance)
    s = torch.linalg.svdvals(torch.linalg.cholesky(covariance).t() @ weight)
    assert reached == pytest.approx(s[R:].square().sum().item(), rel=1e-8)
    assert factors.energy == pytest.approx((s[:R].square().sum() / s.square().sum()).item(), rel=1e-8)
    assert factors.method == "gradient"
    svd = loge.factorize(weight, R)
    assert reached < loss(weight, svd.left @ svd.right, covariance)
    for step in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            left, right = (t + step * torch.randn_like(t) for t in (factors.left, factors.right))
            assert reached < loss(weight, left @ right, covariance)
    torch.testing.assert_close(factors.left, weight @ factors.right.t())
    torch.testing.assert_close(factors.right @ factors.right.t(), torch.eye(R).double())


def test_gradient_of_a_white_dy_is_svd() -> None:
    weight = torch.randn(20, 16, dtype=torch.float64)
    white = loge.factorize(weight, 5, "gradient", 3.0 * torch.eye(20))
    svd = loge.factorize(weight, 5)
    torch.testing.assert_close(white.left @ white.right, svd.left @ svd.right)


def test_gradient_of_a_singular_covariance() -> None:
    weight, direction = torch.randn(20, 16), torch.randn(20, 1)
    factors = loge.factorize(weight, 3, "gradient", direction @ direction.t())
    assert factors.energy == pytest.approx(1.0, abs=1e-5)
    assert torch.isfinite(factors.left).all()


# Ranks and errors


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, 1), (100, 100), (17, 17), (1.0, 100), (0.5, 48), (0.25, 32), (0.001, 16), (0.8, 80), (0.99, 96)],
)
def test_rank_rules(rank: int | float, expected: int) -> None:
    assert resolve_rank(rank, 300, 100) == resolve_rank(rank, 100, 300) == expected
    if expected < 40:
        assert loge.factorize(torch.randn(110, 100), rank).rank == expected
    if isinstance(rank, float):  # a share never exceeds a small weight
        assert resolve_rank(rank, 10, 300) == 10


@pytest.mark.parametrize(
    ("rank", "error", "parts"),
    [
        (0, ValueError, ["rank=0", "[12, 9]", "1 to 9"]),
        (10, ValueError, ["rank=10", "[12, 9]", "1 to 9"]),
        (-1, ValueError, ["rank=-1"]),
        (0.0, ValueError, ["rank=0.0", "(0, 1]"]),
        (1.5, ValueError, ["rank=1.5", "(0, 1]"]),
        (float("nan"), ValueError, ["rank=nan", "(0, 1]"]),
        (True, TypeError, ["rank=True", "bool"]),
        ("8", TypeError, ["rank='8'", "str"]),
        (None, TypeError, ["rank=None"]),
    ],
)
def test_bad_ranks(rank: object, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        loge.factorize(torch.randn(12, 9), rank)  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"weight": torch.zeros(5)}, ValueError, ["weight", "(5,)", "[N, K]"]),
        ({"weight": torch.zeros(5, 0)}, ValueError, ["weight", "(5, 0)", "non-empty"]),
        ({"weight": torch.zeros(5, 6, dtype=torch.int8)}, TypeError, ["weight", "torch.int8", "floating"]),
        ({"weight": torch.full((5, 6), float("nan"))}, ValueError, ["weight", "NaN"]),
        ({"weight": torch.full((5, 6), float("inf"))}, ValueError, ["weight", "inf"]),
        ({"method": "qr"}, ValueError, ["method='qr'", "'svd'", "'gradient'"]),
        ({"method": "gradient"}, ValueError, ["covariance is missing", "method='gradient'"]),
        ({"covariance": torch.eye(5)}, ValueError, ["covariance is given", "method='svd'"]),
        ({"method": "gradient", "covariance": torch.eye(6)}, ValueError, ["covariance", "(6, 6)", "(5, 5)"]),
        ({"method": "gradient", "covariance": torch.full((5, 5), float("nan"))}, ValueError, ["covariance", "NaN"]),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        loge.factorize(**{"weight": torch.randn(5, 6), "rank": 2, **arguments})  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("shapes", [((5,), (2, 6)), ((5, 2), (6,)), ((5, 2), (3, 6))])
def test_factors_given_by_hand_must_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"left has shape .*right .*\[N, R\] and \[R, K\]"):
        loge.Factors(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# An object that follows its weight


@pytest.fixture
def bound() -> tuple[nn.Linear, loge.Factors]:
    layer = nn.Linear(18, 20)
    return layer, loge.factorize(layer.weight, 5)


def test_refresh_is_factorize(bound: tuple[nn.Linear, loge.Factors]) -> None:
    layer, factors = bound
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 18))
    factors.refresh(layer.weight)
    expected = loge.factorize(layer.weight, 5)
    assert torch.equal(factors.left, expected.left)
    assert torch.equal(factors.right, expected.right)
    assert (factors.energy, factors.rank, factors.method) == (expected.energy, 5, "svd")
    assert not factors.made_of.changed(layer.weight)
    given = loge.Factors(factors.left, factors.right).bind(layer.weight)
    with pytest.raises(ValueError, match="given by hand"):
        given.refresh(layer.weight)


def test_factors_given_by_hand() -> None:
    left = nn.Parameter(torch.zeros(5, 2))
    factors = loge.Factors(left, torch.zeros(2, 6))
    assert not factors.made_of.changed(torch.zeros(5, 6)), "nobody said of which weight they are"
    assert (factors.method, math.isnan(factors.energy)) == ("given", True)
    assert [t.requires_grad for t in factors.tensors] == [False, False]
    none = loge.Factors(torch.zeros(5, 0), torch.zeros(0, 6))
    x = torch.randn(3, 6, requires_grad=True)
    loge.linear(x, torch.randn(5, 6), none).sum().backward()
    assert not x.grad.any()


def test_inside_autocast_factors_are_the_same() -> None:
    weight = torch.randn(1040, 1040)  # large enough for the randomised decomposition
    for method in ("svd", "gradient"):
        covariance = torch.eye(1040) if method == "gradient" else None
        expected = loge.factorize(weight, 16, method, covariance)
        with torch.autocast("cpu", torch.bfloat16):
            found = loge.factorize(weight, rank=16, method=method, covariance=covariance)
        assert torch.equal(found.left, expected.left)
        assert torch.equal(found.right, expected.right)


def test_copies_and_pickles(bound: tuple[nn.Linear, loge.Factors], tmp_path: Path) -> None:
    layer, factors = bound
    factors = factors.with_residual(layer.weight, 5, torch.rand(20))
    torch.save(factors, tmp_path / "factors.pt")
    copies = [
        copy.deepcopy(factors),
        pickle.loads(pickle.dumps(factors)),
        torch.load(tmp_path / "factors.pt", weights_only=False),
    ]
    for other in copies:
        for name in ("left", "right", "rows", "residual", "importance"):
            assert torch.equal(getattr(other, name), getattr(factors, name)), name
            assert getattr(other, name) is not getattr(factors, name)
        assert (other.rank, other.energy, other.method) == (5, factors.energy, "svd")
        assert not other.made_of.bound, "a copy does not know whose it is"
    assert factors.made_of.bound
