"""When a result counts as correct: the one rule that the harness, the tests and the benchmarks share.

A computed tensor passes when its error against float64 is at most twice the error of the same formula in plain PyTorch
at the same precision, plus a term below the precision's own resolution. Both the root mean square and the largest
element are held to it: the first sees a lost digit everywhere, the second one wrong element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
_RMS_ULP = 0.5  # of eps times the truth's root mean square: about what rounding the exact result costs
_MAX_ULP = 2.0  # of eps times the truth's largest element

_FLOAT64_SLACK = 16.0  # a float64 result is held against a truth with round-off of the same size


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ratio` is error / allowed error (the worse of the two measures); `passed` when it is at most 1."""

    passed: bool
    ratio: float


def judge(result: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Hold `result` against `truth` (float64), with `plain`, the same formula in plain PyTorch, as the yardstick.

    All three have one shape; `result` sets the precision. NaN or inf where the truth is finite fails.
    """
    if result.shape != truth.shape:
        return Verdict(False, float("inf"))
    if truth.numel() == 0:
        return Verdict(True, 0.0)
    truth = truth.double()
    eps = torch.finfo(result.dtype).eps * (_FLOAT64_SLACK if result.dtype == torch.float64 else 1.0)
    error, yardstick = (result.double() - truth).abs(), (plain.double() - truth).abs()
    allowed_rms = FACTOR * _rms(yardstick) + _RMS_ULP * eps * _rms(truth)
    allowed_max = FACTOR * yardstick.max().item() + _MAX_ULP * eps * truth.abs().max().item()
    ratio = max(_over(_rms(error), allowed_rms), _over(error.max().item(), allowed_max))
    return Verdict(ratio <= 1.0, ratio)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _over(error: float, allowed: float) -> float:
    if error != error:
        return float("inf")
    if allowed == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / allowed
