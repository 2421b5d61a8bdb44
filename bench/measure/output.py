"""How results are shown and kept: tables, CSV, JSON, the plot."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..linear.rows import Row

_BASELINES = ("dense", "peft", "exact", "unfused")
_WIDEST = 200  # columns


def check_writable(*paths: Path | None) -> None:
    """Raise ValueError now, not after minutes of measuring, for a file that cannot be written."""
    for path in paths:
        if path is None:
            continue
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
            raise ValueError(f"cannot write {path}: not a file that can be written there")


def without_files(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say what was measured: where the results went is not among them."""
    return {name: value for name, value in options.items() if name not in ("json", "csv", "png")}


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return ""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def size(count: int | None) -> str:
    """Bytes in MiB or GiB."""
    if count is None:
        return ""
    return f"{count / 2**20:.4g} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def rate(per_second: float | None) -> str:
    return "" if per_second is None else f"{per_second:.3g}"


@contextlib.contextmanager
def spinner(console: Console, doing: str) -> Iterator[Callable[[str], None]]:
    """A spinner beside what is being done, and the seconds since; yields what changes the text."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda message: progress.update(task, description=message)


def print_heading(console: Console, report: dict[str, Any]) -> None:
    """The device, its ceilings, the versions."""
    environment = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    load = environment["load_average"]
    busy = f", load average {load[0]:.1f}" if load else ""
    console.print(
        f"[bold]{environment['device']}[/bold], {environment['threads']} threads{busy}; {versions}", soft_wrap=True
    )
    if load and report["environment"]["device_type"] == "cpu" and load[0] > 1.5:
        console.print(
            "other processes are using this CPU: times and ratios below are noisy", style="yellow", soft_wrap=True
        )
    for dtype, ceilings in report["ceilings"].items():
        console.print(
            f"ceilings in {dtype}: copy {ceilings['copy'] / 1e9:.3g} GB/s, "
            f"matrix product {ceilings['matmul'] / 1e12:.3g} TFLOP/s"
            f" (torch's own a @ b: {ceilings['plain_nn'] / 1e12:.3g}, a @ b.t(): {ceilings['plain_nt'] / 1e12:.3g})",
            soft_wrap=True,
        )


def table(left: Iterable[str], right: Iterable[str], title: str | None = None) -> Table:
    """A table as every benchmark prints it: no cell is wrapped. left, right: headings, by how their columns are
    aligned."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in left:
        made.add_column(heading, no_wrap=True)
    for heading in right:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def print_case(console: Console, title: str, direction: str, rows: Sequence[Row]) -> None:
    """One table: every candidate of a case. It keeps its width where lines are shorter: nothing is cut."""
    baselines = [name for name in _BASELINES if any(name in row.speedup for row in rows)]
    predicted = any(row.predicted_seconds for row in rows)
    headings = (
        "by",
        "median",
        *(["predicted"] * predicted),
        "eager",
        "p10-p90",
        "runs",
        "TFLOP/s",
        "GB/s",
        "% roof",
        *(f"x {name}" for name in baselines),
        "peak",
    )
    printed = table(("candidate",), headings)
    for row in rows:
        if row.status == "not run":
            printed.add_row(f"[dim]{row.candidate}[/dim]", "[yellow]not run[/yellow]")
            continue
        spread = f"{duration(row.p10)}-{duration(row.p90)}" if row.runs > 1 else "cold"
        foretold = [duration(row.predicted_seconds) if row.predicted_seconds else ""] * predicted
        times = [duration(row.seconds), *foretold, duration(row.eager_seconds)]
        start = [row.candidate, row.mode, *times, spread, str(row.runs)]
        if row.status == "wrong result":
            printed.add_row(*start, "[red]wrong[/red]", "[red]result[/red]")
            continue
        speedups = [f"{row.speedup[name]:.2f}" if name in row.speedup else "" for name in baselines]
        share = f"{100 * (row.roofline or 0):.0f}"
        memory = size(row.peak_bytes)
        printed.add_row(*start, rate(row.tflops), rate(row.gbytes_per_second), share, *speedups, memory)
    console.print(f"\n[bold]{title}, {direction}[/bold]", highlight=False, soft_wrap=True)
    print_wide(console, printed)
    for row in rows:
        if row.graph_note:
            console.print(
                f"  {row.candidate} in no CUDA graph: {row.graph_note}", style="yellow", highlight=False, soft_wrap=True
            )
        if row.status == "not run":
            console.print(f"  {row.candidate} not run: {row.note}", style="yellow", highlight=False, soft_wrap=True)
        elif row.status == "wrong result":
            message = f"  {row.candidate} gives a wrong result: {row.note}"
            console.print(message, style="red", highlight=False, soft_wrap=True)


