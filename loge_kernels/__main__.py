"""`python -m loge_kernels`: info, check, bench and finetune. Each command parses, calls, prints, and sets the exit
status: 0 only on success, 1 on a failed check or bad input (one line on standard error), 130 after Ctrl-C."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperGroup

from . import __version__

_PANICS = (ValueError, TypeError, OSError)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]


class _DefaultCommand(TyperGroup):
    """`bench` without a subcommand's name is `bench linear`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["linear", *args]
        return super().parse_args(ctx, args)


_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True, add_completion=False, context_settings=_SETTINGS, pretty_exceptions_enable=False
)
bench_app = typer.Typer(cls=_DefaultCommand, context_settings=_SETTINGS, help="Measure speed against the baselines.")
app.add_typer(bench_app, name="bench")


@app.callback()
def main() -> None:
    """Linear layers whose backward pass is cheap: full weight forward, low-rank activation gradient, exact LoRA."""


@app.command()
def info(json_file: JsonOption = None) -> None:
    """Versions, devices, backends and where the cache lies."""

    def work() -> bool:
        from .backends import backends
        from .cache import cache_dir

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts: dict[str, Any] = {
            "loge_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "transformers", "peft")},
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
        _write_json(json_file, facts)
        return True

    _exit(work)


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
    json_file: JsonOption = None,
) -> None:
    """Hold every backend against float64 dense autograd, over awkward shapes and every combination of features."""
    from . import check as harness

    def work() -> bool:
        if compile_for is not None:
            return _check_compiled(_split([compile_for]), json_file)
        dtypes = tuple(_split(dtype)) or None
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
        _write_json(json_file, report.to_dict())
        return report.passed

    _exit(work)


def _check_compiled(archs: Sequence[str], json_file: Path | None) -> bool:
    from dataclasses import asdict

    from .triton_kernels import compile_check

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=None)
        rows = compile_check.run(archs, progress=lambda done, total: progress.update(task, completed=done, total=total))
    changed = compile_check.differences(rows, _version("triton"))
    table = Table(title=f"Triton {_version('triton')}, compiled without a GPU", title_justify="left")
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
    _write_json(json_file, {"rows": [asdict(row) for row in rows], "differences": changed})
    return not changed and not any(row.problems for row in rows)


@bench_app.command("linear")
def bench_linear(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(help="Model names (SmolLM2-135M, LLaMA-2-7B, LLaMA-3-8B, Qwen2.5-7B) or M,N,K."),
    ] = None,
    rows: Annotated[list[str] | None, typer.Option("--rows", "-M", help="M, tokens: a list.")] = None,
    rank: Annotated[list[str] | None, typer.Option("--rank", "-R", help="R: ints, or shares of min(N, K).")] = None,
    lora_rank: Annotated[list[str] | None, typer.Option("--lora-rank", "-P", help="P: a list.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16: a list.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    direction: Annotated[str, typer.Option(help="forward+backward or backward.")] = "forward+backward",
    budget: Annotated[float, typer.Option(help="Seconds of measured rounds for each case.")] = 20.0,
    slow_limit: Annotated[
        float, typer.Option(help="Leave out a baseline predicted to take longer than this many seconds a call.")
    ] = 180.0,
    json_file: JsonOption = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Instead: measure the Triton configurations for these problems and keep the best in the user's cache.",
        ),
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows to this file, as CSV.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw speed-up against R into this file.")] = None,
) -> None:
    """One frozen linear layer with LoRA: every backend against the dense product, PEFT and the unfused composition.

    Lists are given by repeating an option or separating values by commas. No speed-up is printed for a wrong result.
    """

    def work() -> bool:
        from .bench import micro

        given: dict[str, Any] = {
            "rows": tuple(_numbers("rows", rows)),
            "ranks": tuple(_numbers("rank", rank)),
            "lora_ranks": tuple(_numbers("lora-rank", lora_rank)),
            "dtypes": tuple(_split(dtype)),
        }
        given = {name: value for name, value in given.items() if value}
        if tune:
            from .bench import tune as tuner

            wanted = tuner.TuneOptions(
                shapes=tuple(shapes or ()), device=device, budget=budget, json=json_file, **given
            )
            return bool(tuner.run(wanted)["passed"])
        options = micro.MicroOptions(
            shapes=tuple(shapes or ()),
            device=device,
            direction=direction,
            budget=budget,
            slow_limit=slow_limit,
            json=json_file,
            csv=csv,
            png=png,
            **given,
        )
        return bool(micro.run(options)["passed"])

    _exit(work)


