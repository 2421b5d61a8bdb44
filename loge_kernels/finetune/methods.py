"""The methods that `finetune` can train, and what each needs: its adapters, its optimizer, its name in the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn, optim

from . import models
from .options import LORA, FinetuneOptions, split_method

_TITLES = {
    LORA: "LoRA (exact)",
    "loge": "LoGE",
    "loretta-rep": "LoRETTA rep",
    "loretta-adp": "LoRETTA adp",
    "switchlora": "SwitchLoRA",
}
# Methods with the same adapters train one after the other on one model, from the same start.
_ADAPTERS = {"loge": LORA}
_COLOURS = {"lora": "C0", "loge": "C1", "loretta-rep": "C2", "loretta-adp": "C4", "switchlora": "C5"}


@dataclass(frozen=True, slots=True)
class Method:
    """One run: the method, and whether the first layers are frozen in it."""

    name: str
    frozen: bool = False
    lr: float | None = None  # None: that of the options

    @property
    def key(self) -> str:
        """Its name in files and metrics."""
        return self.name + ("-frozen" if self.frozen else "")

    @property
    def title(self) -> str:
        title = _TITLES[self.name]
        return title.removesuffix(" (exact)") + " + freezing" if self.frozen else title

    @property
    def colour(self) -> str:
        return _COLOURS[self.name]

    @property
    def line(self) -> str:
        return "--" if self.frozen else "-"

    @property
    def adapters(self) -> str:
        """Whose adapters it trains."""
        return _ADAPTERS.get(self.name, self.name)

    @property
    def resumable(self) -> bool:
        """Whether a run can go on in its middle. SwitchLoRA changes the frozen weights, and its candidates are as many
        again: three times the model for a state that a few minutes make anew."""
        return self.name != "switchlora"


REFERENCE = Method(LORA)


def chosen(options: FinetuneOptions) -> tuple[Method, ...]:
    """The runs of `options`, exact LoRA, by which the others are measured, first."""
    wanted = [Method(name, options.freeze is not None, lr) for name, lr in map(split_method, options.method)]
    exact = next((method for method in wanted if method.key == LORA), REFERENCE)
    return (exact, *(method for method in wanted if method.key != LORA))


def attach(model: Any, method: Method, options: FinetuneOptions) -> Any:
    """`model` as a PEFT model with the adapters of `method`, the same for the same seed."""
    if method.adapters == LORA:
        return models.attach(model, models.lora_config(model, options), options.seed)
    return models.attach(model, _config(model, method, options), options.seed)


def _config(model: Any, method: Method, options: FinetuneOptions) -> Any:
    if method.name == "switchlora":
        from ..switchlora import SwitchLoraConfig

        return SwitchLoraConfig(
            r=options.lora_rank,
            total_steps=options.steps,
            seed=options.seed,
            train_rest=False,
            target_modules=models.targets(model, options),
            task_type="CAUSAL_LM",
        )
    from ..loretta import LorettaAdpConfig, LorettaRepConfig

    config = LorettaRepConfig if method.name == "loretta-rep" else LorettaAdpConfig
    # As the paper places and sizes them: --targets and --lora-rank are LoRA's.
    return config(task_type="CAUSAL_LM")


def optimizer(model: nn.Module, method: Method, options: FinetuneOptions) -> optim.Optimizer | None:
    """The optimizer that the method needs; None: any will do."""
    if method.name != "switchlora":
        return None
    from ..switchlora import SwitchAdamW

    parameters = [p for p in model.parameters() if p.requires_grad]
    return SwitchAdamW(parameters, lr=options.lr, weight_decay=0.0, model=model)
