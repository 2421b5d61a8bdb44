"""What long work shows on a terminal: a progress bar while it runs, a table of what it did."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")


def with_progress(items: Iterable[T], doing: str) -> Iterator[T]:
    """The items, and a progress bar on a terminal's standard error."""
    if not sys.stderr.isatty():
        yield from items
        return
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=_length(items))
        for item in items:
            yield item
            progress.advance(task)


def _length(items: Iterable[T]) -> int | None:
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset has a __len__ that raises
        return None


def as_text(table: Table) -> str:
    """The table as it is printed 160 columns wide, without spaces at the ends of lines."""
    file = io.StringIO()
    Console(file=file, width=160).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
