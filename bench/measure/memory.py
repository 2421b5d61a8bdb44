"""Peak memory of a call: what the allocator held at most beyond what it held before.

On CUDA the caching allocator keeps that count. On a CPU the profiler reports every allocation and release of torch's
CPU allocator, and the count is their running sum; workspaces that MKL and oneDNN take from the C library are outside
it, as is anything that the allocator rounds up.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def with_peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """(the call's result, peak bytes during the call above those held at its start)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        result = call()
    finally:
        with _quiet_stderr():
            profiler.stop()
    return result, _peak(profiler)


def _peak(profiler: profile) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _quiet_stderr():
            profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Kineto announces each start and stop on file descriptor 2, whatever the log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
