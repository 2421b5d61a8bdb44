"""The run: load, measure, train with both methods, hand over; interrupted at any point, leave what can be resumed."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import model as loge
from ..eight_bit import EightBitWeight
from ..factors import Factors
from ..schedule import schedule_of
from . import data, files, models, results, state
from .memory import PeakMemory
from .options import FinetuneError, FinetuneOptions, Interrupted, choose_device, choose_dtype, flag
from .progress import progress
from .training import Record, Stop, Trainer, heldout_loss, stop_on_interrupt

METHODS = ("lora", "loge")


def run(options: FinetuneOptions, console: Console | None = None) -> dict[str, Any]:
    """Train PEFT's LoRA and LoGE from the same start on the same batches, and compare them.

    Prints progress and one table to `console` (standard output by default), writes `metrics.json`, `curves.png` and
    both adapters (`lora/`, `loge/`) under `options.out`, and returns what `metrics.json` holds.

    Raises:
        FinetuneError: one line that names the argument, the value and what would work.
        Interrupted: Ctrl-C; what was done is saved, and the message says how to resume.
    """
    options.check()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    out = Path(options.out)
    files.prepare(out)
    if options.json is not None:
        files.prepare(Path(options.json).absolute().parent, "--json")
    job = _Job(options, device, dtype, console or Console())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return job.run()
    except KeyboardInterrupt:
        raise Interrupted(job.interrupted()) from None


class _Job:
    def __init__(self, options: FinetuneOptions, device: torch.device, dtype: torch.dtype, console: Console) -> None:
        self.given = options
        self.options = dataclasses.replace(
            options, device=str(device), dtype=str(dtype).removeprefix("torch."), **options.policy()
        )
        self.device, self.dtype, self.console = device, dtype, console
        self.out = Path(options.out)
        self.saved: dict[str, state.Saved] = {}
        self.stopped_at = ""

    def run(self) -> dict[str, Any]:
        if self.options.resume:
            self.saved = state.load(self.out, METHODS)
            self.options.check_same_run(next(iter(self.saved.values())).shared["arguments"])
        elif state.exists(self.out):
            self._say(f"{self.out} holds an interrupted run; starting anew (--resume would go on with it)")
        self._load()
        self._shared()
        self.memory = PeakMemory(self.device)
        for method in METHODS:
            self._train(method)
        return self._hand_over()

    def _load(self) -> None:
        start = time.perf_counter()
        self._say(
            "Loading the model (the first time takes a minute) ..."
            if self.options.model is None
            else f"Loading {self.options.model} ..."
        )
        loaded = models.load(self.options, self.dtype)
        self.name = loaded.name
        self.model = models.attach_lora(loaded.model, self.options).to(self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.parameters = sum(p.numel() for p in self.model.parameters()) - self.trainable
        # Two adapters, and for each the weights, both moments of Adam and the first gradient; LoGE's correction.
        files.need_space(self.out, 11 * 4 * self.trainable + 2**20)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.corpus = data.load(self.options, loaded.tokenizer)
        where = str(self.device)
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        self._say(
            f"Model: {self.name}, {self.parameters / 1e6:.3g} M parameters in {self.options.dtype} on {where}; "
            f"LoRA rank {self.options.lora_rank}, {self.trainable / 1e6:.3g} M trained "
            f"({time.perf_counter() - start:.0f} s)"
        )
        train, heldout = len(self.corpus.train), len(self.corpus.heldout)
        self._say(
            f"Text:  {self.corpus.source}; {train} training and {heldout} held-out sequences of {self.options.seq} "
            "tokens"
        )

    def _shared(self) -> None:
        """What both methods and a resumed run have in common, the held-out loss before training among it."""
        text = self.corpus.fingerprint()
        if self.saved:
            self.shared = next(iter(self.saved.values())).shared
            if self.shared["text_sha256"] != text:
                raise FinetuneError(
                    "--resume: the text has changed since the run was interrupted; start anew without --resume"
                )
            return
        with stop_on_interrupt() as stop:
            before = self._evaluate("Held-out before", stop)
        self.shared = {"arguments": self.options.arguments(), "text_sha256": text, "heldout_before": before}

    def _train(self, method: str) -> None:
        """One method, from its saved state if there is one."""
        saved = self.saved.get(method)
        if saved is not None and saved.record.heldout_after is not None:
            self._say(f"{results.TITLES[method]}: done before the interruption")
            # A full disk may have stopped the run between the state and the adapter.
            self._set_adapter({name: saved.tensors[f"adapter.{name}"] for name in self.start})
            self._write_adapter(method)
            return
        record = Record() if saved is None else saved.record
        self._set_adapter(self.start)
        if method == "loge":
            record.report = self._apply()
        try:
            trainer = Trainer(self.model, self.corpus, self.options, record)
            if saved is not None:
                trainer.restore(saved.tensors)
                self._say(f"{results.TITLES[method]}: going on after step {len(record.losses)}")
            with stop_on_interrupt() as stop:
                self._steps(method, trainer, stop)
                record.heldout_after = self._evaluate(f"{results.TITLES[method]} held-out", stop, trainer, method)
                self._keep(method, trainer)
            if stop.requested:
                raise KeyboardInterrupt
        finally:
            loge.remove(self.model)

    def _steps(self, method: str, trainer: Trainer, stop: Stop) -> None:
        record, options = trainer.record, self.options
        number = METHODS.index(method) + 1
        what = f"{number}/{len(METHODS)} {results.TITLES[method]}"
        size = options.batch * options.seq
        with self.memory, progress(self.console, what, options.steps, size, len(record.losses)) as advance:
            while not trainer.done:
                trainer.step()
                advance(f"loss {record.losses[-1]:.3f}", 1)
                if stop.requested:
                    break
        if self.memory.bytes is not None:
            record.peak_memory = max(self.memory.bytes, record.peak_memory or 0)
        record.kept_bytes = max(self._kept_bytes(), record.kept_bytes)
        if stop.requested:
            self._stop(method, trainer)

    def _evaluate(self, what: str, stop: Stop, trainer: Trainer | None = None, method: str | None = None) -> float:
        """The held-out loss. Interrupted, what `trainer` has reached is saved."""
        with progress(self.console, what, len(self.corpus.heldout), self.options.seq, passing=True) as advance:

            def heard(count: int) -> bool:
                advance("", count)
                return not stop.requested

            loss = heldout_loss(self.model, self.corpus, self.options.batch, self.device, heard)
        if loss is None:
            if trainer is None or method is None:
                raise KeyboardInterrupt
            self._stop(method, trainer)
        assert loss is not None
        self._say(f"{what}: loss {loss:.4f}")
        return loss

    def _stop(self, method: str, trainer: Trainer) -> None:
        self._keep(method, trainer)
        self.stopped_at = f" after step {len(trainer.record.losses)} of {self.options.steps} of {method}"
        raise KeyboardInterrupt

    def _keep(self, method: str, trainer: Trainer) -> None:
        if not self.saved:
            state.clear(self.out)  # of an older run that this one replaces
        tensors = {name: tensor.cpu().clone() for name, tensor in trainer.tensors().items()}
        self.saved[method] = state.Saved(trainer.record, self.shared, tensors)
        state.save(self.out, method, self.saved[method])
        self._write_adapter(method)

    def _write_adapter(self, method: str) -> None:
        files.write_directory(self.out / method, lambda folder: models.save_adapter(self.model, folder))

    @torch.no_grad()
    def _set_adapter(self, values: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            if name in values:
                p.copy_(values[name])

    def _apply(self) -> dict[str, Any]:
        policy = self.options.policy()
        self._say("Preparing the backward pass (factors are kept for the next run) ...")
        start = time.perf_counter()
        torch.manual_seed(self.options.seed)  # of the "random" subspace, the same after a resume
        try:
            report = loge.apply(self.model, **policy)
        except (TypeError, ValueError) as error:
            given = " ".join(f"{flag(name)} {value}" for name, value in policy.items())
            raise FinetuneError(f"{given}: {error}") from error
        self._say(f"LoGE:  {report.summary()} ({time.perf_counter() - start:.0f} s)")
        return json.loads(json.dumps(report.to_dict()))  # tuples as lists, the same after a resume

    def _kept_bytes(self) -> int:
        """What the low-rank backward keeps beside the model."""
        schedule = schedule_of(self.model)
        kept = [] if schedule is None else list(schedule.state_dict().values())
        for module in self.model.modules():
            if isinstance(module, Factors):
                kept += [module.left, module.right]
            elif isinstance(module, EightBitWeight) and module.tensor is not None and module.scale is not None:
                kept += [module.tensor, module.scale]
        return sum(tensor.nbytes for tensor in kept)

    def _hand_over(self) -> dict[str, Any]:
        exact = self.saved["lora"].tensors["first_gradient"]
        methods = {
            method: results.method_metrics(
                saved.record, self.shared["heldout_before"], results.cosine(saved.tensors["first_gradient"], exact)
            )
            for method, saved in self.saved.items()
        }
        methods["loge"]["recovered"] = results.recovered(methods)
        metrics: dict[str, Any] = {
            "methods": methods,
            "model": {"name": self.name, "parameters": self.parameters, "trainable": self.trainable},
            "data": {
                "source": self.corpus.source,
                "train_sequences": len(self.corpus.train),
                "heldout_sequences": len(self.corpus.heldout),
                "sha256": self.shared["text_sha256"],
            },
            "peak_memory_measures": self.memory.measures,
            "arguments": self.options.arguments(),
            "versions": results.versions(),
            "threads": torch.get_num_threads(),
        }
        results.curves(self.out / "curves.png", metrics)
        files.write_json(self.out / "metrics.json", metrics)
        if self.options.json is not None:
            files.write_json(Path(self.options.json), metrics)
        state.clear(self.out)
        self.console.print(results.table(metrics))
        self._say(f"Peak memory: {self.memory.measures}")
        self._say(f"Written under {self.out}: metrics.json, curves.png and the adapters lora/ and loge/")
        return metrics

    def interrupted(self) -> str:
        if not self.saved:
            return "Interrupted before any training; nothing to resume"
        return (
            f"Interrupted{self.stopped_at}; saved in {self.out / 'state'}. To go on:\n  {self.given.resume_command()}"
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
