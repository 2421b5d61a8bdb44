"""What an interrupted run leaves under `out/state`, so that `--resume` goes on to the same result.

One safetensors file a method: its adapter, its optimizer's state and its first gradient, with the record of the run
and the arguments as JSON in the header. One file, replaced in one step, cannot disagree with itself.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..cache import DAMAGED
from .files import explained, write_tensors
from .options import FinetuneError
from .training import Record

_FORMAT = "loge_kernels finetune 1"
_KEY = "loge"


@dataclass(frozen=True)
class Saved:
    """One method's state. `shared` is common to the run: arguments, text fingerprint, held-out loss at the start."""

    record: Record
    shared: dict[str, Any]
    tensors: dict[str, Tensor]


def save(out: Path, method: str, state: Saved) -> None:
    header = {"format": _FORMAT, "record": state.record.to_dict(), "shared": state.shared}
    path = _path(out, method)
    with explained(path):
        path.parent.mkdir(exist_ok=True)
    write_tensors(path, state.tensors, {_KEY: json.dumps(header)})


def load(out: Path, methods: tuple[str, ...]) -> dict[str, Saved]:
    """The states under `out`, by method; FinetuneError where there is none or one is damaged."""
    found = {method: _load(_path(out, method)) for method in methods if _path(out, method).exists()}
    if not found:
        done = " (the run there has finished)" if (out / "metrics.json").exists() else ""
        raise FinetuneError(f"--resume: no interrupted run under {str(out)!r}{done}; start one without --resume")
    return found


def exists(out: Path) -> bool:
    return (out / "state").is_dir()


def clear(out: Path) -> None:
    shutil.rmtree(out / "state", ignore_errors=True)


def _path(out: Path, method: str) -> Path:
    return out / "state" / f"{method}.safetensors"


def _load(path: Path) -> Saved:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}, not {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Saved(Record(**header["record"]), header["shared"], tensors)
    except DAMAGED as error:
        raise FinetuneError(f"--resume: {str(path)!r} is damaged ({error}); start anew without --resume") from error
