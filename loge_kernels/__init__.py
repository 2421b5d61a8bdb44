"""Linear layers whose backward pass is cheap: full weight forward, low-rank activation gradient, exact LoRA."""

from typing import TYPE_CHECKING, Any

from .backends import Backend, backends, use_backend
from .calibration import calibrate
from .eight_bit import EightBitWeight
from .factors import Factors, factorize
from .linear import LoGELinear
from .model import apply, remove
from .ops import cheap_backward, linear
from .policy import Policy
from .report import LayerReport, Report
from .schedule import Schedule, refresh, schedule_of
from .statistics import LayerStatistics, Statistics
from .triton_kernels import explain

if TYPE_CHECKING:
    from .trainer import LogeCallback as LogeCallback  # not in __all__: a star import would need transformers

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "EightBitWeight",
    "Factors",
    "LayerReport",
    "LayerStatistics",
    "LoGELinear",
    "Policy",
    "Report",
    "Schedule",
    "Statistics",
    "apply",
    "backends",
    "calibrate",
    "cheap_backward",
    "explain",
    "factorize",
    "linear",
    "refresh",
    "remove",
    "schedule_of",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`LogeCallback` on first use: its base class is transformers', which takes seconds to import."""
    if name != "LogeCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import LogeCallback

    return LogeCallback
