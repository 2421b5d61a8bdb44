"""Linear layers whose backward pass is cheap: full weight forward, exact or low-rank activation gradient, LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backends import Backend, backends, register_backend, use_backend
from .calibration import calibrate
from .eight_bit import EightBitWeight
from .factors import Factors, factorize
from .freezing.freeze import FrozenPrefix, freeze
from .freezing.plan import FreezePlan
from .freezing.planning import plan_freezing
from .linear import LoGELinear
from .model import apply, remove
from .ops import linear
from .report import LayerReport, Report
from .statistics import LayerStatistics, Statistics
from .triton_kernels import explain

if TYPE_CHECKING:
    # Not in __all__: a star import would need transformers.
    from .loretta import LorettaAdpConfig as LorettaAdpConfig
    from .loretta import LorettaRepConfig as LorettaRepConfig
    from .peft_layers import FusedAdapter as FusedAdapter
    from .peft_layers import register_fused as register_fused
    from .peft_methods import register_peft_methods as register_peft_methods
    from .sharding import fully_shard as fully_shard
    from .switchlora import SwitchAdamW as SwitchAdamW
    from .switchlora import SwitchLoraConfig as SwitchLoraConfig
    from .switchlora.callback import SwitchLoraCallback as SwitchLoraCallback

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
    "LorettaAdpConfig": "loretta",
    "LorettaRepConfig": "loretta",
    "SwitchAdamW": "switchlora",
    "SwitchLoraCallback": "switchlora.callback",
    "SwitchLoraConfig": "switchlora",
    "FusedAdapter": "peft_layers",
    "fully_shard": "sharding",
    "register_fused": "peft_layers",
    "register_peft_methods": "peft_methods",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
