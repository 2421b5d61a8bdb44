"""The specification computes what is needed and nothing else. What it computes is compared in `test_ops`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from surrogate import case

from loge_kernels import reference
from loge_kernels.problem import BackwardProblem

NEEDS = ("need_dx", "need_dweight", "need_dbias", "need_dA", "need_dB")


@pytest.mark.parametrize("R", [5, None])
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)))
def test_what_is_not_needed_is_not_computed(wanted: tuple[bool, ...], R: int | None) -> None:
    """Operands that no needed gradient reads may be missing."""
    c = case(R=R)
    dx, dweight, _, dA, dB = wanted
    made = reference.backward(
        BackwardProblem(
            dy=c.dy,
            x=c.x if dweight or dA else None,
            xa=c.x @ c.lora_A.t() if dB else None,
            weight=c.weight if dx and R is None else None,
            left=c.left if dx else None,
            right=c.right if dx else None,
            lora_A=c.lora_A if dx or dA else None,
            lora_B=c.lora_B if dx or dA or dB else None,
            scaling=c.scaling,
            dropout=0.0,
            seed=None,
            exact_fraction=0.0,
            deterministic=False,
            **dict(zip(NEEDS, wanted, strict=True)),
        )
    )
    found = (made.dx, made.dweight, made.dbias, made.dA, made.dB)
    assert tuple(gradient is not None for gradient in found) == wanted


def test_heaviest_rows_counts_in_wide_precision() -> None:
    for row in range(4):
        dy = torch.full((4, 1000), 6000.0, dtype=torch.float16)  # norms beyond float16
        dy[row] = 20_000.0
        assert reference.heaviest_rows(dy, 0.25).tolist() == [row]
    assert reference.heaviest_rows(dy[:0], 0.5).tolist() == []
