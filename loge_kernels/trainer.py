"""`LogeCallback`: the schedule of `apply` in a `transformers.Trainer`, saved and resumed with its checkpoints.

The schedule follows the Trainer's optimizer by itself (gradient accumulation, Accelerate's wrapper, steps that a
`GradScaler` skips); what it cannot see is a checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import uuid
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .atomic import replacing
from .linear import LoGELinear
from .report import Report
from .schedule import Schedule, schedule_of
from .step_clock import StepClock

logger = logging.getLogger("loge_kernels")

FILE = "loge_schedule.safetensors"


class LogeCallback(TrainerCallback, ExportableState):
    """Writes the schedule of an `apply`-ed model beside every checkpoint, as `loge_schedule.safetensors`, and takes it
    over when training resumes; prints what `apply` did when training begins, and adds to every entry of the Trainer's
    log what training does:

    - `loge_energy`: mean energy that the layers' factors capture, as it stands (refreshed subspaces change it).
    - `loge_exact_steps`, `loge_refreshes`: exact steps so far; refreshes of the subspaces since the model was applied.
    - `loge_exact_step_s`, `loge_cheap_step_s`: median seconds of the last steps of each kind. An exact step that feeds
      a correction has one more cheap backward in it.
    - `loge_step_time_saving`: the share by which the average step is shorter than an exact one.

    What does not apply is left out. The entries are those of `state.log_history`, and so of `trainer_state.json`, and
    of the console; what `report_to` names has had its turn by then.

    Args:
        report: what `apply` returned, to be printed; None prints the schedule alone.
        resume_from: the checkpoint's folder, where it lies neither under `output_dir` nor in
            `TrainingArguments.resume_from_checkpoint`: a Trainer does not tell its callbacks.

    A checkpoint and its schedule are a pair by a token in both, so a folder of the same name of another run is not
    mistaken for it. Without the file training goes on with a warning, and the schedule where it stands. Resuming raises
    ValueError where the saved means do not fit the model.
    """

    def __init__(self, report: Report | None = None, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.report = report
        self.resume_from = resume_from
        self.token = ""
        self._clock = StepClock()

    def state(self) -> dict[str, Any]:
        """For the Trainer, which calls this once for every checkpoint and keeps it in `trainer_state.json`."""
        self.token = uuid.uuid4().hex
        return {"args": {}, "attributes": {"token": self.token}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Take over the checkpoint's schedule, and print what training does."""
        schedule = schedule_of(model)
        name = type(self).__name__
        if state.global_step > 0:
            self._resume(args, state.global_step, _token(state.stateful_callbacks.get(name)), schedule)
        # A checkpoint of a run without this callback has no entry, and the Trainer updates only those there are.
        state.stateful_callbacks.setdefault(name, self.state())
        if schedule is not None and schedule.correction is not None:
            schedule.correction.scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        if state.is_local_process_zero:
            print(self._summary(schedule))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Start the clock."""
        schedule = schedule_of(model)
        if schedule is not None and schedule.exact_every is not None:
            self._clock.begin(schedule.exact, args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._clock.end(args.device)

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, logs: Any = None, **kwargs: Any) -> None:
        """Add this package's figures to an entry with a training loss."""
        if logs is None or "loss" not in logs:
            return
        figures = self._figures(model)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Write the schedule into the checkpoint that the Trainer has just made."""
        schedule = schedule_of(model)
        if schedule is None or not args.should_save or args.save_only_model:
            return
        folder = _checkpoint(args, state.global_step)
        if not folder.is_dir():
            logger.warning("%s is not where this checkpoint went: its schedule is not saved", folder)
            return
        tensors = {name: value.cpu().contiguous() for name, value in schedule.state_dict().items()}
        with replacing(folder / FILE) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, {"token": self.token}))

    def _resume(self, args: Any, step: int, token: str | None, schedule: Schedule | None) -> None:
        if schedule is None:
            return
        given = self.resume_from or args.resume_from_checkpoint
        folders = [_checkpoint(args, step)]
        if isinstance(given, (str, os.PathLike)) and str(given).lower() not in ("true", "false"):
            folders.insert(0, Path(given))
        for folder in folders:
            if token is None or not (folder / FILE).is_file():
                continue
            try:
                with safe_open(folder / FILE, framework="pt", device="cpu") as file:
                    ours = (file.metadata() or {}).get("token") == token
                    tensors = {name: file.get_tensor(name) for name in file.keys()} if ours else {}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{folder / FILE} is damaged ({error}): resume from an earlier checkpoint, or delete it to go on "
                    "with a schedule that begins anew"
                ) from error
            if ours:
                schedule.load_state_dict(tensors)
                return
        why = (
            "the checkpoint was made without LogeCallback"
            if token is None
            else "give LogeCallback(resume_from=...) the checkpoint's folder if it is elsewhere"
        )
        logger.warning(
            "resuming at step %d without its schedule of exact steps: no %s of this checkpoint in %s (%s); the "
            "schedule and its correction go on as they are, at step %d",
            step,
            FILE,
            " or ".join(str(folder) for folder in folders),
            why,
            schedule.step,
        )

    def _figures(self, model: nn.Module) -> dict[str, float]:
        figures: dict[str, float] = {}
        all_factors = [m.factors for m in model.modules() if isinstance(m, LoGELinear) and m.factors is not None]
        energies = [factors.energy for factors in all_factors if factors.rank and math.isfinite(factors.energy)]
        if energies:
            figures["loge_energy"] = sum(energies) / len(energies)
        schedule = schedule_of(model)
        if schedule is None:
            return figures
        if schedule.refresher is not None:
            figures["loge_refreshes"] = schedule.refresher.refreshes
        if schedule.exact_every is None:
            return figures
        figures["loge_exact_steps"] = schedule.exact_steps
        exact, cheap = self._clock.seconds(exact=True), self._clock.seconds(exact=False)
        figures |= {} if exact is None else {"loge_exact_step_s": exact}
        figures |= {} if cheap is None else {"loge_cheap_step_s": cheap}
        if exact and cheap:
            figures["loge_step_time_saving"] = (1.0 - 1.0 / schedule.exact_every) * (1.0 - cheap / exact)
        return figures

    def _summary(self, schedule: Schedule | None) -> str:
        if self.report is not None:
            energies = [layer.energy for layer in self.report.layers if layer.rank and layer.energy is not None]
            energy = f"; mean energy captured {sum(energies) / len(energies):.3f}" if energies else ""
            return f"LoGE: {self.report.summary()}{energy}"
        if schedule is None:
            return "LoGE: every step alike"
        if schedule.exact_every is None:
            every = None if schedule.refresher is None else schedule.refresher.every
            return "LoGE: no exact steps" + ("" if every is None else f"; subspaces refreshed every {every} steps")
        corrected = "" if schedule.correction is None else ", with bias correction"
        return f"LoGE: one step in {schedule.exact_every:.3g} exact{corrected}"


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def _token(kept: Any) -> str | None:
    """Of what `trainer_state.json` keeps: a dict, or a list of them where several callbacks were of this class."""
    last = kept[-1] if isinstance(kept, list) and kept else kept
    token = last.get("attributes", {}).get("token") if isinstance(last, dict) else None
    return token or None
