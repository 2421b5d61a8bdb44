"""The run: load, measure, train all methods in turn, hand over; interrupted at any point, leave what can be resumed."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..freezing.plan_freezing import plan_freezing
from ..machine import choose_dtype
from . import data, files, methods, models, results, state
from .options import FinetuneError, FinetuneOptions, Interrupted
from .progress import progress
from .runs import MEASURES, Run, sample
from .training import Stop, heldout_loss, stop_on_interrupt

KEEP_SECONDS = 60.0  # of training between two states on disk: what a killed run loses at most
WIDTH = 100  # columns of the table where there is no terminal


def run(options: FinetuneOptions, console: Console | None = None) -> dict[str, Any]:
    """Train PEFT's LoRA and the methods of `options` on the same batches, and compare them.

    All take a step each in turn, so that whatever else the machine does slows all of them alike. Prints progress and
    one table to `console` (standard output by default), writes `metrics.json`, `curves.png` and the adapters, a folder
    a method, under `options.out`, and returns what `metrics.json` holds.

    Raises:
        FinetuneError: one line that names the argument, the value and what would work.
        Interrupted: Ctrl-C; what was done is saved, and the message says how to resume.
    """
    options.check()
    device = options.torch_device
    dtype = choose_dtype(options.dtype, device)
    out = Path(options.out)
    files.prepare(out)
    if options.json is not None:
        files.prepare(Path(options.json).absolute().parent, "--json")
    job = _Job(options, device, dtype, console or Console(width=None if sys.stdout.isatty() else WIDTH))
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return job.run()
    except KeyboardInterrupt:
        raise Interrupted(job.interrupted()) from None


class _Job:
    def __init__(self, options: FinetuneOptions, device: torch.device, dtype: torch.dtype, console: Console) -> None:
        self.given = options
        self.options = dataclasses.replace(options, device=str(device), dtype=str(dtype).removeprefix("torch."))
        self.device, self.dtype, self.console = device, dtype, console
        self.methods = methods.chosen(self.options)
        self.out = Path(options.out)
        self.saved: dict[str, state.Saved] = {}
        self.kept = False
        self.runs: list[Run] = []

    def run(self) -> dict[str, Any]:
        if self.options.resume:
            self.saved = state.load(self.out, tuple(method.key for method in self.methods if method.resumable))
            self.options.check_same_run(next(iter(self.saved.values())).shared["arguments"])
        elif state.exists(self.out):
            self._say(f"{self.out} holds an interrupted run; starting anew (--resume would go on with it)")
        self._load()
        self._shared()
        for run in self.runs:
            self._prepare(run)
        with stop_on_interrupt() as stop:
            self._train(stop)
            self._keep()
            for run in self.runs:
                self._finish(run, stop)
        return self._hand_over()

    def _load(self) -> None:
        """Model and text, and the adapters of every method."""
        start = time.perf_counter()
        self._say(
            "Loading the model (the first time takes a minute) ..."
            if self.options.model is None
            else f"Loading {self.options.model} ..."
        )
        loaded = models.load(self.options, self.dtype)
        base = loaded.model.to(self.device)
        self.name = loaded.name
        self.parameters = sum(p.numel() for p in base.parameters())
        self.corpus = data.load(self.options, loaded.tokenizer)
        self.runs = [Run(base, method, self.options, self.corpus) for method in self.methods]
        trainable = sum(p.numel() for p in self.runs[0].model.parameters() if p.requires_grad)
        # Of each method the weights, both moments of Adam and the first gradient, three times: a state is written
        # beside the last one and the one before. And the adapter.
        need = len(self.runs) * 13 * 4 * trainable + 2**20
        if not all(method.resumable for method in self.methods):
            need += 2 * 8 * self.parameters  # SwitchLoRA's frozen weights change, and are written with the rest
        files.need_space(self.out, need)
        where = str(self.device)
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        self._say(
            f"Model: {self.name}, {self.parameters / 1e6:.3g} M parameters in {self.options.dtype} on {where}; "
            f"LoRA rank {self.options.lora_rank}, {trainable / 1e6:.3g} M trained "
            f"({time.perf_counter() - start:.0f} s)"
        )
        train, heldout = len(self.corpus.train), len(self.corpus.heldout)
        self._say(
            f"Text:  {self.corpus.source}; {train} training and {heldout} held-out sequences of {self.options.seq} "
            "tokens"
        )

    def _shared(self) -> None:
        """What all methods and a resumed run have in common, the held-out loss before training among it."""
        text = self.corpus.fingerprint()
        if self.saved:
            self.shared = next(iter(self.saved.values())).shared
            if self.shared["text_sha256"] != text:
                raise FinetuneError(
                    "--resume: the text has changed since the run was interrupted; start anew without --resume"
                )
            return
        with stop_on_interrupt() as stop:
            before = self._evaluate(self.runs[0], "Held-out before", stop)
        self.shared = {"arguments": self.options.arguments(), "text_sha256": text, "heldout_before": before}
        if self.options.freeze is not None:
            self.shared["freezing"] = self._freezing()

    def _freezing(self) -> dict[str, Any]:
        """The boundary of --freeze, and the plan that it is from."""
        if self.options.freeze != "auto":
            return {"boundary": self.options.freeze}
        try:
            plan = plan_freezing(self.runs[0].model, sample(self.corpus, self.options))
        except (TypeError, ValueError) as error:
            raise FinetuneError(f"--freeze auto: {error}") from error
        self._say(f"Freezing: {plan.summary()}")
        # As JSON gives it back, the same after a resume.
        return dict(json.loads(json.dumps(plan.to_dict())))

    def _prepare(self, run: Run) -> None:
        """A method's backward, and what it goes on from."""
        saved = self.saved.get(run.method.key)
        said = run.prepare(self.shared["freezing"]["boundary"] if run.method.frozen else None, saved)
        if said:
            self._say(f"{run.method.title}: {said}")
        if saved is not None:
            self._say(f"{run.method.title}: going on after step {len(saved.record.losses)}")

    def _train(self, stop: Stop) -> None:
        """A step of every method in turn, to the end or to Ctrl-C; a state on disk now and then."""
        options, turn = self.options, list(self.runs)
        done = min(len(run.record.losses) for run in turn)
        tokens = options.batch * options.seq * len(turn)
        with progress(self.console, "Training", options.steps, tokens, done) as advance:
            kept = time.monotonic()
            while left := [run for run in turn if not run.trainer.done]:
                for run in left:
                    run.step()
                    if stop.requested:
                        return
                turn.reverse()  # no method is always the one after the same other
                losses = ", ".join(f"{run.record.losses[-1]:.3f}" for run in self.runs)
                steps = min(len(run.record.losses) for run in turn)
                advance(f"loss {losses}", steps - done)
                done = steps
                if time.monotonic() - kept >= KEEP_SECONDS:
                    self._keep()
                    kept = time.monotonic()

    def _finish(self, run: Run, stop: Stop) -> None:
        """The held-out loss and the adapter."""
        if stop.requested:
            raise KeyboardInterrupt
        if run.record.heldout_after is None:
            run.record.heldout_after = self._evaluate(run, f"{run.method.title} held-out", stop)
            self._keep(run)
        files.write_directory(self.out / run.method.key, lambda folder: models.save_adapter(run.model, folder))

    def _evaluate(self, run: Run, what: str, stop: Stop) -> float:
        """The held-out loss of a method's model."""
        with progress(self.console, what, len(self.corpus.heldout), self.options.seq, passing=True) as advance:

            def heard(count: int) -> bool:
                advance("", count)
                return not stop.requested

            loss = heldout_loss(run.model, self.corpus, self.options.batch, self.device, heard)
        if loss is None:
            raise KeyboardInterrupt
        self._say(f"{what}: loss {loss:.4f}")
        return loss

    def _keep(self, *runs: Run) -> None:
        """States of these methods on disk, or of all."""
        if not self.saved and not self.kept:
            state.clear(self.out)  # of an older run that this one replaces
        for run in runs or self.runs:
            if run.method.resumable:
                state.save(self.out, run.method.key, state.Saved(run.record, self.shared, run.trainer.tensors()))
                self.kept = True

    def _hand_over(self) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        exact = self.runs[0].trainer.first_gradient
        for run in self.runs:
            gradient = run.trainer.first_gradient if run.method.comparable else None
            own = results.method_metrics(run.record, self.shared["heldout_before"])
            own["first_gradient_cosine"] = None
            if gradient is not None and exact is not None:
                own["first_gradient_cosine"] = results.cosine(gradient, exact)
            if run.method.applied:
                own["policy"] = results.policy_text(self.options, run.method)
            found[run.method.key] = own
            own["recovered"] = results.recovered(own, next(iter(found.values())))
        metrics: dict[str, Any] = {
            "methods": found,
            "model": {"name": self.name, "parameters": self.parameters},
            "data": {
                "source": self.corpus.source,
                "train_sequences": len(self.corpus.train),
                "heldout_sequences": len(self.corpus.heldout),
                "sha256": self.shared["text_sha256"],
            },
            "freezing": self.shared.get("freezing"),
            "peak_memory_measures": MEASURES,
            "arguments": self.options.arguments(),
            "versions": results.versions(),
            "threads": torch.get_num_threads(),
        }
        results.curves(self.out / "curves.png", metrics, self.methods)
        files.write_json(self.out / "metrics.json", metrics)
        if self.options.json is not None:
            files.write_json(Path(self.options.json), metrics)
        state.clear(self.out)
        self.console.print(results.table(metrics, self.methods))
        self._say(f"Peak memory: {MEASURES}")
        if self.options.base_dtype is not None:
            sizes = [f"{own['frozen_bytes'] / 2**20:.0f} MiB in {key}" for key, own in found.items()]
            self._say(f"Frozen weights: {', '.join(sizes)}")
        folders = " and ".join(f"{method.key}/" for method in self.methods)
        self._say(f"Written under {self.out}: metrics.json, curves.png and the adapters {folders}")
        return metrics

    def interrupted(self) -> str:
        if not self.kept and not self.saved:
            return "Interrupted before any training; nothing to resume"
        at = ""
        if self.kept:
            steps = [f"{len(run.record.losses)} of {run.method.key}" for run in self.runs if run.method.resumable]
            again = "".join(f"; {run.method.key} will begin again" for run in self.runs if not run.method.resumable)
            at = f" at step {', '.join(steps)} (of {self.options.steps}){again}"
        return f"Interrupted{at}; saved in {self.out / 'state'}. To go on:\n  {self.given.resume_command()}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
