"""The trace: the mean deviation of every latent space, taken by hooks while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, on_device
from ..collectives import Group, distributed, failing_alike
from ..terminal import with_progress
from .prefix import Stack, embeddings

# A norm between the last layer and the head, in the models of transformers.
_FINAL_NORMS = (
    "norm",
    "final_layer_norm",
    "final_layernorm",
    "ln_f",
    "layernorm",
    "emb_layer_norm_after",
    "embedding_norm",
)
_CLASSIFIERS = ("score", "classifier")
_IGNORED = -100  # transformers' label for a token without one


def output_head(model: Any) -> nn.Module:
    """The linear layer that maps hidden states to labels: the output embeddings or a classifier. Raises ValueError."""
    found = [embeddings(model, "output")]
    found += [module for name, module in model.named_modules() if name.rpartition(".")[2] in _CLASSIFIERS]
    for head in found:
        # PEFT wraps a targeted head and one in modules_to_save, which trains in a copy.
        active = getattr(head, "modules_to_save", None)
        if isinstance(active, nn.ModuleDict) and len(active) > 0:
            head = next(iter(active.values()))
        head = getattr(head, "base_layer", head)
        head = getattr(head, "out_proj", head)  # RoBERTa's classifier ends in it
        if isinstance(head, nn.Linear):
            return head
    raise ValueError(
        f"this {type(model).__name__} has neither output embeddings nor a classifier that is one linear layer; give "
        "head=, the linear layer from its hidden states to the labels"
    )


def trace(
    model: nn.Module,
    stack: Stack,
    batches: Iterable[Batch],
    head: nn.Module,
    deviation: Callable[[Tensor, Tensor], Tensor],
    labels: int,
    group: Group,
) -> tuple[list[float], int]:
    """The mean of `deviation(hidden [T, H], labels [T]) -> [T]` in each latent space over the batches of all ranks of
    `group`, and over how many labels."""
    spaces = _Spaces(len(stack.layers) + 1, _final_maps(model, stack), deviation)
    seen = 0
    steps = {step for name, module in model.named_modules() if module is head for step in name.split(".")}
    last_token = "score" in steps  # transformers' classifiers over decoders have it, and it reads the last token
    device = next(model.parameters()).device
    alike = failing_alike("planning", device, group)
    with alike, _evaluating(model), spaces.watching(stack.layers), torch.no_grad():
        for number, batch in enumerate(with_progress(batches, "planning")):
            moved = on_device(batch, model, number)
            spaces.select = _selection(model, moved, labels, last_token, number)
            model(**{name: value for name, value in moved.items() if name != "labels"})
            if not all(map(torch.isfinite, spaces.sums)):
                raise ValueError(f"the deviation of batch {number} is not finite; check the model's outputs")
            seen += 1
    counts = spaces.counts
    if distributed():
        together = torch.stack([*spaces.sums, *counts]).to(device)
        torch.distributed.all_reduce(together, group=group)
        summed = list(together.cpu())
        spaces.sums, counts = summed[: len(counts)], summed[len(counts) :]
    elif seen == 0:
        raise ValueError("batches is empty: it gave no batch to plan with")
    if not all(counts):
        raise ValueError("batches have no label to compare with: all are -100, or every rank's batches are empty")
    return [(total / count).item() for total, count in zip(spaces.sums, counts, strict=True)], int(counts[0])


class _Spaces:
    """Sums of the deviations in each latent space, from hooks on the layers."""

    def __init__(self, number: int, maps: list[nn.Module], deviation: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.sums = [torch.zeros((), dtype=torch.float64) for _ in range(number)]
        self.counts = [torch.zeros((), dtype=torch.float64) for _ in range(number)]
        self.select: Callable[[Tensor], tuple[Tensor, Tensor]]
        self._maps, self._deviation = maps, deviation

    @contextlib.contextmanager
    def watching(self, layers: nn.ModuleList) -> Iterator[None]:
        handles = [layers[0].register_forward_pre_hook(self._on_embedding, with_kwargs=True)]
        for number, layer in enumerate(layers, 1):
            handles.append(layer.register_forward_hook(self._on_layer(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_embedding(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._add(0, inputs[0] if inputs else named["hidden_states"])

    def _on_layer(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda layer, inputs, output: self._add(number, output if isinstance(output, Tensor) else output[0])

    def _add(self, space: int, hidden: Tensor) -> None:
        states, labels = self.select(hidden)
        if len(labels) > 0:
            for into_head in self._maps:
                states = into_head(states)
            deviations = self._deviation(states, labels)
            if deviations.shape != labels.shape:
                raise ValueError(f"deviation gave {tuple(deviations.shape)}, for {len(labels)} states")
            self.sums[space] += deviations.double().sum().cpu()
            self.counts[space] += len(labels)


def _selection(
    model: nn.Module, batch: dict[str, Any], known: int, last_token: bool, number: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From hidden states [B, S, H] to those with a label [T, H], and the labels [T]."""
    labels = _labels(batch, number)
    used = labels != _IGNORED
    if labels.is_floating_point() or labels.dim() not in (1, 2) or (labels[used] >= known).any():
        what = f"{labels.dtype}, shape {tuple(labels.shape)}, up to {labels.max().item() if labels.numel() else '-'}"
        raise ValueError(f"the labels of batch {number} are {what}; expected integers [B] or [B, S] below {known}")
    if labels.dim() == 1:
        position = _last_positions(batch, len(labels)) if last_token else None
        return lambda hidden: (_at(hidden, position)[used], labels[used])
    if _predicts_next(model):
        ahead = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        labels, used = ahead, ahead != _IGNORED
    return lambda hidden: (hidden.reshape(*labels.shape, -1)[used], labels[used])


def _labels(batch: dict[str, Any], number: int) -> Tensor:
    if not isinstance(batch.get("labels"), Tensor):
        raise ValueError(f"batch {number} has no 'labels': it has {', '.join(map(repr, batch))}; add them")
    return batch["labels"]


def _at(hidden: Tensor, position: Tensor | None) -> Tensor:
    """The states [B, H] at a position of each sequence; None: the first."""
    if position is None:
        return hidden[:, 0]
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


def _last_positions(batch: dict[str, Any], size: int) -> Tensor:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        tokens = next(value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1)
        return torch.full((size,), tokens.shape[1] - 1, device=tokens.device)
    numbers = torch.arange(mask.shape[1], device=mask.device)
    return (numbers * (mask != 0)).argmax(dim=1)


def _predicts_next(model: Any) -> bool:
    """Whether labels are the input itself, as transformers' causal models take them."""
    base = getattr(model, "get_base_model", lambda: model)()
    name = type(base).__name__
    return "CausalLM" in name or "LMHead" in name


def _final_maps(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """What the last layer's output passes on its way to the head: the norm beside the stack of layers, or beside what
    it lies in, and OPT's projection."""
    steps = stack.name.split(".")
    for depth in range(len(steps) - 1, -1, -1):
        children = dict(model.get_submodule(".".join(steps[:depth])).named_children())
        found = [children[name] for name in (*_FINAL_NORMS, "project_out") if name in children]
        if found:
            return found
    return []


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and then in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
