"""Triton kernels of the low-rank and of the exact backward pass, and of the fused forward.

Lies at the top of the repository, and is installed as `loge_kernels.triton_kernels` (setup.py). Takes tensors and
numbers and imports nothing from `loge_kernels`; importable without Triton, `why_not` then says so.
"""

from __future__ import annotations

from typing import Any

from .availability import why_not_here
from .configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig
from .cost_model import Flags
from .dispatch import forward_wins, why_not
from .exact_choice import ExactForm, choose_exact, fuses, takes_dA, why_not_exact
from .explanation import explain

__all__ = [
    "ExactForm",
    "Flags",
    "ForwardConfig",
    "OneLaunchConfig",
    "TwoLaunchConfig",
    "backward",
    "choose_exact",
    "explain",
    "forward",
    "forward_wins",
    "fuses",
    "prepare",
    "product",
    "quantize",
    "takes_dA",
    "why_not",
    "why_not_exact",
    "why_not_here",
]


def __getattr__(name: str) -> Any:
    """What launches, imported with Triton on its first use."""
    if name not in ("backward", "forward", "prepare", "product", "quantize"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import exact_launch, launch

    globals().update(
        backward=launch.backward,
        forward=launch.forward,
        prepare=exact_launch.prepare,
        product=exact_launch.product,
        quantize=exact_launch.quantize,
    )
    return globals()[name]
