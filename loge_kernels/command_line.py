"""What the commands share: options, lists and numbers as users type them, the exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_PANICS = (ValueError, TypeError, OSError)

SETTINGS = {"help_option_names": ["-h", "--help"]}
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]


def leave(work: Callable[[], bool]) -> None:
    """Run a command's work; leave with its status. What the user can put right is one line on standard error."""
    try:
        passed = work()
    except _PANICS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if passed else 1)


def split(values: Sequence[str] | None) -> list[str]:
    """An option given several times, or once with commas, or both."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def numbers(option: str, values: Sequence[str] | None) -> list[int | float]:
    return [number(option, value) for value in split(values)]


def number(option: str, text: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--{option} {text!r} is not a number") from None


def check_counts(options: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields of `options` that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: give an integer of at least 1")


def write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n")
