"""`python -m loge_kernels`: info, check, bench and finetune. Each command parses, calls, prints, and sets the exit
status: 0 only on success, 1 on a failed check or bad input (one line on standard error), 130 after Ctrl-C."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__, finetune
from .bench.commands import bench_app
from .command_line import SETTINGS, Json, add_command, exit_with, split, write_json
from .finetune import FinetuneOptions
from .machine import version_of

app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings=SETTINGS, pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")


@app.callback()
def main() -> None:
    """Linear layers whose backward pass is cheap: exact LoRA, in 8 bits where that is faster, or a low-rank dX."""


@app.command()
def info(json_file: Json = None) -> None:
    """Versions, devices, backends and where the cache lies."""

    def work() -> bool:
        from .backend.choice import backends
        from .files import cache_dir

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts: dict[str, Any] = {
            "loge_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version_of(name) or "not installed" for name in ("triton", "transformers", "peft")},
            "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "gpu": ", ".join(devices) or "none",
            "cache": str(cache_dir() or "off"),
            "backends": [{"name": row.name, "available": row.available, "reason": row.reason} for row in backends()],
        }
        table = Table(show_header=False)
        for name, value in facts.items():
            if name != "backends":
                table.add_row(name, str(value))
        for row in facts["backends"]:
            table.add_row(
                f"backend {row['name']}", ("available: " if row["available"] else "not here: ") + row["reason"]
            )
        Console().print(table)
        write_json(json_file, facts)
        return True

    exit_with(work)


@app.command()
def check(
    backend: Annotated[str | None, typer.Option(help="Check this backend only; default: every available one.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16, bfloat16; repeat or separate by commas.")
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Take this many cases of the grid instead of all.")] = None,
    part: Annotated[str, typer.Option(help="Take the i-th of n equal parts of the grid: i/n.")] = "1/1",
    compile_for: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="Instead: compile every shipped Triton configuration for these architectures (sm_80,sm_90), without a "
            "GPU, and check spills, shared memory and tensor-core instructions.",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Hold every backend against float64 dense autograd, over awkward shapes and every combination of features."""
    from .check import harness

    def work() -> bool:
        if compile_for is not None:
            return _check_compiled(split([compile_for]), json_file)
        dtypes = tuple(split(dtype)) or None
        index, _, count = part.partition("/")
        if not (index.isdigit() and count.isdigit()):
            raise ValueError(f"--part {part!r} is not of the form i/n")
        with Progress(transient=True, console=Console(stderr=True)) as progress:
            task = progress.add_task("checking", total=None)
            report = harness.run(
                backend,
                device,
                dtypes,
                lambda what: progress.update(task, description=what, advance=1),
                sample,
                (int(index), int(count)),
            )
        report.print(Console())
        write_json(json_file, report.to_dict())
        return report.passed

    exit_with(work)


def _check_compiled(archs: Sequence[str], json_file: Path | None) -> bool:
    from dataclasses import asdict

    from .triton_kernels import compile_check

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=None)
        rows = compile_check.run(archs, progress=lambda done, total: progress.update(task, completed=done, total=total))
    version = version_of("triton") or "not installed"
    changed = compile_check.differences(rows, version)
    table = Table(title=f"Triton {version}, compiled without a GPU", title_justify="left")
    for heading in ("arch", "kernel", "registers", "spills", "shared bytes", "HMMA", "HGMMA", "verdict"):
        table.add_column(heading, justify="left" if heading in ("arch", "kernel", "verdict") else "right")
    for row in rows:
        verdict = f"[red]{'; '.join(row.problems)}[/red]" if row.problems else "[green]ok[/green]"
        numbers = (row.registers, row.spills, row.shared, row.hmma, row.hgmma)
        table.add_row(row.arch, row.name, *map(str, numbers), verdict)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    for line in changed:
        console.print(f"differs from the committed table: {line}")
    write_json(json_file, {"rows": [asdict(row) for row in rows], "differences": changed})
    return not changed and not any(row.problems for row in rows)


def _finetune(options: FinetuneOptions) -> None:
    try:
        finetune.run(options)
    except finetune.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        raise SystemExit(finetune.Interrupted.exit_status) from None


add_command(
    app,
    "finetune",
    FinetuneOptions,
    _finetune,
    "Fine-tune a real model with PEFT's LoRA and with other methods, LoGE first among them: a step of each in turn.",
)


if __name__ == "__main__":
    app()