@bench_app.command("step")
def bench_step(
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 2048,
    intermediate: Annotated[int, typer.Option(help="Width of its MLP.")] = 5632,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 32,
    kv_heads: Annotated[int | None, typer.Option(help="Heads of keys and values; default: as many.")] = None,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 5824,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 2,
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    rank: Annotated[str, typer.Option("--rank", "-R", help="R: an int, or a share of min(N, K).")] = "0.0625",
    lora_rank: Annotated[int, typer.Option("--lora-rank", "-P", help="P, on every linear of the blocks.")] = 16,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16: a list.")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Of peft, exact, loge: a list.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds of measured rounds for each dtype.")] = 120.0,
    slow_limit: Annotated[float, typer.Option(help="Leave PEFT out above this many predicted seconds a step.")] = 180.0,
    json_file: JsonOption = None,
) -> None:
    """A training step of a LLaMA-shaped model with random weights: PEFT's exact LoRA, the same through this package's
    op, and the low-rank backward, in turn."""

    def work() -> bool:
        from .bench import step

        given: dict[str, Any] = {"dtypes": tuple(_split(dtype)), "methods": tuple(_split(methods))}
        options = step.StepOptions(
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            vocab=vocab,
            batch=batch,
            seq=seq,
            rank=_number("rank", rank),
            lora_rank=lora_rank,
            device=device,
            budget=budget,
            slow_limit=slow_limit,
            json=json_file,
            **{name: value for name, value in given.items() if value},
        )
        return bool(step.run(options)["passed"])

    _exit(work)


@app.command()
def finetune(
    model: Annotated[
        str | None, typer.Option(help="A directory, a .gguf file or a hub id; default: SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Files to train on; default: Python's standard library.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the dense backward flops to spend on exact steps in 8 bits, in turn with cheap ones; "
            "default: 0.25, unless --rank, --subspace or --exact-every is given.",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(help="Rank of the factors in cheap steps: an int, or a share of min(N, K); default: 0.125."),
    ] = None,
    subspace: Annotated[
        str | None,
        typer.Option(help="svd, random or dropped; default: svd, or dropped where --budget comes without --rank."),
    ] = None,
    exact_every: Annotated[
        float | None, typer.Option(help="One step in so many is exact, instead of --budget.")
    ] = None,
    exact_dtype: Annotated[
        str | None, typer.Option(help="float8 or int8, of exact products; default: under a budget, what is fast here.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers with adapters, by name; default: every linear of the blocks.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.")] = 40,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 2,
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 128,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of the adapters' start and of the batches.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    out: Annotated[Path, typer.Option(help="Where metrics, curves and adapters go.")] = Path("out"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Fine-tune a real model twice from the same start on the same batches: exact LoRA, and LoGE."""
    from .finetune import FinetuneOptions, Interrupted, run

    def work() -> bool:
        options = FinetuneOptions(
            model=model,
            text=tuple(text or ()),
            budget=budget,
            rank=None if rank is None else _number("rank", rank),
            subspace=subspace,
            exact_every=exact_every,
            exact_dtype=exact_dtype,
            lora_rank=lora_rank,
            targets=_split(targets) or None,
            dtype=dtype,
            steps=steps,
            batch=batch,
            seq=seq,
            lr=lr,
            seed=seed,
            device=device,
            out=out,
            resume=resume,
            json=json_file,
        )
        try:
            run(options)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            raise SystemExit(Interrupted.exit_status) from None
        return True

    _exit(work)


def _exit(work: Callable[[], bool]) -> None:
    """Run a command's work; leave with its status. What the user can put right is one line on standard error."""
    try:
        passed = work()
    except _PANICS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if passed else 1)


def _split(values: Sequence[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _numbers(option: str, values: Sequence[str] | None) -> list[int | float]:
    return [_number(option, value) for value in _split(values)]


def _number(option: str, text: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--{option} {text!r} is not a number") from None


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    app()
