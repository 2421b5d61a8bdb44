"""The configurations of the two LoRETTA methods."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from .bottleneck import ACTIVATIONS
from .modes import check_shapes


@dataclass
class LorettaConfig(PeftConfig):
    """What both methods share.

    Args:
        tensor_rank: the rank r of every tensor train.
        bottleneck: the inner size of an adapter (adp), the rank of A and B (rep); `tensor_rank` is at most this.
        target_modules: names of linear layers, or a regular expression for the whole path, as in PEFT. None: those of
            the paper, for model families that are known.
        tensor_shapes: modes for chosen sizes, {"INxOUT": [modes of IN, then modes of OUT]}, for example
            {"768x64": [8, 8, 12, 8, 8]}. Other sizes have the paper's modes, or near-equal ones.
        train_norms: the model's LayerNorm and RMSNorm layers train too, as entries of `modules_to_save`: they are saved
            with the adapter and are the base model's again where it is disabled. In a 16-bit model they train in
            float32.
        classifier_modules: linear layers of a classifier that a tensor train takes the place of. None: with
            `task_type="SEQ_CLS"` the dense layer before the last one, where the family has a new one there (DeBERTa,
            RoBERTa, ELECTRA), otherwise none. Its rank is min(tensor_rank, in, out). The last layer itself trains as
            PEFT has it.
        modules_to_save: other modules to train in full, as in PEFT.
        exclude_modules, layers_to_transform, layers_pattern: as in PEFT.
    """

    tensor_rank: int = 5
    bottleneck: int = 8
    target_modules: list[str] | str | None = None
    tensor_shapes: dict[str, list[int]] | None = None
    train_norms: bool = True
    classifier_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tensor_rank", "bottleneck"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give an integer")
            if value < 1:
                raise ValueError(f"{name}={value}; give 1 or more")
        if self.tensor_rank > self.bottleneck:
            raise ValueError(
                f"tensor_rank={self.tensor_rank} is larger than bottleneck={self.bottleneck}: a train of that rank has "
                "no more freedom; lower the first or raise the second"
            )
        check_shapes(self.tensor_shapes)
        # PEFT's classes for tasks extend this list in place.
        self.modules_to_save = None if self.modules_to_save is None else list(self.modules_to_save)


@dataclass
class LorettaRepConfig(LorettaConfig):
    """LoRETTA_rep: LoRA whose A and B are tensor trains, on the query and value projections.

    y = x Wᵀ + s drop(x) (B A - B₀ A₀)ᵀ, s = alpha / bottleneck, A₀ and B₀ the matrices at the start: training begins at
    the base model exactly. Merges like LoRA.

    Args, beside those of `LorettaConfig`:
        alpha: the numerator of the scaling.
        dropout: probability, in [0, 1), on the adapter's input.

    Raises:
        ValueError, TypeError: a value out of range, tensor_rank > bottleneck, modes that do not multiply out.

    Source: Yang et al., arXiv 2402.11417, section 3.
    """

    alpha: float = 16
    dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORETTA_REP")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r} is not a probability in [0, 1)")


@dataclass
class LorettaAdpConfig(LorettaConfig):
    """LoRETTA_adp: bottleneck adapters of tensor trains, h + up(act(down(h))), before or after linear layers.

    Down and up have biases. The paper's places: before gate_proj and up_proj and after down_proj (LLaMA, Qwen,
    Mistral, ...), after every `output.dense` (BERT, RoBERTa, DeBERTa, ...), before fc1 and after fc2 (OPT; ViT too).
    It cannot be merged.

    Args, beside those of `LorettaConfig`:
        where: "before" or "after", or a dict of names to which of the two (its names are the targets where
            `target_modules` is None). None: the paper's places, for model families that are known.
        non_linearity: "relu", "gelu", "silu" or "tanh".
        identity_start: the last core of every up train starts at zero, so that training begins at the base model.
            False: all cores Gaussian, as in the paper's code; the adapters of a deep model then start as noise
            (SmolLM2-135M's loss begins at 4.6 instead of 3.1).

    Raises:
        ValueError, TypeError: a value out of range, tensor_rank > bottleneck, modes that do not multiply out.

    Source: Yang et al., arXiv 2402.11417, section 3.
    """

    bottleneck: int = 64
    where: dict[str, str] | str | None = None
    non_linearity: str = "relu"
    identity_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORETTA_ADP")
        places = self.where.values() if isinstance(self.where, dict) else [self.where]
        if wrong := [place for place in places if place not in ("before", "after", None)]:
            raise ValueError(f"where={self.where!r}: {wrong[0]!r} is neither 'before' nor 'after'")
        if self.non_linearity not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"non_linearity={self.non_linearity!r} is unknown; choose one of {known}")
