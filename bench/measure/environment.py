"""What a result must carry to be read later: versions, device, git commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from loge_kernels.machine import version_of

_PACKAGES = ("loge_kernels", "torch", "triton", "peft", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-able: date, versions, device, threads, the commit of the checkout (None outside one), load average."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}},
        "device": device_name(device),
        "device_type": device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The checkout's commit, "-dirty" appended when tracked files differ; None when this is not a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        # `ls-files` below fails for a file that git does not track: an installed copy inside somebody's repository.
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        sha = git("rev-parse", "HEAD")
        return f"{sha}-dirty" if git("status", "--porcelain", "--untracked-files=no") else sha
    except (OSError, subprocess.SubprocessError):
        return None
