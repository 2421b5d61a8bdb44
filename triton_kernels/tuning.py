"""The user's own table of tuned configurations and measured rates: read with suspicion, written under a lock.

`$LOGE_CACHE/triton/<device>.json`, or under `loge_kernels` in `$XDG_CACHE_HOME` or `~/.cache`; nowhere when
`LOGE_CACHE=off`, or for a user without a home directory. Nothing is tuned inside a user's call: `bench --tune` measures
and writes, everything else reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .configs import Config, Entry, ForwardConfig, OneLaunchConfig, TwoLaunchConfig, parse_table, to_json
from .rates import MEASURED

logger = logging.getLogger("loge_kernels")

_warned: set[Path] = set()


def table_path(slug: str) -> Path | None:
    """Where the user's table of a device lies; None when LOGE_CACHE=off, or for want of a home directory."""
    chosen = os.environ.get("LOGE_CACHE")
    if chosen == "off":
        return None
    try:
        base = Path(chosen).expanduser() if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return (base if chosen else base / "loge_kernels") / "triton" / f"{slug}.json"


def read_table(slug: str) -> tuple[Entry, ...]:
    """The user's entries for a device; none where there is no file, and none, with one warning, where the file is
    damaged, of another schema or of another device."""
    return _read(slug)[0]


def read_rates(slug: str) -> dict[str, Any]:
    """The user's measured rates for a device, fields of `rates.DeviceSpec`; from the same file, with the same
    suspicion."""
    return _read(slug)[1]


def _read(slug: str) -> tuple[tuple[Entry, ...], dict[str, Any]]:
    path = table_path(slug)
    if path is None:
        return (), {}
    try:
        text = path.read_text()
        return parse_table(text, slug), _parse_rates(json.loads(text).get("rates", {}))
    except FileNotFoundError:
        return (), {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if path not in _warned:
            _warned.add(path)
            logger.warning("ignoring the table of tuned configurations %s: %s", path, error)
        return (), {}


def _parse_rates(rates: Any) -> dict[str, Any]:
    """What may stand in the place of a device's shipped rates. Raises ValueError, saying what is wrong, otherwise."""
    if not isinstance(rates, dict):
        raise ValueError(f"rates are no object: {rates!r}")
    parsed: dict[str, Any] = {}
    for name, value in rates.items():
        if name not in MEASURED:
            raise ValueError(f"no measured rate is called {name!r}")
        if name == "narrow":
            parsed[name] = tuple((_number("width", width), _number(name, share)) for width, share in value)
            widths = [width for width, _ in parsed[name]]
            if not widths or widths != sorted(set(widths)):
                raise ValueError(f"the widths of narrow products do not rise: {widths}")
        else:
            parsed[name] = _number(name, value)
    return parsed


def _number(name: str, value: Any) -> float:
    low, high = MEASURED.get(name, (1, 1 << 16))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not between {low} and {high}")
    return value


def write_entries(slug: str, entries: Iterable[Entry], source: str) -> Path:
    """Merge `entries` into the user's table and return its path; an entry replaces the one of the same class.

    Two processes may tune at once: the merge happens under a lock, and the file is replaced whole. Raises ValueError
    when there is none, OSError when the directory cannot be written.
    """
    return _write(slug, tuple(entries), {}, source)


def write_rates(slug: str, rates: dict[str, Any], source: str) -> Path:
    """The same for measured rates: one replaces the one of its name. Raises ValueError also for what cannot be one."""
    return _write(slug, (), _parse_rates(rates), source)


def _write(slug: str, entries: tuple[Entry, ...], rates: dict[str, Any], source: str) -> Path:
    path = table_path(slug)
    if path is None:
        raise ValueError(
            "there is no cache to write tuned configurations to (LOGE_CACHE=off, or a user without a home directory): "
            "set LOGE_CACHE to a folder"
        )
    for folder in (path.parent.parent, path.parent):  # mkdir's mode is for the last level alone
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        known, known_rates = _read(slug)
        merged = {_class(entry): entry for entry in (*known, *entries)}
        ordered = tuple(merged[key] for key in sorted(merged))
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(to_json(ordered, slug, source, known_rates | rates))
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def _class(entry: Entry) -> tuple[str, int, int, int, bool]:
    return entry.kernel, entry.bits, entry.rank, entry.adapter, entry.aligned


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock held by an open file: the system drops it with the process, so a crash leaves none behind."""
    import fcntl  # not on Windows, where Triton does not run either

    with path.open("a") as file:  # which leaves a file alone that it should not have met
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def search_space(kernel: str, bits: int, rank: int, adapter: int) -> Iterator[Config]:
    """What `bench --tune` measures for a class: tiles around the shipped ones, without those whose accumulators or
    tiles cannot fit (fp32 accumulators of at most 160 registers a thread, 227 KiB of shared memory)."""
    size = bits // 8
    if kernel == "one_launch":
        for block_m in (64, 128) if bits == 16 else (16, 32):
            for step in (32, 64, 128) if bits == 16 else (16, 32):
                for num_warps in (4, 8):
                    for num_stages in (2, 3, 4):
                        width = rank + adapter
                        stage = step * (block_m + width) * size
                        if block_m * width / (32 * num_warps) <= 160 and stage * num_stages <= 227 * 1024:
                            yield OneLaunchConfig(block_m, step, step, num_warps, num_stages)
    elif kernel == "two_launch":
        for block_m in (64, 128):
            for project_r in (64, 128, 256):
                for tile_k in (128, 256):
                    for num_stages in (2, 3, 4):
                        if block_m * (project_r + adapter) / 256 <= 160:
                            yield TwoLaunchConfig(block_m, 64, project_r, 64, 2, tile_k, 64, 8, num_stages)
    else:
        for block_n in (128, 256):
            for num_stages in (3, 4):
                yield ForwardConfig(128, block_n, 64, 8, 8, num_stages)
