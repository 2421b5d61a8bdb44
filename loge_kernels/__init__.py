"""Linear layers whose backward pass is cheap: full weight forward, low-rank activation gradient, exact LoRA."""

from .backends import Backend, backends, use_backend
from .factors import Factors, factorize
from .linear import LoGELinear
from .model import apply, remove
from .ops import linear
from .report import LayerReport, Report
from .triton_kernels import explain

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Factors",
    "LayerReport",
    "LoGELinear",
    "Report",
    "apply",
    "backends",
    "explain",
    "factorize",
    "linear",
    "remove",
    "use_backend",
]
