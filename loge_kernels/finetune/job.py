"""The run: load, measure, train with every method, hand over; interrupted at any point, leave what can be resumed."""

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
from ..freezing.freeze import freeze
from ..freezing.planning import plan_freezing
from ..schedule import schedule_of
from . import data, files, methods, models, results, state
from .memory import PeakMemory
from .methods import Method
from .options import LORA, FinetuneError, FinetuneOptions, Interrupted, choose_device, choose_dtype, flag
from .progress import progress
from .training import Record, Stop, Trainer, heldout_loss, stop_on_interrupt

_PLANNING = 8  # training sequences that --freeze auto looks at
KEEP_SECONDS = 60.0  # of training between two states on disk: what a killed run loses at most


def run(options: FinetuneOptions, console: Console | None = None) -> dict[str, Any]:
    """Train PEFT's exact LoRA and the methods of `options` on the same batches, and compare them.

    Prints progress and one table to `console` (standard output by default), writes `metrics.json`, `curves.png` and
    the adapters, a folder a method, under `options.out`, and returns what `metrics.json` holds.

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
        self.methods = methods.chosen(self.options)
        self.out = Path(options.out)
        self.saved: dict[str, state.Saved] = {}
        self.stopped_at = ""

    def run(self) -> dict[str, Any]:
        if self.options.resume:
            self.saved = state.load(self.out, tuple(method.key for method in self.methods))
            self.options.check_same_run(next(iter(self.saved.values())).shared["arguments"])
        elif state.exists(self.out):
            self._say(f"{self.out} holds an interrupted run; starting anew (--resume would go on with it)")
        self._load()
        self._shared()
        self.memory = PeakMemory(self.device)
        for method in self.methods:
            self._train(method)
        return self._hand_over()

    def _load(self) -> None:
        """Model and text, and the adapters of exact LoRA."""
        start = time.perf_counter()
        self._say(
            "Loading the model (the first time takes a minute) ..."
            if self.options.model is None
            else f"Loading {self.options.model} ..."
        )
        loaded = models.load(self.options, self.dtype)
        self.name = loaded.name
        self.parameters = sum(p.numel() for p in loaded.model.parameters())
        self._attach(loaded.model, methods.REFERENCE)
        trainable = sum(p.numel() for p in self.start.values())
        # Two adapters, and for each the weights, both moments of Adam and the first gradient; LoGE's correction. All of
        # it three times: a state is written beside the last one and the one before.
        need = 3 * 11 * 4 * trainable + 2**20
        if any(method.name == "switchlora" for method in self.methods):
            need += 3 * 8 * self.parameters  # its frozen weights change, and are saved with what was left of them
        files.need_space(self.out, need)
        self.corpus = data.load(self.options, loaded.tokenizer)
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

    def _attach(self, base: Any, method: Method) -> None:
        """The adapters of `method` on `base`, at their start."""
        try:
            self.model = methods.attach(base, method, self.options).to(self.device)
        except FinetuneError:
            raise
        except (TypeError, ValueError) as error:
            raise FinetuneError(f"--method {method.name}: {error}") from error
        self.adapters = method.adapters
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def _at_start(self, method: Method) -> None:
        """The model with the adapters of `method`, everything as before training."""
        if method.adapters != self.adapters:
            self.model = None  # one at a time is in memory
            # Not the one at hand without its adapters: some methods change the frozen weights, too.
            self._attach(models.load(self.options, self.dtype).model, method)
        self._set_adapter(self.start)

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
            before = self._evaluate("Held-out before", stop)
        self.shared = {"arguments": self.options.arguments(), "text_sha256": text, "heldout_before": before}
        if self.options.freeze is not None:
            self.shared["freezing"] = self._freezing()

    def _freezing(self) -> dict[str, Any]:
        """The boundary of --freeze, and the plan that it is from."""
        if self.options.freeze != "auto":
            return {"boundary": self.options.freeze}
        tokens = self.corpus.train[:_PLANNING, :-1]
        batches = [{"input_ids": part, "labels": part} for part in tokens.split(self.options.batch)]
        try:
            plan = plan_freezing(self.model, batches)
        except (TypeError, ValueError) as error:
            raise FinetuneError(f"--freeze auto: {error}") from error
        self._say(f"Freezing: {plan.summary()}")
        # As JSON gives it back, the same after a resume.
        return dict(json.loads(json.dumps(plan.to_dict())))

    def _train(self, method: Method) -> None:
        """One method, from its saved state if there is one."""
        saved = self.saved.get(method.key)
        if saved is not None and not method.resumable and not (self.out / method.key).is_dir():
            saved = None  # the disk was full between the state and the adapter
        if saved is not None and saved.record.heldout_after is not None:
            self._say(f"{method.title}: done before the interruption")
            if method.resumable:
                # A full disk may have stopped the run between the state and the adapter.
                self._at_start(method)
                self._set_adapter({name: saved.tensors.get(f"adapter.{name}", p) for name, p in self.start.items()})
                self._write_adapter(method)
            return
        record = Record() if saved is None else saved.record
        self._at_start(method)
        try:
            self._prepare(method, record)
            options = dataclasses.replace(self.options, lr=method.lr or self.options.lr)
            trainer = Trainer(
                self.model,
                self.corpus,
                options,
                record,
                optimizer=methods.optimizer(self.model, method, options),
                first_gradient=method.adapters == LORA and not method.frozen,
            )
            record.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            if saved is not None:
                trainer.restore(saved.tensors)
                self._say(f"{method.title}: going on after step {len(record.losses)}")
            with stop_on_interrupt() as stop:
                self._steps(method, trainer, stop)
                record.heldout_after = self._evaluate(f"{method.title} held-out", stop, trainer, method)
                self._keep(method, trainer)
            if stop.requested:
                raise KeyboardInterrupt
        finally:
            loge.remove(self.model)

    def _prepare(self, method: Method, record: Record) -> None:
        """What a method does to the model before its optimizer is made."""
        boundary = self.shared["freezing"]["boundary"] if method.frozen else None
        if method.name == "loge":
            record.report = self._apply(boundary)
        elif boundary is not None:
            try:
                self._say(f"{method.title}: {freeze(self.model, boundary)}")
            except (TypeError, ValueError) as error:
                raise FinetuneError(f"--freeze {self.options.freeze}: {error}") from error

    def _steps(self, method: Method, trainer: Trainer, stop: Stop) -> None:
        record, options = trainer.record, self.options
        number = self.methods.index(method) + 1
        what = f"{number}/{len(self.methods)} {method.title}"
        size = options.batch * options.seq
        with self.memory, progress(self.console, what, options.steps, size, len(record.losses)) as advance:
            kept = time.monotonic()
            while not trainer.done:
                trainer.step()
                advance(f"loss {record.losses[-1]:.3f}", 1)
                if stop.requested:
                    break
                if method.resumable and not trainer.done and time.monotonic() - kept >= KEEP_SECONDS:
                    self._keep(method, trainer)
                    kept = time.monotonic()
        if self.memory.bytes is not None:
            record.peak_memory = max(self.memory.bytes, record.peak_memory or 0)
        record.kept_bytes = max(self._kept_bytes(), record.kept_bytes)
        if stop.requested:
            self._stop(method, trainer)

    def _evaluate(self, what: str, stop: Stop, trainer: Trainer | None = None, method: Method | None = None) -> float:
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

    def _stop(self, method: Method, trainer: Trainer) -> None:
        if method.resumable:
            self._keep(method, trainer)
        again = "" if method.resumable else ", which will begin again"
        self.stopped_at = f" after step {len(trainer.record.losses)} of {self.options.steps} of {method.key}{again}"
        raise KeyboardInterrupt

    def _keep(self, method: Method, trainer: Trainer) -> None:
        if not self.saved:
            state.clear(self.out)  # of an older run that this one replaces
        tensors = {name: tensor.cpu().clone() for name, tensor in trainer.tensors().items()}
        self.saved[method.key] = state.Saved(trainer.record, self.shared, tensors)
        state.save(self.out, method.key, self.saved[method.key])
        self._write_adapter(method)

    def _write_adapter(self, method: Method) -> None:
        files.write_directory(self.out / method.key, lambda folder: models.save_adapter(self.model, folder))

    @torch.no_grad()
    def _set_adapter(self, values: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            if name in values:
                p.copy_(values[name])

    def _apply(self, freeze_below: int | None) -> dict[str, Any]:
        policy = self.options.policy()
        self._say("Preparing the backward pass (factors are kept for the next run) ...")
        start = time.perf_counter()
        torch.manual_seed(self.options.seed)  # of the "random" subspace, the same after a resume
        try:
            report = loge.apply(self.model, freeze_below=freeze_below, **policy)
        except (TypeError, ValueError) as error:
            if freeze_below is not None:
                policy["freeze"] = self.options.freeze
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
        exact = self.saved[LORA].tensors["first_gradient"]
        found: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            saved = self.saved[method.key]
            gradient = saved.tensors.get("first_gradient")
            cosine = None if gradient is None else results.cosine(gradient, exact)
            found[method.key] = results.method_metrics(saved.record, self.shared["heldout_before"], cosine)
            found[method.key]["recovered"] = results.recovered(found[method.key], found[LORA])
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
            "peak_memory_measures": self.memory.measures,
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
        self._say(f"Peak memory: {self.memory.measures}")
        folders = " and ".join(f"{method.key}/" for method in self.methods)
        self._say(f"Written under {self.out}: metrics.json, curves.png and the adapters {folders}")
        return metrics

    def interrupted(self) -> str:
        if not self.saved:
            return "Interrupted before any training; nothing to resume"
        return (
            f"Interrupted{self.stopped_at}; saved in {self.out / 'state'}. To go on:\n  {self.given.resume_command()}"
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
