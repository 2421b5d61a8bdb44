"""LoRETTA (Yang et al., arXiv 2402.11417): fine-tuning with tensor trains, as two methods of PEFT.

    model = get_peft_model(model, LorettaRepConfig())     # LoRA whose A and B are tensor trains
    model = get_peft_model(model, LorettaAdpConfig())     # bottleneck adapters of tensor trains

Importing this registers both with PEFT.
"""

from ..registry import register
from . import fused  # noqa: F401 (what `apply` makes of rep's layer)
from .adp import LorettaAdpModel
from .config import LorettaAdpConfig, LorettaRepConfig
from .rep import LorettaRepModel
from .tensor_train import TensorTrain

register("loretta_rep", LorettaRepConfig, LorettaRepModel)
register("loretta_adp", LorettaAdpConfig, LorettaAdpModel)

__all__ = ["LorettaAdpConfig", "LorettaAdpModel", "LorettaRepConfig", "LorettaRepModel", "TensorTrain"]
