"""The specification is what autograd says of the layer, and of the layer with left · right in the weight's place."""

from __future__ import annotations

import pytest
import torch
from surrogate import NAMES, case

from loge_kernels.backend import naive


@pytest.mark.parametrize("R", [None, 5])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_naive_is_autograd(R: int | None, dropped: bool, with_residual: bool) -> None:
    c = case(R=R)
    keep = torch.rand(c.x.shape, dtype=c.x.dtype).round() / 0.5
    rows, residual = (torch.tensor([1, 4, 7]), torch.randn(3, 11, dtype=c.x.dtype)) if with_residual else (None, None)

    def drop(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * keep if dropped else tensor

    leaves = {name: getattr(c, name).clone().requires_grad_() for name in NAMES}
    x, W, b, A, B = leaves.values()
    y = naive.forward(c.x, W, b, A, B, c.scaling, drop)
    expected = dict(zip(NAMES[1:], torch.autograd.grad(y, [W, b, A, B], c.dy), strict=True))
    stands_for = c.weight if R is None else c.left @ c.right
    if R is not None and with_residual:
        stands_for = stands_for.index_add(0, rows, residual)
    through = naive.forward(x, stands_for, b, A, B, c.scaling, drop)
    expected["x"] = torch.autograd.grad(through, x, c.dy)[0]

    frozen = c.dy @ c.weight if R is None else naive.low_rank(c.dy, c.left, c.right, rows, residual)
    found = naive.backward(c.dy, c.x, frozen, c.lora_A, c.lora_B, c.scaling, drop)
    assert found.keys() == set(NAMES)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(y, torch.nn.functional.linear(c.x, W, b) + c.scaling * drop(c.x) @ A.t() @ B.t())
