"""`LogeCallback`: the schedule of `apply` in a `transformers.Trainer`, saved and resumed with its checkpoints.

The schedule follows the Trainer's optimizer by itself (gradient accumulation, Accelerate's wrapper, steps that a
`GradScaler` skips); what it cannot see is a checkpoint.
"""

from __future__ import annotations

import logging
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
from .report import Report
from .schedule import Schedule, schedule_of

logger = logging.getLogger("loge_kernels")

FILE = "loge_schedule.safetensors"


class LogeCallback(TrainerCallback, ExportableState):
    """Writes the schedule of an `apply`-ed model beside every checkpoint, as `loge_schedule.safetensors`, and takes it
    over when training resumes; prints what `apply` did when training begins.

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
