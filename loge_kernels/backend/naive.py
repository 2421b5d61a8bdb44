"""The specification: a linear layer with a LoRA adapter, and left · right for W in the gradient of x. Dense PyTorch.

Convention of `torch.nn.Linear`: x [M, K], W [N, K], b [N], A [P, K], B [N, P], left [N, R], right [R, K]. `drop` is the
adapter's dropout with its mask, a linear function of [M, K]. `reference` and every kernel are held against this file.

Source: LoGE, Zhang et al., Applied Sciences 2025, 15(1), 82, section 4; LoRA, arXiv 2106.09685; the rows of W that a
residual makes exact, CE-LoRA, arXiv 2502.01378.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Drop = Callable[[Tensor], Tensor]


def nothing_dropped(x: Tensor) -> Tensor:
    return x


def forward(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, s: float, drop: Drop = nothing_dropped) -> Tensor:
    """y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ [M, N], through the weight itself."""
    return x @ W.t() + b + (s * (drop(x) @ A.t())) @ B.t()


def low_rank(dy: Tensor, left: Tensor, right: Tensor, rows: Tensor | None, residual: Tensor | None) -> Tensor:
    """dY · left · right + dY[:, rows] · residual [M, K], which stands for dY · W; rows [Q], residual [Q, K]."""
    dx = dy @ left @ right
    return dx if rows is None or residual is None else dx + dy[:, rows] @ residual


def backward(
    dy: Tensor, x: Tensor, frozen: Tensor, A: Tensor, B: Tensor, s: float, drop: Drop = nothing_dropped
) -> dict[str, Tensor]:
    """The gradients by name. `frozen` [M, K] is dY · W where the layer is exact and `low_rank(dY, …)` elsewhere; a
    layer can have rows of either kind."""
    dxa = s * (dy @ B)
    return {
        "x": frozen + drop(dxa @ A),
        "weight": dy.t() @ x,
        "bias": dy.sum(0),
        "lora_A": dxa.t() @ drop(x),
        "lora_B": dy.t() @ (s * (drop(x) @ A.t())),
    }
