"""The file of `bench fidelity`: kept up to date after every run, gone on with later, shared by processes that run
different seeds or policies at the same time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import fidelity_report as report
from . import output


def begin(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or a new result. Raises ValueError for a file of another kind or with other settings."""
    if path is None or not path.exists():
        return {"benchmark": "fidelity", "settings": settings, "calibration_seconds": {}, "rows": []}
    try:
        found = json.loads(path.read_text())
        if found["benchmark"] != "fidelity":
            raise KeyError("benchmark")
        theirs, _ = found["settings"], found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} is there and no result of bench fidelity; choose another") from error
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: {path} holds runs with {theirs.get(name)}; give the same, or "
                "choose another --json"
            )
    return dict(found)


def find(result: dict[str, Any], policy: str, seed: int) -> dict[str, Any] | None:
    """The row of a run, or None."""
    return next((row for row in result["rows"] if (row["policy"], row["seed"]) == (policy, seed)), None)


def take_over(result: dict[str, Any], path: Path | None) -> None:
    """Add to `result` the rows that another process has written to the file since."""
    if path is not None and path.exists():
        rows = json.loads(path.read_text())["rows"]
        known = {(row["policy"], row["seed"]) for row in rows}
        result["rows"] = rows + [row for row in result["rows"] if (row["policy"], row["seed"]) not in known]


def add(result: dict[str, Any], row: dict[str, Any], path: Path | None) -> None:
    """Add `row` to `result`, summarise, and bring the file up to date. A run that another process has finished in the
    meantime keeps that process's row."""
    result["rows"].append(row)
    with _locked(path):
        take_over(result, path)
        result["summary"] = report.summarise(result)
        output.write(result, path)


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """One process at a time: a lock on the folder, which the system drops with the process and which leaves no file."""
    if path is None or os.name != "posix":
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
