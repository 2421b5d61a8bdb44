"""Linear layers whose backward pass is cheap: full weight forward, low-rank activation gradient, exact LoRA."""

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
