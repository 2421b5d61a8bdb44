"""What an interrupted run leaves under `out/state`, so that `--resume` goes on to the same result.

One safetensors file a method: its adapter, its optimizer's state and its first gradient, with the record of the run,
the arguments and a checksum of the tensors as JSON in the header. One file, replaced in one step, cannot disagree with
itself; the one before it is kept, for a disk that gives back another file than it was given.

Factors and 8-bit copies are made again. Which forward is the exact one of `exact_every` is not kept: a resumed run
begins with an exact forward, and then its result is not that of a run in one piece.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..factors.cache import fingerprint
from ..files import DAMAGED
from .files import explained, write_tensors
from .options import FinetuneError
from .training import Record

logger = logging.getLogger("loge_kernels")

_FORMAT = "loge_kernels finetune 3"
_KEY = "loge"


@dataclass(frozen=True)
class Saved:
    """One method's state. `shared` is common to the run: arguments, text fingerprint, held-out loss at the start."""

    record: Record
    shared: dict[str, Any]
    tensors: dict[str, Tensor]


def save(out: Path, method: str, state: Saved) -> None:
    """Write the state in the place of the last one, which becomes the one before."""
    header = {
        "format": _FORMAT,
        "record": state.record.to_dict(),
        "shared": state.shared,
        "sha256": _checksum(state.tensors),
    }
    path = _path(out, method)
    with explained(path):
        path.parent.mkdir(exist_ok=True)
    following = path.with_suffix(".new")
    write_tensors(following, state.tensors, {_KEY: json.dumps(header)})
    with explained(path):
        if path.exists():
            os.replace(path, _before(path))
        os.replace(following, path)


def load(out: Path, methods: tuple[str, ...]) -> dict[str, Saved]:
    """The states under `out`, by method; of a damaged one the state before it, which the logger says. FinetuneError
    where there is none, or none that is whole."""
    found = {}
    for method in methods:
        path = _path(out, method)
        if path.exists() or _before(path).exists():
            found[method] = _load_last(path)
    if not found:
        done = " (the run there has finished)" if (out / "metrics.json").exists() else ""
        raise FinetuneError(f"--resume: no interrupted run under {str(out)!r}{done}; start one without --resume")
    return found


def _load_last(path: Path) -> Saved:
    if not path.exists():  # stopped between the two replacements of `save`
        return _load(_before(path))
    try:
        return _load(path)
    except FinetuneError as error:
        if not _before(path).exists():
            raise
        saved = _load(_before(path))
        logger.warning("%s; going on from the state before it, at step %d", error, len(saved.record.losses))
        return saved


def exists(out: Path) -> bool:
    return (out / "state").is_dir()


def clear(out: Path) -> None:
    shutil.rmtree(out / "state", ignore_errors=True)


def _path(out: Path, method: str) -> Path:
    return out / "state" / f"{method}.safetensors"


def _before(path: Path) -> Path:
    return path.with_suffix(".before.safetensors")


def _checksum(tensors: dict[str, Tensor]) -> str:
    parts = (f"{name} {fingerprint(tensor)}" for name, tensor in sorted(tensors.items()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _load(path: Path) -> Saved:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}, not {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if _checksum(tensors) != header["sha256"]:
            raise ValueError("its tensors are not those that were written")
        return Saved(Record(**header["record"]), header["shared"], tensors)
    except DAMAGED as error:
        raise FinetuneError(f"--resume: {str(path)!r} is damaged ({error}); start anew without --resume") from error
