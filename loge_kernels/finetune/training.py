"""The training loop, timed in its three parts, and the held-out loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import LoGELinear
from .data import Corpus
from .options import FinetuneError, FinetuneOptions

PARTS = ("forward", "backward", "optimizer")


class Diverged(FinetuneError):
    """The training loss is no longer a number."""


def typical(values: Sequence[float], exact: Sequence[bool]) -> float:
    """Of one number a step the median of the exact steps and that of the others, weighted by their numbers."""
    kinds = [[value for value, own in zip(values, exact, strict=True) if own is kind] for kind in (True, False)]
    return sum(len(kind) * statistics.median(kind) for kind in kinds if kind) / len(values)


@dataclass
class Record:
    """What is known of one method's run so far: one entry a step in the lists, times in seconds."""

    losses: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)  # whether the step's backward was exact in every layer
    peak_memory: int | None = None
    heldout_after: float | None = None
    report: dict[str, Any] | None = None  # what `apply` did
    prepare_seconds: float = 0.0  # calibration and factors
    trainable: int = 0  # numbers that train
    kept_bytes: int = 0  # factors, 8-bit copies of weights, candidates
    frozen_bytes: int = 0  # of frozen weights

    @property
    def step_seconds(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]

    def typical(self, part: str) -> float:
        """Seconds that `part`, one of PARTS or "step", takes."""
        return typical(self.step_seconds if part == "step" else getattr(self, part), self.exact)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Trainer:
    """Training of what trains in `model`: `step()` until `done`, from the step that `record` has reached.

    rate: the share of the learning rate at a step, counted from 0; None: always all of it.   optimizer: None is AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        options: FinetuneOptions,
        record: Record,
        rate: Callable[[int], float] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.record = record
        # Of the first step: all trained parameters, in order, on the CPU in float32.
        self.first_gradient: Tensor | None = None
        self._low_rank = [m for m in model.modules() if isinstance(m, LoGELinear) and m.factors is not None]
        self._model, self._corpus, self._options, self._rate = model, corpus, options, rate
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._device = next(iter(self._parameters.values())).device
        self.optimizer = optimizer or torch.optim.AdamW(self._parameters.values(), lr=options.lr, weight_decay=0.0)

    @property
    def done(self) -> bool:
        return len(self.record.losses) >= self._options.steps

    def step(self) -> None:
        """Train on the next batch. Only what training needs is timed."""
        number = len(self.record.losses)
        batch = self._corpus.batch(number, self._options.batch).to(self._device)
        self._model.train()
        if self._rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._options.lr * self._rate(number)
        # A model with dropout of its own draws the same numbers in all methods, and again after a resume.
        torch.manual_seed(self._options.seed + number)
        times = [self._now()]
        loss = token_losses(self._model, batch).mean()
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        if number == 0:
            gradients = [p.grad.flatten().float() for p in self._parameters.values() if p.grad is not None]
            self.first_gradient = torch.cat(gradients).cpu()
        times.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self._now())
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"--lr {self._options.lr}: the training loss became {value} at step {number + 1}; try a smaller --lr"
            )
        self.record.losses.append(value)
        self.record.forward.append(times[1] - times[0])
        self.record.backward.append(times[2] - times[1])
        self.record.optimizer.append(times[4] - times[3])
        self.record.exact.append(all(m.exact_every is not None and m.exact_every.exact for m in self._low_rank))

    def tensors(self) -> dict[str, Tensor]:
        """The adapter, the optimizer's state and the first gradient, by name."""
        tensors = {f"adapter.{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        if self.first_gradient is not None:
            tensors["first_gradient"] = self.first_gradient
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave."""
        self.first_gradient = tensors.get("first_gradient")
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(tensors[f"adapter.{name}"])
                kept = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                # AdamW keeps its step count on the CPU and its moments beside the parameter.
                self.optimizer.state[p] = {
                    key: value.clone() if key == "step" else value.to(p, copy=True)
                    for key, value in kept.items()
                    if value is not None
                }

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def token_losses(model: nn.Module, sequences: Tensor) -> Tensor:
    """Cross-entropy of every predicted token of `sequences` [n, seq + 1], flat, in float32."""
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def heldout_loss(
    model: nn.Module, corpus: Corpus, batch: int, device: torch.device, advance: Callable[[int], bool]
) -> float | None:
    """Mean loss over the held-out tokens. `advance(n)` hears of each n sequences done; None if it answers False."""
    model.eval()
    total, count = 0.0, 0
    for sequences in corpus.heldout.split(batch):
        losses = token_losses(model, sequences.to(device))
        total, count = total + losses.double().sum().item(), count + losses.numel()
        if not advance(len(sequences)):
            return None
    return total / count


class Stop:
    """Whether Ctrl-C was pressed."""

    requested = False


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Turn the first Ctrl-C into a request, so that the step under way ends; the second acts as usual."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    previous = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def request(number: int, frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
