"""What a run is asked to do, and what of it can be refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Option

from ..command_line import JSON, Device, Text
from ..factors.factors import SUBSPACES, resolve_rank
from ..machine import SHORT, choose_device
from ..numerics.eight_bit import DTYPES as EIGHT_BIT
from ..numerics.exact_dtypes import EXACT_DTYPES

LORA, LOGE, LOW_RANK = "lora", "loge", "low-rank"
# Their titles in what is printed, and their colours in the picture.
METHODS = {
    LORA: ("LoRA (PEFT)", "C0"),
    LOGE: ("LoGE", "C1"),
    LOW_RANK: ("LoGE low rank", "C3"),
    "loretta-rep": ("LoRETTA rep", "C2"),
    "loretta-adp": ("LoRETTA adp", "C4"),
    "switchlora": ("SwitchLoRA", "C5"),
}
_OF_LOW_RANK = ("rank", "subspace", "exact_layers", "exact_every")
_REQUIRED = ("transformers", "peft", "matplotlib")
# Where a run may differ from the one it resumes.
_FREE_TO_CHANGE = frozenset({"out", "resume", "json"})


class FinetuneError(ValueError):
    """Something the user can put right; the message is one line and names the argument."""


class Interrupted(Exception):
    """The run was stopped by Ctrl-C; the message says what was saved and how to resume."""

    exit_status = 130


def _freeze(text: str) -> str | int:
    return int(text) if text.lstrip("+-").isdigit() else text


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The options of `python -m loge_kernels finetune`. The last tenth of each file is held out; adapters train in
    float32, with alpha = 2 · lora_rank."""

    model: Annotated[
        str | None, Option(help="A directory, a .gguf file or a hub id; default: SmolLM2-135M-Instruct.")
    ] = None
    text: Text = ()
    method: Annotated[
        Sequence[str],
        Option(
            help="What to train beside PEFT's LoRA, a list: loge (apply(model), exact), low-rank, loretta-rep, "
            "loretta-adp, switchlora, or lora with --freeze; NAME:LR for a learning rate of its own.",
        ),
    ] = (LOGE, LOW_RANK)
    freeze: Annotated[
        str | int | None,
        Option(help="Freeze the first layers in these: auto, where calibration finds the boundary, or a number."),
        _freeze,
    ] = None
    rank: Annotated[
        int | float, Option(help="low-rank: rank of the factors, an int or a share of min(N, K) in (0, 1].")
    ] = 1 / 16
    subspace: Annotated[
        str,
        Option(
            help="low-rank: which directions the factors keep: svd, or gradient or salience, for which the first "
            "training sequences are looked at before training."
        ),
    ] = "gradient"
    exact_layers: Annotated[
        float, Option(help="low-rank: share of the weights that stays exact, from the output downwards.")
    ] = 0.75
    exact_every: Annotated[
        int | None, Option(help="low-rank: one training forward in so many has an exact backward.")
    ] = None
    exact_dtype: Annotated[
        str,
        Option(
            help="loge, low-rank: exact products in auto (8 bits where faster), float8, int8 or none; nvfp4 and mxfp4 "
            "are experimental."
        ),
    ] = "auto"
    base_dtype: Annotated[
        str | None,
        Option(help="loge, low-rank: keep the frozen weights in int8 or float8 alone, for forward and backward."),
    ] = None
    lora_rank: Annotated[int, Option(help="Rank of the adapters.")] = 8
    targets: Annotated[
        Sequence[str] | None, Option(help="Layers with adapters, by name; default: every linear of the blocks.")
    ] = None
    dtype: Annotated[str, Option(help="Of the frozen weights: auto, float32 or bfloat16.")] = "auto"
    steps: Annotated[int, Option(help="Optimizer steps of each method.")] = 40
    batch: Annotated[int, Option(help="Sequences a step.")] = 2
    seq: Annotated[int, Option(help="Tokens a sequence.")] = 128
    lr: Annotated[float, Option(help="AdamW's learning rate.")] = 5e-4
    seed: Annotated[int, Option(help="Of the adapters' start and of the batches.")] = 0
    device: Device = "auto"
    out: Annotated[str | Path, Option(help="Where metrics, curves and adapters go.")] = "out"
    resume: Annotated[bool, Option("--resume", help="Go on with the interrupted run in --out.")] = False
    json: Annotated[str | Path | None, JSON] = None

    def check(self) -> None:
        """Raise FinetuneError where a value cannot work, whatever the model."""
        for name in ("steps", "batch", "lora_rank"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "give an integer of at least 1")
        _need(self.seq >= 2, "seq", self.seq, "give at least 2 tokens")
        _need(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "give a number above 0, such as 5e-4")
        _need(-(2**63) <= self.seed < 2**63, "seed", self.seed, "give a 64-bit integer")
        _need_one_of("dtype", SHORT.get(self.dtype, self.dtype), ("auto", "float32", "bfloat16"), self.dtype)
        self._check_methods()
        self._check_policy()
        for path in self.text:
            _need(Path(path).is_file(), "text", path, "no such file" if not Path(path).exists() else "not a file")
        missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
        if missing:
            raise FinetuneError(
                f"finetune needs {', '.join(missing)}, which is not installed: pip install 'loge_kernels[demo]'"
            )

    @property
    def torch_device(self) -> torch.device:
        """The device for --device. Raises FinetuneError where it is not here."""
        try:
            return choose_device(self.device, "--device ")
        except ValueError as error:
            raise FinetuneError(str(error)) from None

    def policy(self, method: str) -> dict[str, Any]:
        """The arguments of `loge_kernels.apply` for "loge" or "low-rank", but for the calibration."""
        names = _OF_LOW_RANK if method == LOW_RANK else ()
        exact = None if self.exact_dtype == "none" else self.exact_dtype
        return {name: getattr(self, name) for name in names} | {"exact_dtype": exact, "base_dtype": self.base_dtype}

    def _check_methods(self) -> None:
        methods = self.method or ("",)
        names = [split_method(text)[0] for text in methods]
        for text, name in zip(methods, names, strict=True):
            _need_one_of("method", name, METHODS, text)
            _need(names.count(name) == 1, "method", text, "it is there twice; give each once")
        if self.freeze is not None:
            fits = self.freeze == "auto" or (isinstance(self.freeze, int) and self.freeze >= 1)
            _need(fits, "freeze", self.freeze, "give auto, or a number of layers from 1 up")

    def _check_policy(self) -> None:
        _need_one_of("subspace", self.subspace, SUBSPACES)
        _need_one_of("exact_dtype", self.exact_dtype, ("auto", *EXACT_DTYPES, "none"))
        if self.base_dtype is not None:
            _need_one_of("base_dtype", self.base_dtype, tuple(EIGHT_BIT))
            remedy = f"with --base-dtype {self.base_dtype} exact products are in it; leave this out"
            _need(self.exact_dtype == "auto", "exact_dtype", self.exact_dtype, remedy)
        try:
            resolve_rank(self.rank, 2**30, 2**30)
        except (TypeError, ValueError):
            _need(False, "rank", self.rank, "give an integer of at least 1, or a share in (0, 1] of min(N, K)")
        remedy = "give the share of the weights in [0, 1] that stays exact"
        _need(0.0 <= self.exact_layers <= 1.0, "exact_layers", self.exact_layers, remedy)
        remedy = "one training forward in so many is exact; give an integer from 1 up"
        _need(self.exact_every is None or self.exact_every >= 1, "exact_every", self.exact_every, remedy)
        if LOW_RANK not in [split_method(text)[0] for text in self.method]:
            for name in _OF_LOW_RANK:
                value = getattr(self, name)
                _need(value == getattr(FinetuneOptions, name), name, value, f"it is for --method {LOW_RANK}")

    def arguments(self) -> dict[str, Any]:
        """The options as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("out", "json"):
            values[name] = None if values[name] is None else str(values[name])
        values["text"] = [str(path) for path in self.text]
        values["method"] = list(self.method)
        values["targets"] = None if self.targets is None else list(self.targets)
        return values

    def check_same_run(self, saved: dict[str, Any]) -> None:
        """Raise FinetuneError naming the first argument that differs from those of the run to resume."""
        for name, value in self.arguments().items():
            if name not in _FREE_TO_CHANGE and saved.get(name) != value:
                raise FinetuneError(
                    f"{flag(name)} {_shown(value)} differs from the interrupted run in {str(self.out)!r}, which used "
                    f"{_shown(saved.get(name))}; resume with the same arguments, or start anew without --resume"
                )

    def resume_command(self) -> str:
        """The command line that goes on with this run."""
        words = ["python", "-m", "loge_kernels", "finetune", "--resume", "--out", str(self.out)]
        defaults = FinetuneOptions().arguments()
        for name, value in self.arguments().items():
            if name in ("out", "resume") or value == defaults[name]:
                continue
            for item in value if isinstance(value, list) else [value]:
                words += [flag(name), str(item)]
        return shlex.join(words)


def split_method(text: str) -> tuple[str, float | None]:
    """The name and the learning rate of a --method; None where it gives none."""
    name, colon, rate = text.partition(":")
    if not colon:
        return name, None
    try:
        lr = float(rate)
    except ValueError:
        lr = math.nan
    _need(math.isfinite(lr) and lr > 0, "method", text, "behind the colon goes a learning rate, such as 2e-2")
    return name, lr


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def _need(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise FinetuneError(f"{flag(name)} {_shown(value)}: {remedy}")


def _need_one_of(name: str, value: str, choices: Collection[str], given: str | None = None) -> None:
    *most, last = choices
    _need(value in choices, name, given or value, f"choose {', '.join(most)} or {last}")


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, (str, Path)) else str(value)