def print_wide(console: Console, table: Table) -> None:
    """Print a table at its full width: a wrapped line can be read, a cut column cannot."""
    width = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    own = console.width
    console.width = max(own, width)
    try:
        console.print(table, crop=False, highlight=False)
    finally:
        console.width = own


def write(report: dict[str, Any], json_file: Path | None, csv_file: Path | None = None) -> None:
    """Write the report as JSON and its rows as CSV, each in one replacement of the file."""
    if json_file:
        replace_file(json_file, json.dumps(report, indent=1) + "\n")
    if csv_file:
        write_csv([_flat(row, report) for row in report["rows"]], csv_file)


def write_csv(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a line for each of `lines`, whose names are the columns, in one replacement of the file."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    temporary = _temporary(path)
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    temporary.replace(path)


def identity(environment: dict[str, Any]) -> dict[str, Any]:
    """What says on every CSV line where and when it was measured."""
    versions = {f"version_{name}": version for name, version in environment["versions"].items()}
    return versions | {name: environment[name] for name in ("device", "threads", "commit", "date")}


def replace_file(path: Path, text: str) -> None:
    """Write `text` in one replacement of the file: a reader, or a run that is stopped, sees the old one or the new."""
    temporary = _temporary(path)
    temporary.write_text(text)
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")


def _flat(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """One CSV line: nested values spread over columns, and what identifies the run on every line."""
    flat = {name: value for name, value in row.items() if name not in ("speedup", "verdicts")}
    flat |= {f"speedup_{name}": row.get("speedup", {}).get(name) for name in _BASELINES}
    for result, verdict in row.get("verdicts", {}).items():
        flat[f"error_ratio_{result}"] = verdict["ratio"]
    flat |= identity(report["environment"])
    options = report["options"]
    return flat | {name: options[name] for name in ("direction", "seed") if name in options}


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up against R, one panel per shape, M, P and dtype, with the ceiling that the flops allow. PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["kind"] in ("loge", "unfused") and row["rank"] is not None:
            key = tuple(row[name] for name in ("shape", "M", "N", "K", "P", "dtype"))
            panels.setdefault(key, []).append(row)
    columns = min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.9 * lines), squeeze=False)
    direction = report["options"]["direction"]
    for axis, (key, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, key, rows, direction)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{direction} of a frozen linear with LoRA, {report['environment']['device']}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, key: tuple[Any, ...], rows: list[dict[str, Any]], direction: str) -> None:
    from .roofline import speedup_ceiling

    shape, M, N, K, P, dtype = key
    measured = [row for row in rows if row["status"] == "ok" and row["speedup"]]
    styles = {"dense": ("o", ":"), "peft": ("s", "-"), "exact": ("^", "--"), "unfused": ("v", "-.")}
    candidates = list(dict.fromkeys(row["candidate"].rsplit(" R=", 1)[0] for row in measured))
    for number, candidate in enumerate(candidates):
        own = [row for row in measured if row["candidate"].rsplit(" R=", 1)[0] == candidate]
        for baseline, (marker, line) in styles.items():
            points = sorted((row["rank"], row["speedup"][baseline]) for row in own if baseline in row["speedup"])
            # Of the composition only the gain over exact LoRA is of interest: the rest is the backends' story.
            if points and (candidate != "unfused" or baseline == "exact"):
                axis.plot(
                    *zip(*points, strict=True),
                    marker=marker,
                    linestyle=line,
                    color=f"C{number}",
                    markersize=4,
                    label=f"{candidate} over {baseline}",
                )
    ranks = sorted({row["rank"] for row in rows})
    low, high = ranks[0], max(ranks[-1], ranks[0] + 1)
    curve = [low + (high - low) * i / 60 for i in range(61)]
    formula = "1/f" if direction == "backward" else "2/(1+f)"
    axis.plot(
        curve,
        [speedup_ceiling(direction, N, K, R) for R in curve],
        color="black",
        linewidth=1,
        label=f"{formula}: all that the flops allow",
    )
    axis.axhline(1, color="grey", linewidth=0.6)
    axis.set_title(f"{shape}  M={M} N={N} K={K} P={P} {dtype}", fontsize=8)
    axis.set_xlabel("R", fontsize=8)
    axis.set_ylabel("speed-up", fontsize=8)
    if any(value > 8 for row in measured for value in row["speedup"].values()):
        axis.set_yscale("log")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=6)
