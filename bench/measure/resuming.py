"""A benchmark's JSON file that is kept up to date: what it holds is not run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def begin(
    benchmark: str, version: int, path: Path | None, settings: Mapping[str, Any], older: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the file holds, or a new result without rows.

    settings: what runs in one file must agree on, by the names of their options, as JSON values.   older: those that
    older files do not name, with what they were.

    Raises ValueError for a file of another kind or version, or with other settings.
    """
    if path is None or not path.exists():
        return {"benchmark": benchmark, "version": version, "settings": settings, "rows": []}
    try:
        found = dict(json.loads(path.read_text()))
        kind, its_version, theirs, _ = found["benchmark"], found.get("version", 1), found["settings"], found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} is there and no result of bench {benchmark}; choose another") from error
    if (kind, its_version) != (benchmark, version):
        raise ValueError(f"--json {path} holds bench {kind}, version {its_version}, not {benchmark}, version {version}")
    found["settings"] = theirs = {**(older or {}), **theirs}
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: {path} holds runs with {theirs.get(name)}; give the same, or "
                "choose another --json"
            )
    return found
