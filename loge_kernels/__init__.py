"""Linear layers whose backward pass is cheap: full weight forward, low-rank activation gradient, exact LoRA."""

from .backends import Backend, backends, use_backend
from .eight_bit import EightBitWeight
from .factors import Factors, factorize
from .linear import LoGELinear
from .model import apply, remove
from .ops import cheap_backward, linear
from .report import LayerReport, Report
from .triton_kernels import explain

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "EightBitWeight",
    "Factors",
    "LayerReport",
    "LoGELinear",
    "Report",
    "apply",
    "backends",
    "cheap_backward",
    "explain",
    "factorize",
    "linear",
    "remove",
    "use_backend",
]
