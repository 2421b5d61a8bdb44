"""How long exact and cheap steps of a training loop take, without making the device wait."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

KEPT = 64  # steps of each kind


class StepClock:
    """Times of the last steps, exact and cheap apart.

    On a CUDA device they are measured by events, which are read once they have passed, elsewhere by the wall clock. The
    first step of each kind is left out: it compiles and allocates.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, deque[float]] = {exact: deque(maxlen=KEPT) for exact in (True, False)}
        self._seen: set[bool] = set()
        self._pending: deque[tuple[bool, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=4 * KEPT)
        self._began: tuple[bool, float | torch.cuda.Event] | None = None

    def begin(self, exact: bool, device: torch.device) -> None:
        """A step begins on `device`; `exact`: which kind it is."""
        self._began = exact, _now(device)

    def end(self, device: torch.device) -> None:
        """The step that began has ended."""
        if self._began is None:
            return
        (exact, start), self._began = self._began, None
        if exact not in self._seen:
            self._seen.add(exact)
            return
        end = _now(device)
        if isinstance(start, float) and isinstance(end, float):
            self._seconds[exact].append(end - start)
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._pending.append((exact, start, end))

    def seconds(self, exact: bool) -> float | None:
        """The median time of a step of this kind, None before there is one."""
        while self._pending and self._pending[0][2].query():
            kind, start, end = self._pending.popleft()
            self._seconds[kind].append(start.elapsed_time(end) / 1000)
        return median(self._seconds[exact]) if self._seconds[exact] else None


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
