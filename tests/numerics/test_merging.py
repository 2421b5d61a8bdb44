"""Both orders of the exact products against float64, and which one is taken when."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from surrogate import assert_within_twice, case, gradients, run

from loge_kernels.backend import reference
from loge_kernels.numerics.merging import merging_pays

WANTED = ("x", "lora_A", "lora_B")
SIZES = {"tall": (64, 12, 10), "few rows": (6, 12, 10), "wide": (30, 9, 20), "narrow": (30, 20, 9)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ["chosen", "beside", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_order_is_right(size: str, order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    M, N, K = SIZES[size]
    c = case(M, N, K, R=None)
    expected = gradients(c)
    if order != "chosen":
        monkeypatch.setattr(reference, "merging_pays", lambda *_: order == "merged")
    got = run(c.to(dtype), WANTED)
    limits = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-5}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), expected[name], **limits)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Called at each merge."""
    watched = Mock(wraps=reference.merged)
    monkeypatch.setattr(reference, "merged", watched)
    return watched


def test_the_sizes_decide(merged: Mock) -> None:
    assert merging_pays(64, 32, torch.float32)
    assert not merging_pays(63, 32, torch.float32)
    assert not merging_pays(6400, 32, torch.bfloat16)
    for size, times in {"tall": 2, "few rows": 0, "wide": 1, "narrow": 1}.items():
        merged.reset_mock()
        run(case(*SIZES[size], R=None).to(torch.float32), WANTED)
        assert merged.call_count == times, size


def test_what_cannot_be_merged_is_not(merged: Mock) -> None:
    c = case(*SIZES["tall"], R=None)
    run(c.to(torch.bfloat16), WANTED)
    run(c.to(torch.float32), WANTED, dropout=0.1)
    assert merged.call_count == 0
    run(case(*SIZES["tall"]).to(torch.float32))
    assert merged.call_count == 1  # the forward, which is exact either way


def test_no_order_worsens_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(256, 32, 24, R=None)
    expected = run(c, WANTED)
    merged = run(c.to(torch.float32), WANTED)
    monkeypatch.setattr(reference, "merging_pays", lambda *_: False)
    beside = run(c.to(torch.float32), WANTED)
    for name, tensor in expected.items():
        assert_within_twice(merged[name], beside[name], tensor, name)
