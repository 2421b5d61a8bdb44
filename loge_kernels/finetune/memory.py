"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def growth(device: torch.device, work: Callable[[], None]) -> int | None:
    """Do `work`; how many bytes its peak is above what was in memory before: of torch's allocations on CUDA, of the
    resident set elsewhere. None where the system keeps no high-water mark that can be reset, as only Linux does.

    What comes before `work` takes a moment: freed heap goes back to the system, so that it is not used unseen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    known = _reset_high_water()
    before = _status("VmRSS") or 0
    work()
    return max(0, (_status("VmHWM") or 0) - before) if known else None


def _reset_high_water() -> bool:
    """Set VmHWM back to the present size; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None
