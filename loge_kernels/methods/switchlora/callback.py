"""`SwitchLoraCallback`: what a `transformers.Trainer` knows and `SwitchAdamW` has to."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from .optimizer import SwitchAdamW

logger = logging.getLogger("loge_kernels")


class SwitchLoraCallback(TrainerCallback):
    """Gives `SwitchAdamW` the Trainer's number of steps where the config has none, and says what is switched.

    Checkpoints need nothing of it: the adapter's file holds the weights, the optimizer's the pools and the schedule. It
    raises ValueError where the Trainer's optimizer is not a `SwitchAdamW`, under which nothing would be switched, and
    warns of a run that is resumed without the optimizer's state, and of another `total_steps` than the Trainer's.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Check the optimizer, and fill in `total_steps`."""
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        if not isinstance(optimizer, SwitchAdamW):
            raise ValueError(
                f"the Trainer's optimizer is a {type(optimizer).__name__}, which switches nothing; give "
                "Trainer(optimizers=(SwitchAdamW([...], model=model), None))"
            )
        switcher = optimizer.switcher
        if switcher.total_steps is None:
            switcher.total_steps = state.max_steps
        elif switcher.total_steps != state.max_steps:
            logger.warning(
                "total_steps=%d, and this Trainer takes %d: vectors are switched as a run of the first length has it",
                switcher.total_steps,
                state.max_steps,
            )
        if state.global_step > 0 and switcher.step == 0:
            logger.warning(
                "resuming at step %d without the optimizer's state: vectors are switched as from the beginning",
                state.global_step,
            )
        if state.is_local_process_zero:
            vectors = sum(len(place.A.candidates) for place in switcher.places)
            print(
                f"SwitchLoRA: {len(switcher.places)} layers, {vectors} candidates a side, over "
                f"{switcher.total_steps} steps"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so when a checkpoint cannot be resumed from."""
        if args.save_only_model:
            logger.warning("save_only_model: training cannot go on from this checkpoint, its pools are not in it")
