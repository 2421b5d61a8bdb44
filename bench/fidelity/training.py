"""One model, many policies: the text of each seed, the gradient of each policy, its training. `fidelity` decides what
is run."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import re
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import loge_kernels as loge
from loge_kernels.finetune import FinetuneOptions, data, models
from loge_kernels.finetune.progress import progress
from loge_kernels.finetune.training import PARTS, Diverged, Record, Trainer, heldout_loss, token_losses

from ..paper.model import llama
from ..policies import LONGEST, Policy

_LAYER = re.compile(r"\.(\d+)\.")
_TEXT_SEED = 20_250  # of the sequences that calibration takes away
_SIZES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}


class Workbench:
    """The model of `options` with LoRA, and the text.

    schedule: "constant" or "cosine", to zero; warmup: steps that it rises over before.   heldout, calibration:
    sequences that are never trained on.   gradient_steps: exact steps before the gradients are compared.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        schedule: str,
        warmup: int,
        heldout: int,
        calibration: int,
        gradient_steps: int,
        console: Console,
    ) -> None:
        self.options, self.console = options, console
        self._schedule, self._warmup, self._gradient_steps = schedule, warmup, gradient_steps
        self.device = torch.device(options.device)
        loaded = models.load(options, getattr(torch, options.dtype))
        self.name = loaded.name
        self.model = models.attach_lora(loaded.model, options).to(self.device)
        self._weights = self.model.state_dict()  # which a base in 8 bits takes out of the model
        wanted = options.steps * options.batch
        self.source, pool, self.heldout = data.read(options, loaded.tokenizer, LONGEST * wanted + calibration, heldout)
        data.check_enough(options, len(pool), calibration + options.batch, len(self.heldout), heldout)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(_TEXT_SEED))
        self.calibration, self.train = pool[order[:calibration]], pool[order[calibration:]]
        self.calibration_seconds: dict[str, float] = {}
        self._statistics: dict[str, Any] = {}
        self._reference: tuple[int, dict[str, Tensor], dict[str, Tensor]] | None = None

    def sizes(self) -> dict[str, Any] | None:
        """The model's, for `on_paper.llama`; None where its config does not name them as a LLaMA's does."""
        config = self.model.config
        sizes: dict[str, Any] = {name: getattr(config, theirs, None) for name, theirs in _SIZES.items()}
        with contextlib.suppress(ValueError):
            llama(**sizes)
            return sizes
        return None

    def fingerprint(self) -> str:
        """SHA-256 of all text."""
        digest = hashlib.sha256()
        for tensor in (self.train, self.heldout, self.calibration):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def corpus(self, seed: int, steps: int = 0) -> data.Corpus:
        """The seed's own choice of the training text, in its own order; with more `steps` than the others take, it
        goes on where theirs ends."""
        generator = torch.Generator().manual_seed(seed)
        steps = max(self.options.steps, self._gradient_steps, steps)
        order = data.shuffled(len(self.train), steps * self.options.batch, generator)
        return data.Corpus(self.source, self.train, self.heldout, order)

    def evaluate(self, corpus: data.Corpus) -> float:
        """The held-out loss of the model as it is."""
        loss = heldout_loss(self.model, corpus, self.options.batch, self.device, lambda count: True)
        assert loss is not None
        return loss

    def before(self) -> float:
        """The held-out loss before training; adapters start as zero, so it is the same for every seed."""
        models.start_again(self.model, self.options.seed)
        return self.evaluate(self.corpus(self.options.seed))

    def run(self, policies: Sequence[Policy], seed: int, checkpoints: Collection[int]) -> list[dict[str, Any]]:
        """Train with each of `policies` from the seed's start, held-out loss after the steps in `checkpoints` and the
        last one; then compare its gradient with the exact one. Rows as `fidelity` keeps them.

        Several policies take a step each in turn, so that whatever else the machine does slows all of them alike and
        their seconds compare.
        """
        self._exact_gradient(self.corpus(seed), seed)
        benches = [self, *(self._another() for _ in policies[1:])]
        runs = [bench._run(policy, seed, checkpoints) for bench, policy in zip(benches, policies, strict=True)]
        rows: dict[int, dict[str, Any]] = {}
        turn = range(len(runs))
        try:
            while len(rows) < len(runs):
                for index in turn:
                    if index not in rows:
                        try:
                            next(runs[index])
                        except StopIteration as end:
                            rows[index] = end.value | {"beside": [policy.text for policy in policies]}
                turn = turn[::-1]  # no policy is always the one after the same other
        finally:
            for run in runs:
                run.close()
        return [rows[index] for index in range(len(runs))]

    def _another(self) -> Workbench:
        """The same with a model of its own, which shares the frozen weights."""
        frozen = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, dict(frozen))
        other.console = Console(quiet=True, force_terminal=False)  # one bar is enough
        return other

    def _run(self, policy: Policy, seed: int, checkpoints: Collection[int]) -> Generator[None, None, dict[str, Any]]:
        """Yields before every step, returns the row."""
        corpus = self.corpus(seed, policy.steps(self.options.steps))
        reference = self._exact_gradient(corpus, seed)
        models.start_again(self.model, seed)
        row: dict[str, Any] = {"policy": policy.text, "seed": seed, "status": "ok", "note": ""}
        row |= self._apply(policy, seed)
        try:
            row |= yield from self._train(policy, corpus, seed, checkpoints)
            learnt = {name: p.detach().clone() for name, p in self._trained().items()}
            row["gradient"] = self._compare(corpus, *reference)
        finally:
            loge.remove(self.model, weights=self._weights)
        if policy.arguments.get("base_dtype") is not None and row["status"] == "ok":
            self._take(learnt)
            row["heldout_unrounded"] = self.evaluate(corpus)
        return row

    def _apply(self, policy: Policy, seed: int) -> dict[str, Any]:
        calibration = None if policy.calibration is None else self._calibrated(policy.calibration)
        started = time.perf_counter()
        torch.manual_seed(seed)  # of random directions
        report = policy.apply(self.model, calibration)
        seconds = time.perf_counter() - started
        if report is None:
            return {"summary": "", "apply_seconds": 0.0}
        self._say(f"{policy.text}: {report.summary()} ({seconds:.0f} s)")
        return {"summary": report.summary(), "apply_seconds": round(seconds, 2)}

    def _calibrated(self, kind: str) -> Any:
        """Statistics of the model at its start, gathered once."""
        if kind not in self._statistics:
            self._say(f"calibrating ({kind}) on {len(self.calibration)} sequences ...")
            started = time.perf_counter()
            self.model.train()
            self._statistics[kind] = loge.calibrate(self.model, list(self._batches()), scores=kind == "scores")
            self.calibration_seconds[kind] = round(time.perf_counter() - started, 2)
            self._say(f"calibrated in {self.calibration_seconds[kind]:.0f} s")
        return self._statistics[kind]

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for sequences in self.calibration[:, :-1].split(self.options.batch):
            tokens = sequences.to(self.device)
            yield {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}

    def _train(
        self, policy: Policy, corpus: data.Corpus, seed: int, checkpoints: Collection[int]
    ) -> Generator[None, None, dict[str, Any]]:
        steps = policy.steps(self.options.steps)
        options = replace(self.options, steps=steps, seed=seed)
        record = Record()
        trainer = Trainer(self.model, corpus, options, record, lambda step: self._rate(step, steps))
        row: dict[str, Any] = {}
        curve, processor = [], []
        with progress(self.console, f"{policy.text}, seed {seed}", steps, options.batch * options.seq) as advance:
            while not trainer.done:
                yield
                before = time.process_time()
                try:
                    trainer.step()
                except Diverged as error:
                    row |= {"status": "diverged", "note": str(error)}
                    break
                processor.append(round(time.process_time() - before, 5))
                done = len(record.losses)
                if done in checkpoints or done == steps:
                    loss = self.evaluate(corpus)
                    if not math.isfinite(loss):
                        row |= {"status": "diverged", "note": f"the held-out loss became {loss} at step {done}"}
                        break
                    times = {"seconds": round(sum(record.step_seconds), 3), "cpu_seconds": round(sum(processor), 3)}
                    curve.append({"step": done, **times, "heldout": loss})
                advance(f"loss {record.losses[-1]:.3f}", 1)
        # CPU: seconds of all cores; on a machine with other work they say more than the clock.
        return row | {"steps": steps, "curve": curve, **measured(record), "cpu_seconds": processor}

    def _rate(self, step: int, steps: int) -> float:
        """The share of the learning rate; with fewer steps the whole schedule is as much shorter."""
        warmup = self._warmup * steps / self.options.steps
        if step + 1 < warmup:
            return (step + 1) / warmup
        if self._schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * (step - min(step, warmup)) / max(1.0, steps - warmup)))

    def _exact_gradient(self, corpus: data.Corpus, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adapters after a few exact steps at the whole learning rate, and the exact gradient there."""
        if self._reference is None or self._reference[0] != seed:
            models.start_again(self.model, seed)
            options = replace(self.options, steps=self._gradient_steps, seed=seed)
            trainer = Trainer(self.model, corpus, options, Record())
            what = f"exact steps before the gradient, seed {seed}"
            with progress(self.console, what, options.steps, options.batch * options.seq) as advance:
                while not trainer.done:
                    trainer.step()
                    advance("", 1)
            start = {name: p.detach().clone() for name, p in self._trained().items()}
            self._reference = seed, start, self._gradient(corpus)
        return self._reference[1:]

    def _compare(self, corpus: data.Corpus, start: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
        """The gradient of a low-rank step against the exact one, from adapters `start`; no step is exact afterwards."""
        self._take(start)
        for layer in self.model.modules():
            if isinstance(layer, loge.LoGELinear):
                layer.exact_every = None
        return compare(self._gradient(corpus), exact)

    @torch.no_grad()
    def _take(self, adapters: dict[str, Tensor]) -> None:
        for name, p in self._trained().items():
            p.copy_(adapters[name])

    def _gradient(self, corpus: data.Corpus) -> dict[str, Tensor]:
        """The adapters' gradient on the first held-out sequences, a batch of them."""
        self.model.train()
        trained = self._trained()
        loss = token_losses(self.model, corpus.heldout[: self.options.batch].to(self.device)).mean()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return dict(zip(trained, gradients, strict=True))

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def measured(record: Record) -> dict[str, Any]:
    """Losses and seconds of every step."""
    values = {f"{part}_seconds": [round(each, 5) for each in getattr(record, part)] for part in PARTS}
    return {"losses": [round(loss, 5) for loss in record.losses], **values}


def compare(gradient: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """Cosine and norm ratio of a gradient by parameter name with the exact one: whole, of A and B apart, and the same
    for every layer index that the names hold."""
    layers: dict[str, list[str]] = {}
    for name in exact:
        found = _LAYER.search(name)
        if found:
            layers.setdefault(found[1], []).append(name)
    return _parts(gradient, exact, list(exact)) | {
        "layers": {index: _parts(gradient, exact, names) for index, names in layers.items()}
    }


def _parts(gradient: dict[str, Tensor], exact: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    matrices = {matrix: [name for name in names if f"lora_{matrix}" in name] for matrix in ("A", "B")}
    return {part: _against(gradient, exact, chosen) for part, chosen in {"all": names, **matrices}.items() if chosen}


def _against(gradient: dict[str, Tensor], exact: dict[str, Tensor], names: list[str]) -> dict[str, float]:
    # What a policy has frozen has no gradient.
    pairs = [(gradient.get(name, torch.zeros_like(exact[name])), exact[name]) for name in names]
    ours, theirs = (torch.cat([each.flatten().double() for each in side]) for side in zip(*pairs, strict=True))
    norms = ours.norm().item(), theirs.norm().item()
    product = norms[0] * norms[1]
    cosine = (ours @ theirs).item() / product if product > 0.0 else 0.0
    ratio = norms[0] / norms[1] if norms[1] > 0.0 else 0.0
    return {"cosine": round(cosine, 6), "norm_ratio": round(ratio, 6)}
