"""The specification computes what is needed and nothing else. What it computes is compared in `test_ops`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from surrogate import NEEDS, case, problem_of

from loge_kernels.backend import reference


@pytest.mark.parametrize("R", [5, None])
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)))
def test_what_is_not_needed_is_not_computed(wanted: tuple[bool, ...], R: int | None) -> None:
    """Operands that no needed gradient reads may be missing."""
    c = case(R=R)
    dx, dweight, _, dA, dB = wanted
    missing = {
        "x": dweight or dA,
        "xa": dB,
        "weight": dx and R is None,
        "left": dx,
        "right": dx,
        "lora_A": dx or dA,
        "lora_B": dx or dA or dB,
    }
    needs = tuple(name for name, want in zip(NEEDS, wanted, strict=True) if want)
    made = reference.backward(problem_of(c, needs, **{name: None for name, read in missing.items() if not read}))
    found = (made.dx, made.dweight, made.dbias, made.dA, made.dB)
    assert tuple(gradient is not None for gradient in found) == wanted


def test_heaviest_rows_counts_in_wide_precision() -> None:
    for row in range(4):
        dy = torch.full((4, 1000), 6000.0, dtype=torch.float16)  # norms beyond float16
        dy[row] = 20_000.0
        assert reference.heaviest_rows(dy, 0.25).tolist() == [row]
    assert reference.heaviest_rows(dy[:0], 0.5).tolist() == []
