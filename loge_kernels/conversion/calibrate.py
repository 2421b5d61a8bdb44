"""`calibrate`: what the gradients of a few batches look like at every linear layer, for the subspaces of `apply`.

The model runs forward and backward, exactly, on batches of the task; a hook on each layer's output adds what
`statistics.LayerStatistics` holds and lets the gradient go. Nothing of the model changes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, on_device
from ..collectives import distributed, failing_alike, group_of, unwrapped
from ..factors.statistics import LayerStatistics, Statistics
from ..numerics.autocast import without_autocast
from ..numerics.decompositions import leading_triplets
from ..terminal import with_progress
from .targets import TargetLayer, Targets, find_targets, why_nothing_to_convert

Loss = Callable[[nn.Module, Batch], Tensor]

_SAVE_EVERY = 60.0  # seconds between two saves of `file`
SCORED = 1024  # singular directions scored at most


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Targets = None,
    scores: bool = False,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> Statistics:
    """Statistics of the activation gradients of `model` over `batches`, for `apply(calibration=)`.

    Args:
        model: a plain or PEFT model, in training mode, before `apply`. Weights, `.grad`s, modes and the running
            statistics of BatchNorm stay as they are.
        batches: dicts of tensors, moved to the model's device; any iterable, a `DataLoader` for one. Eight sequences of
            the task are enough for the subspaces of a small model (a step's worth of tokens; more change little).
        targets: the layers, as in `apply`.
        scores: also score up to 1024 leading singular directions of each weight, for `subspace="salience"`; needs a
            decomposition of every weight first and the layers' inputs during the passes.
        loss: loss(model, batch), a scalar; None: `model(**batch).loss`, as transformers' models give it for batches
            with labels.
        device: where statistics are kept, of each layer 4 · min(N, K)² bytes up to min(N, K) = 4096 and a sketch of
            4096 · min(N, K) bytes above: at most 64 MiB up to 16384 (14336: 56 MiB, a whole one 784 MiB). None: with
            each layer; "cpu" saves the GPU's memory.
        file: keep them here too, a safetensors file written every minute and at the end. Where it exists, its batches
            are skipped and its statistics added to: an interrupted calibration goes on. Under torch.distributed each
            rank has its own, `file`.rank0 and so on.

    Under torch.distributed every rank passes its own batches, and all get the sums. A `DistributedDataParallel` wrapper
    is looked through, its gradients are not reduced; the sums are those of its process group.

    Raises:
        ValueError, TypeError: no batch, a batch that is no dict or has no loss, a loss or gradient that is not finite
            (with the batch's number), a model in eval mode, converted already or without linear layers, a `file` of
            other layers or other scores or in no folder; under torch.distributed on every rank, if on one. The model is
            as it was.
    """
    wrapped, model = model, unwrapped(model)
    chosen = _chosen(model, targets)
    device_of_sums, group = chosen[0].linear.weight.device, group_of(wrapped)
    with failing_alike("calibration", device_of_sums, group):
        statistics = _gather(model, batches, chosen, scores, loss, device, file)
    if distributed():
        statistics.sum_over_ranks(device_of_sums, group)
    return statistics


def _gather(
    model: nn.Module,
    batches: Iterable[Batch],
    chosen: list[TargetLayer],
    scores: bool,
    loss: Loss | None,
    device: torch.device | str | None,
    file: str | os.PathLike[str] | None,
) -> Statistics:
    """This rank's own statistics; arguments as in `calibrate`."""
    path = None if file is None else Path(f"{file}.rank{torch.distributed.get_rank()}" if distributed() else file)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"file={str(path)!r}: there is no folder {str(path.parent)!r}")
    layers = {}
    for target in chosen:
        scored = min(SCORED, *target.shape) if scores else 0
        kept_on = target.linear.weight.device if device is None else torch.device(device)
        layers[target.name] = LayerStatistics.empty(target.shape, kept_on, scored)
    statistics = Statistics(layers)
    done = 0
    if path is not None and path.exists():
        statistics = _resumed(path, statistics)
        done = statistics.batches
    collectors = [_Collector(target, statistics.layers[target.name], scores) for target in chosen]
    saved = time.monotonic()
    with _hooks(collectors), _gradients_kept(model), _running_statistics_kept(model):
        for number, batch in enumerate(with_progress(batches, "calibrating")):
            if number < done:
                continue
            statistics.tokens += _pass(model, batch, loss, number)
            statistics.check_batch(number)
            statistics.batches += 1
            if path is not None and time.monotonic() - saved > _SAVE_EVERY:
                statistics.save(path)
                saved = time.monotonic()
    if statistics.batches == 0:
        raise ValueError("batches is empty: it gave no batch to calibrate with")
    statistics.check()
    if path is not None:
        statistics.save(path)
    return statistics


def _chosen(model: nn.Module, targets: Targets) -> list[TargetLayer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if not model.training:
        raise ValueError("model is in eval mode, and calibration is to see training's gradients: call model.train()")
    layers_found = list(find_targets(model, targets))
    chosen = [target for target in layers_found if target.why_not is None]
    if not chosen:
        raise ValueError(why_nothing_to_convert(model, layers_found, targets))
    return chosen


def _resumed(path: Path, fresh: Statistics) -> Statistics:
    found = Statistics.load(path)

    def kind(statistics: Statistics) -> dict[str, Any]:
        return {n: (s.shape, None if s.scores is None else s.scores.shape) for n, s in statistics.layers.items()}

    if kind(found) != kind(fresh):
        raise ValueError(f"file={str(path)!r} holds statistics of other layers or scores; remove it, or give another")
    for name, layer in found.layers.items():
        kept_on = fresh.layers[name].importance.device
        layer.moment.matrix = layer.moment.matrix.to(kept_on)
        layer.importance = layer.importance.to(kept_on)
        layer.scores = None if layer.scores is None else layer.scores.to(kept_on)
    return found


def _pass(model: nn.Module, batch: Batch, loss: Loss | None, number: int) -> int:
    """Forward and backward on one batch; its number of tokens, rows of the first tensor of integers, or 0."""
    moved = on_device(batch, model, number)
    with torch.enable_grad():
        value = _model_loss(model, moved, number) if loss is None else loss(model, moved)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise TypeError(f"the loss of batch {number} is {value!r:.60}; expected a scalar tensor")
        if not torch.isfinite(value):
            raise ValueError(f"the loss of batch {number} is {value.item()}; statistics of it would be worth nothing")
        if not value.requires_grad:
            raise ValueError(f"the loss of batch {number} has no gradient: it does not depend on the chosen layers")
        value.backward()
    ids = next((t for t in moved.values() if isinstance(t, Tensor) and not t.is_floating_point()), None)
    return 0 if ids is None else ids.numel()


def _model_loss(model: nn.Module, batch: Batch, number: int) -> Tensor:
    output = model(**batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None:
        have = ", ".join(map(repr, batch))
        missing = "" if "labels" in batch else " (no 'labels')"
        raise ValueError(f"batch {number} gives no loss{missing}: it has {have}; add labels, or give loss=")
    return value


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Every parameter's `.grad` as it was, whatever backward passes run in the block."""
    for name, p in model.named_parameters():
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name} has a hook that acts on its gradient (an optimizer within backward?), and calibration's "
                "backward would run it: calibrate before it is registered"
            )
    kept = [(p, p.grad) for p in model.parameters()]
    for p, _ in kept:
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(_drop_gradient) for p, _ in kept if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, gradient in kept:
            p.grad = gradient


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """The running means and variances of normalisation layers as they were, whatever forwards run in the block."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


@contextlib.contextmanager
def _hooks(collectors: list[_Collector]) -> Iterator[None]:
    handles = [c.target.linear.register_forward_hook(c.on_forward, with_kwargs=True) for c in collectors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Collector:
    """Adds what one layer's gradient shows to its statistics."""

    target: TargetLayer
    statistics: LayerStatistics
    scores: bool
    directions: tuple[Tensor, Tensor] | None = None  # U [N, q], V [K, q], from the first pass on

    def on_forward(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # the first pass of reentrant checkpointing
        replaced = None
        if not output.requires_grad:  # below the first trained parameter: the gradient comes this far all the same
            output = replaced = output.detach().requires_grad_().clone()  # no leaf: the next layer may work in place
        x = (*inputs, *named.values())[0].detach() if self.scores else None
        output.register_hook(lambda dy: self.add(dy.detach(), x))
        return replaced

    @torch.no_grad()
    @without_autocast
    def add(self, dy: Tensor, x: Tensor | None) -> None:
        into = self.statistics
        rows = dy.reshape(-1, dy.shape[-1])  # [M, N]
        into.importance += rows.float().square().sum(0).to(into.importance.device)
        into.tokens += len(rows)
        into.moment.add(rows @ self.target.weight().to(rows.dtype) if into.of_dx else rows)
        if into.scores is not None and x is not None:
            into.scores += self._scores(dy, x).to(into.scores.device)

    def _scores(self, dy: Tensor, x: Tensor) -> Tensor:
        """[3, q]: sums over the batch's samples of g, |g| and g²; a 2-D gradient is one sample."""
        if self.directions is None:
            assert self.statistics.scores is not None
            U, _, Vt = leading_triplets(self.target.weight(), self.statistics.scores.shape[1])
            self.directions = U, Vt.t()
        U, V = self.directions
        samples = dy.shape[0] if dy.dim() > 2 else 1
        along = (dy.float() @ U) * (x.float() @ V)  # [..., q]
        g = along.reshape(samples, -1, along.shape[-1]).sum(1)
        return torch.stack([g.sum(0), g.abs().sum(0), g.square().sum(0)])
