"""SwitchLoRA (Zhou, Wang and Xu, arXiv 2406.06564): pre-training with LoRA vectors that are switched, on PEFT."""

from .config import SwitchLoraConfig
from .model import SwitchLoraModel
from .optimizer import SwitchAdamW

__all__ = ["SwitchAdamW", "SwitchLoraConfig", "SwitchLoraModel"]
