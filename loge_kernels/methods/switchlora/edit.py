"""Adding a low-rank product to a frozen weight without losing it to round-off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...numerics.autocast import without_autocast


def needs_remainder(weight: Tensor) -> bool:
    """Whether edits of a weight in this dtype would be lost to rounding: 16 bits keep 8 or 11 significant ones."""
    return weight.element_size() < 4


@torch.no_grad()
@without_autocast
def add_product_(linear: nn.Linear, remainder: Tensor | None, columns: Tensor, rows: Tensor) -> None:
    """weight += columns [N, q] @ rows [q, K], in place.

    The product is taken in float64: exact next to the weight, and out of TF32's reach. `remainder` [N, K], in the
    weight's dtype, holds what the weight's rounding leaves over: after any number of edits the weight is the rounded
    sum, and each edit loses the remainder's rounding alone, in bfloat16 2^-18 of the element.
    """
    weight = linear.weight
    product = columns.double() @ rows.double()
    if remainder is None:
        weight.add_(product)
    else:
        product += weight
        product += remainder
        weight.copy_(product)
        remainder.copy_(product.sub_(weight))
