"""One method beside the others: a model of its own over shared weights, and its training step by step."""

from __future__ import annotations

import dataclasses
import json
import time

import torch
from torch import Tensor, nn

from ..conversion import apply as loge
from ..conversion.calibrate import calibrate
from ..factors.factors import PROJECTIONS
from ..freezing.freeze import freeze
from . import memory, methods
from .data import Corpus
from .methods import Method
from .options import FinetuneError, FinetuneOptions, flag
from .state import Saved
from .training import Record, Trainer

SAMPLE = 8  # training sequences, the first ones, that calibration and --freeze auto look at
_MEASURED = 3  # steps whose peak memory is taken: measuring takes time, and the later ones are alike
MEASURES = f"growth in a step, of the first {_MEASURED}, and what is kept between steps; without the frozen weights"


class Run:
    """`method` on a model of its own over the weights of `base`: `prepare`, then `step` until `trainer.done`.

    `record` says what is known of the training so far, `trainer` exists from `prepare` on.
    """

    trainer: Trainer

    def __init__(self, base: nn.Module, method: Method, options: FinetuneOptions, corpus: Corpus) -> None:
        self.method, self.corpus = method, corpus
        self.options = dataclasses.replace(options, lr=method.lr or options.lr)
        self.device = torch.device(options.device)
        self.model = methods.attach(base, method, options).to(self.device)
        self.record = Record()

    def prepare(self, boundary: int | None, saved: Saved | None) -> str:
        """Give the model its backward, frozen below layer `boundary`, and go on from `saved`; what was done, in a line
        or "" for nothing."""
        if saved is not None:
            self.record = saved.record
        said = ""
        if self.method.applied:
            said = self._apply(boundary)
        elif boundary is not None:
            try:
                said = str(freeze(self.model, boundary))
            except (TypeError, ValueError) as error:
                raise FinetuneError(f"--freeze {self.options.freeze}: {error}") from error
        self.record.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.record.frozen_bytes = methods.frozen_bytes(self.model)
        made = methods.optimizer(self.model, self.method, self.options)
        self.trainer = Trainer(self.model, self.corpus, self.options, self.record, optimizer=made)
        if saved is not None:
            self.trainer.restore(saved.tensors)
        return said

    def step(self) -> None:
        """One step. The first few measure memory, outside of what is timed."""
        if len(self.record.losses) >= _MEASURED:
            self.trainer.step()
            return
        held = sum(tensor.nbytes for name, tensor in self.trainer.tensors().items() if name != "first_gradient")
        held += methods.kept_bytes(self.model, self.trainer.optimizer)
        growth = memory.growth(self.device, self.trainer.step)
        if growth is not None:
            self.record.peak_memory = max(held + growth, self.record.peak_memory or 0)
        self.record.kept_bytes = methods.kept_bytes(self.model, self.trainer.optimizer)

    def _apply(self, boundary: int | None) -> str:
        policy = self.options.policy(self.method.name)
        given = dict(policy)
        if boundary is not None:
            given["freeze"], policy["freeze_below"] = self.options.freeze, boundary
        start = time.perf_counter()
        said = ""
        try:
            if policy.get("subspace") in PROJECTIONS:
                self.model.train()
                scores = policy["subspace"] == "salience"
                policy["calibration"] = calibrate(self.model, sample(self.corpus, self.options), scores=scores)
                seconds = time.perf_counter() - start
                said = f"calibrated on the first {SAMPLE} training sequences in {seconds:.0f} s; "
            report = loge.apply(self.model, **policy)
        except (TypeError, ValueError) as error:
            words = " ".join(f"{flag(name)} {value}" for name, value in given.items() if value is not None)
            raise FinetuneError(f"{words}: {error}") from error
        self.record.prepare_seconds = time.perf_counter() - start
        self.record.report = json.loads(json.dumps(report.to_dict()))  # tuples as lists, the same after a resume
        return f"{said}{report.summary()} ({self.record.prepare_seconds:.0f} s)"


def sample(corpus: Corpus, options: FinetuneOptions) -> list[dict[str, Tensor]]:
    """The first training sequences in batches, as a model takes them."""
    tokens = corpus.train[corpus.order[:SAMPLE], :-1]
    return [{"input_ids": part, "labels": part} for part in tokens.split(options.batch)]
