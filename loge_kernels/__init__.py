"""Linear layers whose backward pass is cheap: full weight forward, exact or low-rank activation gradient, LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backend.choice import Backend, backends, register_backend, use_backend
from .conversion.apply import apply, remove
from .conversion.calibrate import calibrate
from .conversion.report import LayerReport, Report
from .factors.factors import Factors, factorize
from .factors.statistics import LayerStatistics, Statistics
from .freezing.freeze import FrozenPrefix, freeze
from .freezing.plan import FreezePlan
from .freezing.plan_freezing import plan_freezing
from .layers.linear import LoGELinear
from .numerics.eight_bit import EightBitWeight
from .op.linear import linear
from .triton_kernels import explain

if TYPE_CHECKING:
    # Not in __all__: a star import would need transformers.
    from .integrations.fsdp import fully_shard as fully_shard
    from .layers.peft import FusedAdapter as FusedAdapter
    from .layers.peft import register_fused as register_fused
    from .methods.loretta import LorettaAdpConfig as LorettaAdpConfig
    from .methods.loretta import LorettaRepConfig as LorettaRepConfig
    from .methods.registry import register_peft_methods as register_peft_methods
    from .methods.switchlora import SwitchAdamW as SwitchAdamW
    from .methods.switchlora import SwitchLoraConfig as SwitchLoraConfig
    from .methods.switchlora.callback import SwitchLoraCallback as SwitchLoraCallback

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "EightBitWeight",
    "Factors",
    "FreezePlan",
    "FrozenPrefix",
    "LayerReport",
    "LayerStatistics",
    "LoGELinear",
    "Report",
    "Statistics",
    "apply",
    "backends",
    "calibrate",
    "explain",
    "factorize",
    "freeze",
    "linear",
    "plan_freezing",
    "register_backend",
    "remove",
    "use_backend",
]


# Imported on first use: they build on transformers or PEFT, which take seconds to import.
_LAZY = {
    "LorettaAdpConfig": "methods.loretta",
    "LorettaRepConfig": "methods.loretta",
    "SwitchAdamW": "methods.switchlora",
    "SwitchLoraCallback": "methods.switchlora.callback",
    "SwitchLoraConfig": "methods.switchlora",
    "FusedAdapter": "layers.peft",
    "fully_shard": "integrations.fsdp",
    "register_fused": "layers.peft",
    "register_peft_methods": "methods.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
