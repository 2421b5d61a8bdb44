"""`plan_freezing`: how much each layer adds to what the model knows of a task, and where to cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..batches import Batch
from ..collectives import group_of, unwrapped
from .gains import GAINS, Gain
from .plan import FreezePlan
from .prefix import find_stack
from .semantics import SemanticBases
from .trace import output_head, trace

Deviation = Callable[[SemanticBases, Tensor, Tensor], Tensor]
DEVIATIONS = ("cross_entropy", "cosine")


def plan_freezing(
    model: nn.Module,
    batches: Iterable[Batch],
    deviation: str | Deviation = "cross_entropy",
    gain: str | Gain = "marginal",
    temperature: float = 0.2,
    head: nn.Module | None = None,
) -> FreezePlan:
    """Where to freeze `model` for the task of `batches`: `freeze(model, plan)` or `apply(model, freeze_below=plan)`.

    The model runs forward alone, in eval mode; how far the states of each latent space, the embedding's output and each
    layer's, are from their labels is averaged over all labels (`loge_kernels.freezing.semantics`), in float32. The
    states pass the model's final norm first, where it has one, as the head is made for what comes out of it. The layer
    with the largest gain and all before it are to freeze; the last one always trains. Nothing of the model changes, and
    no states are kept: memory is that of one forward pass and a few chunks of the head.

    Args:
        model: a language model, or a classifier (see `head`), plain or PEFT, applied or not. One in a
            `DistributedDataParallel` is looked through, its process group taken; under torch.distributed every rank
            passes its own batches, and all get the same plan, or an error.
        batches: dicts of tensors with "labels" as transformers' models take them (−100: no label), moved to the
            model's device; any iterable. Labels of a causal model are its shifted input. A few thousand tokens do.
        deviation: "cross_entropy" of the semantic logits at `temperature`, "cosine": 1 − that with the label's basis,
            or deviation(bases, hidden [T, H], labels [T]) -> [T].
        gain: "marginal", the drop in deviation; "power_law", the drop beyond that of a fitted power law
            (`loge_kernels.freezing.gains`); or gain(trace of N + 1) -> N.
        temperature: of the cross-entropy; the source leaves it open. Cosines lie in [-1, 1], so a low one punishes a
            confident state: under 0.1, the embedding's output of SmolLM2-135M, which with a tied head is sure of the
            token that it is, makes the first layer's gain the largest. At 0.2 it is the 24th of 30, as for "cosine".
        head: a linear layer from hidden states to labels. None: the output embeddings, or a classifier that is one
            linear layer; its labels are those of whole sequences, compared with the state that it reads (the first
            token's; the last one's in decoders). The bases of a head that was not trained say nothing.

    Raises:
        ValueError, TypeError: a bad argument, no batch, a batch without labels or that is no dict, labels beyond the
            head's, a model without a head or with fewer than two layers, a deviation that is not finite (with the
            batch's number).

    Source: Gu et al., arXiv 2406.11753 (semantic-aware layer freezing).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    measure = _deviation(deviation, temperature)
    if not callable(gain) and gain not in GAINS:
        raise ValueError(f"gain={gain!r} is unknown; choose one of {', '.join(map(repr, GAINS))}, or give a function")
    group, model = group_of(model), unwrapped(model)
    stack = find_stack(model)
    if len(stack.layers) < 2:
        raise ValueError(f"this {type(model).__name__} has {len(stack.layers)} layer: none can freeze below another")
    found = output_head(model) if head is None else head
    bases = SemanticBases(_weight(found))
    values, tokens = trace(model, stack, batches, found, partial(measure, bases), bases.labels, group)
    gains = [float(value) for value in (gain if callable(gain) else GAINS[gain])(values)]
    if len(gains) != len(stack.layers):
        raise ValueError(f"gain gave {len(gains)} values for {len(stack.layers)} layers")
    return FreezePlan(
        deviation=_name(deviation) if deviation != "cross_entropy" else f"cross_entropy at {temperature:g}",
        gain=_name(gain),
        tokens=tokens,
        trace=tuple(values),
        gains=tuple(gains),
        boundary=1 + max(range(len(gains) - 1), key=gains.__getitem__),
    )


def _deviation(deviation: str | Deviation, temperature: float) -> Deviation:
    if callable(deviation):
        return deviation
    if deviation not in DEVIATIONS:
        known = ", ".join(map(repr, DEVIATIONS))
        raise ValueError(f"deviation={deviation!r} is unknown; choose one of {known}, or give a function")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0.0 < temperature < 1e6:
        raise ValueError(f"temperature={temperature!r} is not a positive number")
    return SemanticBases.cosine if deviation == "cosine" else partial(_cross_entropy, temperature=temperature)


def _cross_entropy(bases: SemanticBases, hidden: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return bases.cross_entropy(hidden, labels, temperature)


def _weight(head: Any) -> Tensor:
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise TypeError(f"head is a {type(head).__name__}; give a linear layer with a floating [labels, hidden] weight")
    return weight


def _name(what: str | Callable[..., Sequence[float] | Tensor]) -> str:
    return what if isinstance(what, str) else getattr(what, "__name__", type(what).__name__)
