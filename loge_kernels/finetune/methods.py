"""The methods that `finetune` can train, and what each needs: its adapters, its optimizer, its name in the results."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from ..layers.linear import LoGELinear
from . import models
from .options import LOGE, LORA, LOW_RANK, METHODS, FinetuneError, FinetuneOptions, split_method


@dataclass(frozen=True, slots=True)
class Method:
    """One run: the method, and whether the first layers are frozen in it."""

    name: str
    frozen: bool = False
    lr: float | None = None  # None: that of the options

    @property
    def key(self) -> str:
        """Its name in files and metrics."""
        return ("low_rank" if self.name == LOW_RANK else self.name) + ("-frozen" if self.frozen else "")

    @property
    def title(self) -> str:
        title = METHODS[self.name][0]
        return title.removesuffix(" (PEFT)") + " + freezing" if self.frozen else title

    @property
    def colour(self) -> str:
        return METHODS[self.name][1]

    @property
    def line(self) -> str:
        return "--" if self.frozen else "-"

    @property
    def applied(self) -> bool:
        """Whether it trains LoRA's adapters with our backward."""
        return self.name in (LOGE, LOW_RANK)

    @property
    def comparable(self) -> bool:
        """Whether its gradient is of the same parameters as that of LoRA."""
        return not self.frozen and (self.applied or self.name == LORA)

    @property
    def resumable(self) -> bool:
        """Whether a run can go on in its middle. SwitchLoRA changes the frozen weights, and its candidates are as many
        again: three times the model for a state that a few minutes make anew."""
        return self.name != "switchlora"


def chosen(options: FinetuneOptions) -> tuple[Method, ...]:
    """The runs of `options`, PEFT's LoRA, by which the others are measured, first."""
    wanted = [Method(name, options.freeze is not None, lr) for name, lr in map(split_method, options.method)]
    exact = next((method for method in wanted if method.key == LORA), Method(LORA))
    return (exact, *(method for method in wanted if method.key != LORA))


def attach(base: nn.Module, method: Method, options: FinetuneOptions) -> Any:
    """A PEFT model with the adapters of `method`, the same for the same seed, over a copy of `base` that shares its
    weights. SwitchLoRA, which changes them, gets its own."""
    shared = {} if method.name == "switchlora" else {id(p): p for p in base.parameters()}
    model = copy.deepcopy(base, dict(shared))
    try:
        return models.attach(model, _config(model, method, options), options.seed)
    except FinetuneError:
        raise
    except (TypeError, ValueError) as error:
        raise FinetuneError(f"--method {method.name}: {error}") from error


def _config(model: Any, method: Method, options: FinetuneOptions) -> Any:
    if method.name == LORA or method.applied:
        return models.lora_config(model, options)
    if method.name == "switchlora":
        from ..methods.switchlora import SwitchLoraConfig

        return SwitchLoraConfig(
            r=options.lora_rank,
            total_steps=options.steps,
            seed=options.seed,
            train_rest=False,
            target_modules=models.targets(model, options),
            task_type="CAUSAL_LM",
        )
    from ..methods.loretta import LorettaAdpConfig, LorettaRepConfig

    config = LorettaRepConfig if method.name == "loretta-rep" else LorettaAdpConfig
    # As the paper places and sizes them: --targets and --lora-rank are LoRA's.
    return config(task_type="CAUSAL_LM")


def optimizer(model: nn.Module, method: Method, options: FinetuneOptions) -> optim.Optimizer | None:
    """The optimizer that the method needs; None: any will do."""
    if method.name != "switchlora":
        return None
    from ..methods.switchlora import SwitchAdamW

    parameters = [p for p in model.parameters() if p.requires_grad]
    return SwitchAdamW(parameters, lr=options.lr, weight_decay=0.0, model=model)


def kept_bytes(model: nn.Module, optimizer: optim.Optimizer) -> int:
    """What the method keeps beside weights, adapters and moments: factors, 8-bit copies, SwitchLoRA's candidates."""
    kept: list[Tensor | None] = []
    for layer in model.modules():
        if isinstance(layer, LoGELinear):
            kept += [] if layer.factors is None else layer.factors.tensors
            kept += [] if layer.eight_bit is None else [layer.eight_bit.tensor, layer.eight_bit.scale]
    switcher = getattr(optimizer, "switcher", None)
    kept += [pool.candidates for place in getattr(switcher, "places", ()) for pool in (place.A, place.B)]
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def frozen_bytes(model: nn.Module) -> int:
    """What does not train: frozen parameters and buffers, each once."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    held = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in held if id(tensor) not in trained)
