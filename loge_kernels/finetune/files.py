"""Writing under --out: whole files or none, and one clear line when it cannot be done."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import replacing
from .options import FinetuneError


def prepare(directory: Path, argument: str = "--out") -> None:
    """Create `directory` and prove that it can be written."""
    with explained(directory, argument):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"0")


def need_space(directory: Path, size: int) -> None:
    """Raise FinetuneError unless `size` bytes are free under `directory`."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise FinetuneError(
            f"--out {str(directory)!r}: the disk is nearly full, {free / 1e6:.0f} MB free and {size / 1e6:.0f} MB "
            "needed; free some space or choose another --out"
        )


def write(path: Path, data: bytes) -> None:
    """Replace `path` with `data` in one step: a reader, or a crash, finds the old file or the new one."""
    with explained(path), replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(path, safetensors.torch.save(contiguous, metadata))


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write files into a folder aside, then move each to its place under `path`."""
    with explained(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
        fill(Path(aside))
        path.mkdir(exist_ok=True)
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, path / file.name)


@contextlib.contextmanager
def explained(path: Path, argument: str = "--out") -> Iterator[None]:
    """Turn a failure to write `path` into a FinetuneError. safetensors reports a full disk as its own error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "No space left" in str(error):
            problem, remedy = "the disk is full", f"free some space or choose another {argument}"
        else:
            reason = error.strerror if isinstance(error, OSError) else None
            problem, remedy = reason or str(error), f"choose an {argument} that can be written"
        raise FinetuneError(f"{argument}: cannot write {str(path)!r}, {problem}; {remedy}") from error
