"""Progress on long work: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 5  # of plain progress where there is no terminal
_RECENT = 8  # steps over which the rate is averaged

Advance = Callable[[str, int], None]


@contextlib.contextmanager
def progress(
    console: Console, what: str, total: int, tokens: int, done: int = 0, passing: bool = False
) -> Iterator[Advance]:
    """Yields `advance(text, n)`: n of `total` more are done. Each is `tokens` tokens; `done` came before. What is
    `passing` leaves no trace when it ends."""
    if console.is_terminal:
        with _bar(console, what, total, tokens, done, passing) as advance:
            yield advance
    else:
        yield _lines(console, what, total, tokens, done, passing)


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int, tokens: int, done: int, passing: bool) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=passing) as bar:
        task = bar.add_task(what, total=total, completed=done, text="")
        rate = _Rate(tokens)

        def advance(text: str, count: int) -> None:
            bar.update(task, advance=count, text=f"{text} {rate.tick(count):.0f} tokens/s")

        yield advance


def _lines(console: Console, what: str, total: int, tokens: int, done: int, passing: bool) -> Advance:
    rate = _Rate(tokens)
    at = done

    def advance(text: str, count: int) -> None:
        nonlocal at
        before, at = at, at + count
        speed = rate.tick(count)
        if not passing and (at == total or before * _LINES // total != at * _LINES // total):
            left = (total - at) * tokens / speed
            console.print(f"{what}: {at}/{total} {text} {speed:.0f} tokens/s, {left:.0f} s left", highlight=False)

    return advance


class _Rate:
    """Tokens a second over the last few steps."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._ticks: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=_RECENT + 1)

    def tick(self, count: int) -> float:
        self._ticks.append((time.perf_counter(), self._ticks[-1][1] + count))
        (start, before), (end, after) = self._ticks[0], self._ticks[-1]
        return (after - before) * self._tokens / max(end - start, 1e-9)
