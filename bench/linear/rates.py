"""What this device's own matrix library makes of each product of the low-rank formula: the rates of a cost model.

The products are those of `loge_kernels.backend.reference`, one at a time, in the layouts that it gives them; operands
are cold in cache, as between the layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..measure.timing import Clock, TimingOptions, interleave
from .operands import Operands
from .rows import Case

Product = tuple[int, int, int]  # [I, J] @ [J, L]


def products(o: Operands) -> dict[tuple[str, int | None], tuple[Product, Callable[[], Tensor]]]:
    """The call of each product by its name and rank, with its sizes; None: no rank enters it."""
    M, N, K, P = o.sizes
    x, A, B = o.x.detach(), o.lora_A.detach().to(o.dtype), o.scaled_B
    xa = x @ A.t()
    found: dict[tuple[str, int | None], tuple[Product, Callable[[], Tensor]]] = {
        ("dX = dY W", None): ((M, N, K), partial(torch.matmul, o.dy, o.weight)),
        ("dB = dY' xa", None): ((N, M, P), partial(torch.matmul, o.dy.t(), xa)),
    }
    for R, factors in o.factors.items():
        first, second = torch.cat([factors.left, B], 1), torch.cat([factors.right, A])  # [N, R + P], [R + P, K]
        T = o.dy @ first
        T_P = T[:, R:]
        found["T = dY [left | s B]", R] = ((M, N, R + P), partial(torch.matmul, o.dy, first))
        found["dX = T [right ; A]", R] = ((M, R + P, K), partial(torch.matmul, T, second))
        found["dA = T_P' x", R] = ((P, M, K), partial(torch.matmul, T_P.t(), x))
    return found


def measure(case: Case, o: Operands, clock: Clock, options: TimingOptions) -> list[dict[str, Any]]:
    """A row for each product: sizes, flops, bytes read and written once, the median seconds, and the two rates."""
    found = products(o)
    timings = interleave({str(key): call for key, (_, call) in found.items()}, clock, options)
    rows = []
    for (name, R), ((I, J, L), _) in found.items():
        timing = timings[str((name, R))]
        row: dict[str, Any] = {"product": name, "M": case.M, "N": case.shape.N, "K": case.shape.K, "R": R, "P": case.P}
        row |= {"dtype": case.dtype, "I": I, "J": J, "L": L, "note": timing.failure or ""}
        row |= {"flops": 2 * I * J * L, "bytes": (I * J + J * L + I * L) * o.dy.element_size()}
        if not timing.failure:
            seconds = timing.median
            row |= {"seconds": seconds, "tflops": row["flops"] / seconds / 1e12}
            row["gbytes_per_second"] = row["bytes"] / seconds / 1e9
        rows.append(row)
    return rows
