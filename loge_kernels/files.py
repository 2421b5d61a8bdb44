"""Files: the folder that keeps what is expensive to compute again, and files that are written whole or not at all.

The folder is `$LOGE_CACHE`, or `loge_kernels` under `$XDG_CACHE_HOME` or `~/.cache`; `LOGE_CACHE=off`, or a user
without a home directory, keeps nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger("loge_kernels")

# What reading a file raises that is cut short, or was written by somebody else.
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@contextlib.contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix, that takes its place on success and vanishes on failure.
    `private`: readable by its owner alone, whatever the umask says."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if not private:
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is not what the user's other files have
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir() -> Path | None:
    """Where this package keeps what is expensive to compute again; None when `LOGE_CACHE=off`, or for want of a home
    directory, which the logger says once."""
    chosen = os.environ.get("LOGE_CACHE")
    if chosen == "off":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loge_kernels"
    except RuntimeError:  # neither HOME nor an entry for this user in the system's list, as in some containers
        _tell_homeless(chosen)
        return None


@functools.cache
def _tell_homeless(chosen: str | None) -> None:
    place = f"LOGE_CACHE={chosen!r} needs one" if chosen else "neither HOME nor XDG_CACHE_HOME is set"
    logger.warning(
        "this user has no home directory, and %s: nothing is kept between runs, neither factors nor what "
        "`loge_kernels check` has verified; set LOGE_CACHE to a folder, or to 'off'",
        place,
    )


def make_private(directory: Path) -> None:
    """Create a directory and what is missing above it, each for its owner alone (mkdir's mode covers the last only)."""
    for level in reversed((directory, *directory.parents)):
        if not level.exists():
            level.mkdir(mode=0o700, exist_ok=True)
