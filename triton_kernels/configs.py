"""Tile configurations: what they are, which ones ship, and which one serves a given (R, P, dtype).

A configuration serves a class of ranks, not a shape: M, N and K never enter, so that one compiled kernel serves them
all. The tables are JSON files beside this module, one per architecture (`sm_90.json`) or, once measured, per device
(`nvidia_h200.json`, looked up first); `resources.json` holds what the compiler made of each of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
TABLES = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class OneLaunchConfig:
    """A block owns block_m rows and walks N and K in steps of block_n and block_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class TwoLaunchConfig:
    """`project`: tiles [block_m, project_r] of T in steps of block_n. Then `expand_slab`, in steps of block_k with
    slab_stages of them in flight, where project_r holds all of R, else `expand_tiles`: tiles [block_m, tile_k] of dX in
    steps of tile_r."""

    block_m: int
    block_n: int
    project_r: int
    block_k: int
    slab_stages: int
    tile_k: int
    tile_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """Tiles [block_m, block_n] of y in steps of block_k, walked in groups of `group` row blocks."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """`exact_prepare`: a block owns block_n columns of dY and walks its rows in steps of block_m."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """`exact_product`: tiles [block_m, block_k] of dX in steps of block_n, walked in groups of `group` row blocks."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int


Config = OneLaunchConfig | TwoLaunchConfig | ForwardConfig | PrepareConfig | ProductConfig
KINDS: dict[str, type[Config]] = {
    "one_launch": OneLaunchConfig,
    "two_launch": TwoLaunchConfig,
    "forward": ForwardConfig,
    "exact_prepare": PrepareConfig,
    "exact_product": ProductConfig,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """`config` serves kernel `kernel` for elements of `bits` bits, padded ranks up to `rank` and `adapter`, and rows
    that are 16-byte aligned or not. The bits of `exact_product` are those of its operands, 8 where they are scaled."""

    kernel: str
    bits: int
    rank: int
    adapter: int
    aligned: bool
    config: Config

    def serves(self, kernel: str, bits: int, rank: int, adapter: int, aligned: bool) -> bool:
        same = (self.kernel, self.bits, self.aligned) == (kernel, bits, aligned)
        return same and rank <= self.rank and adapter <= self.adapter


# In the interpreter a tile costs the same whatever its shape, and small problems must still have several of them.
INTERPRETER_TABLE = tuple(
    Entry(kernel, bits, 1 << 16, 256, aligned, config)
    for kernel, config in (
        ("one_launch", OneLaunchConfig(32, 32, 32, 4, 2)),
        ("two_launch", TwoLaunchConfig(32, 32, 64, 32, 2, 32, 32, 4, 2)),
        ("forward", ForwardConfig(64, 128, 128, 2, 4, 2)),
        ("exact_prepare", PrepareConfig(64, 128, 4, 2)),
        ("exact_product", ProductConfig(64, 128, 128, 2, 4, 2)),
    )
    for bits in (8, 16, 32)
    for aligned in (False, True)
)


def padded(rank: int) -> int:
    """The width of a rank's tile: the next power of two, at least the 16 that tensor cores multiply."""
    return max(16, 1 << max(rank - 1, 0).bit_length())


def tile_k(config: TwoLaunchConfig, dropout: bool) -> int:
    """The columns of a tile of `expand_tiles`: what the mask falls on, beside the sum, leaves registers for half."""
    return config.tile_k // 2 if dropout else config.tile_k


def device_slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" -> "nvidia_h200"."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def to_json(entries: tuple[Entry, ...], device: str, source: str, rates: dict[str, Any] | None = None) -> str:
    """A table as text; `parse_table` is its inverse. `rates`: measured ones, which `tuning` reads."""
    rows = [dataclasses.asdict(entry) for entry in entries]
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    head = f'{{\n  "schema": {SCHEMA},\n  "device": {json.dumps(device)},\n  "source": {json.dumps(source)},\n'
    head += f'  "rates": {json.dumps(rates)},\n' if rates else ""
    return head + f'  "entries": [\n{lines}\n  ]\n}}\n'


def parse_table(text: str, device: str) -> tuple[Entry, ...]:
    """The entries of a table for `device`. Raises ValueError, saying what is wrong, on any other text."""
    table = json.loads(text)
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise ValueError(f"not a table of schema {SCHEMA}")
    if table.get("device") != device:
        raise ValueError(f"written for device {table.get('device')!r}, not {device!r}")
    rows = table.get("entries")
    if not isinstance(rows, list):
        raise ValueError("no list of entries")
    return tuple(_parse_entry(row) for row in rows)


def _parse_entry(row: Any) -> Entry:
    if not isinstance(row, dict) or set(row) != {field.name for field in dataclasses.fields(Entry)}:
        raise ValueError(f"an entry has other fields than Entry: {row!r}")
    kind = KINDS.get(row["kernel"])
    if kind is None or row["bits"] not in (8, 16, 32) or not isinstance(row["aligned"], bool):
        raise ValueError(f"unknown kernel, bits or alignment: {row!r}")
    numbers = row["config"]
    if not isinstance(numbers, dict) or set(numbers) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"a configuration has other fields than {kind.__name__}: {numbers!r}")
    for name, value in [*numbers.items(), ("rank", row["rank"]), ("adapter", row["adapter"])]:
        if type(value) is not int or not 1 <= value <= 1 << 16:
            raise ValueError(f"{name}={value!r} is not a positive size")
        power_of_two = value & (value - 1) == 0
        if not power_of_two and name not in ("num_stages", "slab_stages", "group", "rank", "adapter"):
            raise ValueError(f"{name}={value} is not a power of two")
        if name.startswith(("block_", "project_", "tile_")) and not 16 <= value <= 256:
            raise ValueError(f"{name}={value} is not between 16 and 256")
        if (name == "num_warps" and value > 16) or (name in ("num_stages", "slab_stages") and value > 8):
            raise ValueError(f"{name}={value} is more than any device runs")
    return Entry(row["kernel"], row["bits"], row["rank"], row["adapter"], row["aligned"], kind(**numbers))


@functools.cache
def shipped(name: str) -> tuple[Entry, ...]:
    """The shipped table of an architecture or a device; empty where none ships."""
    path = TABLES / f"{name}.json"
    return parse_table(path.read_text(), name) if path.exists() else ()


def uses_wgmma(capability: tuple[int, int], bits: int) -> bool:
    """Whether products of `bits`-bit elements run on instructions that want 64 accumulator rows."""
    return capability[0] >= 9 and capability[0] != 12 and bits == 16


def architecture(capability: tuple[int, int]) -> str:
    """The table that serves a compute capability: Ampere's tiles where shared memory or wgmma are missing."""
    return "sm_90" if capability[0] >= 9 and capability[0] != 12 else "sm_80"


def best_entry(
    tables: tuple[tuple[Entry, ...], ...], kernel: str, bits: int, rank: int, adapter: int, aligned: bool
) -> Entry | None:
    """The tightest entry of all tables, the earlier table's where two are equally tight; ranks are padded ones."""
    fitting = [
        (entry.rank, entry.adapter, order, entry)
        for order, table in enumerate(tables)
        for entry in table
        if entry.serves(kernel, bits, rank, adapter, aligned)
    ]
    return min(fitting, key=lambda found: found[:3])[3] if fitting else None
