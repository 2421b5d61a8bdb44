"""Peak memory of a phase of the process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory of what runs inside `with meter:`, in bytes, in `meter.bytes`; `meter.measures` says of what.

    On CUDA: torch's peak of allocated memory, weights included. On the CPU: how far the resident set grew above its
    size when the meter was made, from the kernel's own high-water mark, which Linux lets a process reset, else from
    samples every 5 ms (needs psutil); None where neither is to be had.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self.bytes: int | None = None
        if device.type == "cuda":
            self.measures = "torch.cuda.max_memory_allocated, weights included"
        elif _reset_high_water():
            self.measures = "growth of the resident set (VmHWM) above the loaded model"
        elif importlib.util.find_spec("psutil"):
            self.measures = "growth of the resident set (sampled every 5 ms) above the loaded model"
        else:
            self.measures = "not measured (install psutil)"
        self._sampler: _Sampler | None = None
        if device.type == "cpu":
            _return_free_memory()
            self._base = _resident() or 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        _return_free_memory()
        if not _reset_high_water() and importlib.util.find_spec("psutil"):
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        peak = _status("VmHWM") if self._sampler is None else self._sampler.finish()
        self.bytes = None if peak is None else max(0, peak - self._base)


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak = 0

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, _resident() or 0)

    def finish(self) -> int:
        self._done.set()
        self.join()
        return self._peak


def _reset_high_water() -> bool:
    """Set VmHWM back to the present size; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _resident() -> int | None:
    resident = _status("VmRSS")
    if resident is None and importlib.util.find_spec("psutil"):
        import psutil

        resident = psutil.Process().memory_info().rss
    return resident


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def _return_free_memory() -> None:
    """Give freed heap back to the system, so that one phase's leavings do not count for the next."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
