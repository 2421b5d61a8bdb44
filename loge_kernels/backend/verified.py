"""Which backends have passed the correctness harness on this machine.

A kernel is not chosen by "auto" on a GPU until `python -m loge_kernels check --device cuda` has passed there. The
record holds for one GPU model and one set of versions, in `verified.json` under the cache directory.
"""

from __future__ import annotations

import functools
import json
import logging

import torch

from ..files import DAMAGED, cache_dir, make_private, replacing
from ..machine import version_of

logger = logging.getLogger("loge_kernels")

_FILE = "verified.json"


def environment(backend: str, device: torch.device) -> str:
    """What a record holds for: the backend, the GPU's name and the versions that make its code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = " ".join(f"{package} {version_of(package) or 'none'}" for package in ("loge_kernels", "triton"))
    return f"{backend} | {name} | torch {torch.__version__} | {packages}"


def record(backend: str, device: torch.device) -> None:
    """Remember that `backend` has passed on `device`. Where the cache cannot be written the log says so."""
    directory = cache_dir()
    if directory is None:
        logger.warning("LOGE_CACHE=off: the passed check is not recorded, and 'auto' will not choose %r", backend)
        return
    try:
        make_private(directory)
        names = sorted({*_read(), environment(backend, device)})
        with replacing(directory / _FILE, private=True) as temporary:
            temporary.write_text(json.dumps({"verified": names}, indent=2))
    except OSError as error:
        logger.warning("the passed check of %r could not be recorded: %s", backend, error)
    is_verified.cache_clear()


@functools.cache
def is_verified(backend: str, device: torch.device) -> bool:
    """Whether `record` was called for this backend, GPU and these versions."""
    return environment(backend, device) in _read()


def _read() -> list[str]:
    directory = cache_dir()
    if directory is None:
        return []
    try:
        names = json.loads((directory / _FILE).read_text())["verified"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("'verified' is no list of names")
        return names
    except FileNotFoundError:
        return []
    except DAMAGED as error:
        logger.warning("ignoring the damaged file %s (%s)", directory / _FILE, error)
        return []
