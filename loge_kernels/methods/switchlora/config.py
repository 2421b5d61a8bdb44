"""`SwitchLoraConfig`: what PEFT's `get_peft_model` needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.peft_types import PeftType

NAME = "loge_switchlora"

# Of LoraConfig: what changes the adapter's formula, its start, or which parameters a switch would have to know of.
_FIXED: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


@dataclass
class SwitchLoraConfig(LoraConfig):
    """SwitchLoRA: pre-training with LoRA whose vectors are switched, so that the update has full rank over time.

    On wrapping, W becomes W - s·B·A (s = alpha / r): the function is that of the dense start. `SwitchAdamW` does the
    switching. Everything PEFT's `LoraConfig` takes goes through to it, but for what changes the formula.

    Args:
        r: rank of the adapters, at most min(in, out) of each layer; where it is that, nothing is left to switch.
        alpha: the adapter is scaled by alpha / r.
        interval: optimizer steps between two switches of the same vector, when training begins.
        ratio: after this share of all steps, 0.3 of that frequency is left; it falls exponentially.
        freeze_steps: steps for which the counterpart of a switched vector gets no gradient; at most interval / 2.
        total_steps: optimizer steps of the whole training. None: given to `SwitchAdamW`, or by `SwitchLoraCallback`.
        pool_device: where the candidates wait, "cpu" (pinned where the layer is on a GPU) or a CUDA device.
        seed: of the start, the candidates and the choice of steps; the same on every rank.
        train_rest: train every other parameter at full rank (embeddings, norms, head, biases), as the paper does, in
            the precision that the model has: start from a float32 one, under autocast for speed.
        target_modules: as in PEFT; None is "all-linear", every linear layer but the head.

    Raises:
        ValueError: naming the argument, its value and what would work.

    Source: Zhou, Wang and Xu, arXiv 2406.06564.
    """

    target_modules: Any = field(default=None, metadata={"help": "As in PEFT; None is all-linear."})
    alpha: float = field(default=1, metadata={"help": "The adapter is scaled by alpha / r."})
    lora_alpha: Any = field(default=None, metadata={"help": "PEFT's name of alpha."})
    interval: float = field(default=40, metadata={"help": "Steps between two switches of a vector, at the start."})
    ratio: float = field(default=0.1, metadata={"help": "Share of the steps after which 0.3 of the switching is left."})
    freeze_steps: int = field(default=5, metadata={"help": "Steps for which a counterpart gets no gradient."})
    total_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of the whole training."})
    pool_device: str = field(default="cpu", metadata={"help": "Where the candidates wait: cpu or a CUDA device."})
    seed: int = field(default=0, metadata={"help": "Of the start, the candidates and the choice of steps."})
    train_rest: bool = field(default=True, metadata={"help": "Train every other parameter at full rank."})

    def __post_init__(self) -> None:
        given: Any = self  # PEFT's annotation is beyond mypy
        if given.target_modules is None:
            given.target_modules = "all-linear"
        if self.lora_alpha not in (None, self.alpha):
            raise ValueError(f"lora_alpha={self.lora_alpha!r} and alpha={self.alpha!r}: give alpha alone")
        self.lora_alpha = self.alpha
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())  # a member once `model` is imported
        self._check()

    def _check(self) -> None:
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} does not go with SwitchLoRA; leave it at {value!r}")
        if self.train_rest and self.modules_to_save:
            raise ValueError(
                f"modules_to_save={self.modules_to_save!r}: train_rest=True trains every module already; leave one out"
            )
        _check_integer("r", self.r, 1)
        _check_integer("freeze_steps", self.freeze_steps, 0)
        if not self.interval >= max(1, 2 * self.freeze_steps):
            raise ValueError(
                f"interval={self.interval!r} is less than 2 · freeze_steps = {2 * self.freeze_steps} (or than 1): a "
                f"vector would be switched while it is frozen; give interval >= {max(1, 2 * self.freeze_steps)}"
            )
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio={self.ratio!r} is not a share of the steps in (0, 1]")
        if self.total_steps is not None:
            _check_integer("total_steps", self.total_steps, 1)
        check_pool_device(self.pool_device)


def check_pool_device(name: str) -> torch.device:
    """The device called `name`; ValueError unless candidates can wait there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"pool_device={name!r} is unknown; give 'cpu', 'cuda' or 'cuda:N'")
    return device


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; give an integer of at least {least}")
