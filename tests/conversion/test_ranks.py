"""The rank of each layer's factors."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import loge_kernels as loge


def test_an_int_rank_is_cut_to_each_layer() -> None:
    model = nn.Sequential(nn.Linear(200, 8), nn.Linear(8, 200)).requires_grad_(False)
    assert [row.rank for row in loge.apply(model, 7).layers] == [7, 7]
    loge.remove(model)
    assert [row.rank for row in loge.apply(model, 30).layers] == [None, None]  # cut to 8, and dense is cheaper


def test_a_pair_of_ranks_grows_towards_the_output() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).requires_grad_(False)
    report = loge.apply(model, rank=(1 / 16, 5 / 16), exact_layers=1 / 6, exact_dtype=None)
    assert [row.rank for row in report.layers] == [16, 32, 48, 64, 80, None]
    assert "5 in ranks 16 to 80, 1 in float32" in report.summary()
    loge.remove(model)
    # From the input to the last low-rank layer, whatever stands above it; one alone has the first.
    assert [row.rank for row in loge.apply(model, (1 / 4, 1 / 4)).layers] == [64] * 6
    loge.remove(model)
    assert [row.rank for row in loge.apply(model, (1 / 8, 1 / 4), exact_layers=5 / 6).layers][:2] == [32, None]


@pytest.mark.parametrize("rank", [(0.1,), (0.1, 0.2, 0.3), (0.0, 0.5), (0.5, 1.5), (16, 32), (0.1, None), ()])
def test_what_is_no_pair_of_ranks(rank: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    with pytest.raises(ValueError, match=re.escape(f"rank={rank!r}; a pair is of two shares in (0, 1], that of")):
        loge.apply(model, rank)
    assert type(model[0]) is nn.Linear
