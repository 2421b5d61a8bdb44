"""The mask: bit for bit the documented formula, and fit to be a dropout mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loge_kernels.numerics import dropout
from loge_kernels.numerics.dropout import draw_seed, drop, keep_mask


def mix(h: np.ndarray) -> np.ndarray:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def words(seed: int, offset: int, rows: int, columns: int) -> np.ndarray:
    """The docstring's formula in numpy's own unsigned arithmetic, before the comparison."""

    def halves(word: int) -> tuple[np.ndarray, np.ndarray]:
        word %= 1 << 64
        return np.array([word & 0xFFFFFFFF], np.uint32), np.array([word >> 32], np.uint32)

    (seed_lo, seed_hi), (offset_lo, offset_hi) = halves(seed), halves(offset)
    key = mix(seed_lo ^ mix(seed_hi ^ mix(offset_lo ^ mix(offset_hi ^ np.uint32(0x9E3779B9)))))
    row_key = mix(np.arange(rows, dtype=np.uint32) ^ key)
    col_key = mix(np.arange(columns, dtype=np.uint32) ^ np.uint32(0x85EBCA6B))
    return mix(row_key[:, None] ^ col_key[None, :])


def formula(seed: int, offset: int, rows: int, columns: int, p: float) -> np.ndarray:
    return words(seed, offset, rows, columns) >= np.uint32(int(np.floor(p * 2.0**32)))


def pair(seed: int, offset: int = 0) -> torch.Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64)


@pytest.mark.parametrize("seed", [(0, 0), (1, 2), (-1, -(1 << 63)), ((1 << 62) + 12345, -987654321987)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.5000001, 0.999, 1 - 2**-53])
def test_mask_is_the_formula(seed: tuple[int, int], p: float) -> None:
    for shape in ((37, 53), (0, 5), (5, 0), (1, 1)):
        assert np.array_equal(keep_mask(pair(*seed), *shape, p).numpy(), formula(*seed, *shape, p))


def test_a_word_on_the_threshold_is_kept() -> None:
    word = int(words(3, 4, 5, 6)[2, 3])
    assert keep_mask(pair(3, 4), 5, 6, word / 2**32)[2, 3]
    assert not keep_mask(pair(3, 4), 5, 6, (word + 1) / 2**32)[2, 3]


@pytest.mark.parametrize("slab", [1, 100, 53 * 7, 1 << 18])
def test_slabs_do_not_show(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "_SLAB", slab)
    assert np.array_equal(keep_mask(pair(3, 4), 37, 53, 0.3).numpy(), formula(3, 4, 37, 53, 0.3))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate_and_independence(p: float) -> None:
    side = 512
    dropped = 1.0 - keep_mask(pair(11, 12), side, side, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 5 * sigma / side
    for dim in (0, 1):  # no row or column is special
        assert (dropped.mean(dim) - p).abs().max() < 6 * sigma / side**0.5
    standard = (dropped - p) / sigma
    for correlations in (standard @ standard.t() / side, standard.t() @ standard / side):
        correlations.fill_diagonal_(0.0)
        assert correlations.abs().max() < 10 / side**0.5  # few joint drops at small p: a long tail
        assert abs(correlations.square().mean() * side - 1) < 0.1  # as spread as those of independent rows


def test_seed_and_offset_each_choose_the_mask() -> None:
    first = keep_mask(pair(5, 6), 256, 256, 0.5)
    assert torch.equal(first, keep_mask(pair(5, 6), 256, 256, 0.5))
    for other in (pair(6, 6), pair(5, 7), pair(5 + (1 << 32), 6), pair(5, 6 + (1 << 32)), pair(6, 5)):
        agreement = (first == keep_mask(other, 256, 256, 0.5)).double().mean()
        assert abs(agreement - 0.5) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_drop_scales_what_it_keeps(dtype: torch.dtype) -> None:
    x = torch.randn(9, 14, dtype=dtype)
    before = x.clone()
    dropped = drop(x, pair(1), 0.25)
    keep = torch.from_numpy(formula(1, 0, 9, 14, 0.25))
    assert dropped.dtype == dtype
    assert torch.equal(dropped, torch.where(keep, x / 0.75, torch.zeros_like(x)))
    assert torch.equal(x, before)


def test_draw_seed_follows_torchs_generator() -> None:
    torch.manual_seed(1)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(1)
    again = draw_seed(torch.device("cpu"))
    assert first.dtype == torch.int64
    assert first.shape == (2,)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    draws = torch.stack([draw_seed(torch.device("cpu")) for _ in range(64)])
    assert (draws.abs() > 1 << 40).float().mean() > 0.9  # both words are used whole
    assert (draws < 0).any()
