"""Interleaved timing: every candidate runs once per round, A B C A B C …, so that a slow spell of the machine falls on
all of them, and ratios are taken between neighbours in time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Clock(Protocol):
    """Times calls on one device. A ticket becomes seconds in `settle`, which may wait for the device."""

    def record(self, call: Call) -> tuple[Any, Any]:
        """(ticket, the call's result)."""

    def settle(self, tickets: Sequence[Any]) -> list[float]:
        """The seconds of each ticket."""


class CpuClock:
    """`time.perf_counter` around each call."""

    def record(self, call: Call) -> tuple[float, Any]:
        started = time.perf_counter()
        result = call()
        return time.perf_counter() - started, result

    def settle(self, tickets: Sequence[float]) -> list[float]:
        return list(tickets)


class CudaClock:
    """CUDA events on the current stream, with the L2 cache overwritten before each call.

    Nothing synchronises inside a round: while the device overwrites its cache the host runs ahead, so that the events
    enclose the kernels and not the launches.
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
        self._device = device
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def record(self, call: Call) -> tuple[Any, Any]:
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            result = call()
            end.record()
        return (start, end), result

    def settle(self, tickets: Sequence[Any]) -> list[float]:
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in tickets]


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Another stream than the default one, which no graph can be captured on, nor what waits for it: autograd adds up a
    leaf's gradient on the stream where the leaf was first used."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outside, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            yield
        outside.wait_stream(stream)


def captured(prepare: Callable[[], Call], device: torch.device) -> Call:
    """What replays a CUDA graph of the call that `prepare()` returns; its results are written anew at each replay.

    Prepared, run and captured on the current stream, which is not the default one (`own_stream`). Raises RuntimeError
    where a graph cannot hold the call.
    """
    with torch.cuda.device(device):
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        call = prepare()
        for _ in range(2):  # compiled and loaded before, for neither can be captured
            call()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # a graph that fails leaves its own
            results = call()

    # `call` holds what the graph reads and did not make itself: activations of the forward, copies of weights.
    return partial(_replayed, graph, results, call)


def _replayed(graph: torch.cuda.CUDAGraph, results: Any, call: Call) -> Any:
    graph.replay()
    return results


@dataclass(frozen=True, slots=True)
class TimingOptions:
    """How long to measure one set of candidates.

    `budget_seconds` covers the measured rounds; there are at least `min_rounds`, budget or not, and at most
    `max_rounds`. A candidate whose first, cold call takes longer than `slow_seconds` is not run again: that call is
    its measurement.
    """

    budget_seconds: float = 20.0
    slow_seconds: float = 5.0
    warmup_rounds: int = 1
    min_rounds: int = 3
    max_rounds: int = 101

    def __post_init__(self) -> None:
        for name in ("budget_seconds", "slow_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        if self.warmup_rounds < 1 or not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(
                f"warmup_rounds={self.warmup_rounds}, min_rounds={self.min_rounds}, max_rounds={self.max_rounds}: "
                "need one warm-up round (the first calls) and 1 <= min_rounds <= max_rounds"
            )


@dataclass(slots=True)
class Timing:
    """The measured seconds of one candidate, round by round."""

    seconds: list[float] = field(default_factory=list)
    cold: bool = False  # one call without a warm-up
    failure: str | None = None  # why there is no measurement

    @property
    def runs(self) -> int:
        return len(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile of the seconds, 0 ≤ q ≤ 1, linear between neighbours."""
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    def faster_than(self, other: Timing) -> float:
        """How many times faster this is than `other`: the median over rounds of the ratio within a round, or the
        ratio of medians where one of them ran a single time."""
        if self.runs == other.runs > 1:
            return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))
        return other.median / self.median


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector runs before the measurement and not during it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    options: TimingOptions,
    *,
    around_first: Callable[[str, Call], Any] | None = None,
    inspect: Callable[[str, Any], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time every call, one call of each per round in the order of `calls`.

    The first round is the warm-up: `around_first(name, call)`, when given, makes the call in it (and returns its
    result), and `inspect(name, result)` sees the result outside the timed span. A call that raises is not run again
    and carries the error as its `failure`. `progress` is told what runs next.
    """
    timings = {name: Timing() for name in calls}
    active: dict[str, Call] = {}
    tell = progress or (lambda message: None)
    with _no_collector():
        for name, call in calls.items():
            tell(f"{name}: first call")
            timed = partial(around_first, name, call) if around_first else call
            try:
                ticket, result = clock.record(timed)
                [seconds] = clock.settle([ticket])
            except (RuntimeError, ValueError, TypeError) as error:
                timings[name].failure = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if inspect:
                inspect(name, result)
            del result
            if seconds > options.slow_seconds:
                timings[name].seconds.append(seconds)
                timings[name].cold = True
            else:
                active[name] = call
        for _ in range(options.warmup_rounds - 1):
            clock.settle([clock.record(call)[0] for call in active.values()])
        started = time.perf_counter()
        for done in range(options.max_rounds if active else 0):
            elapsed = time.perf_counter() - started
            if done >= options.min_rounds and elapsed + elapsed / done > options.budget_seconds:
                break
            tell(f"round {done + 1}")
            tickets = [clock.record(call)[0] for call in active.values()]
            for name, seconds in zip(active, clock.settle(tickets), strict=True):
                timings[name].seconds.append(seconds)
    return timings
