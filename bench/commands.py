"""`python -m loge_kernels bench`: one command a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loge_kernels.command_line import SETTINGS, JsonOption, leave, numbers, split

from . import classify, fidelity, pretrain, scale, scratch, step
from .options import Device, add_command


class _DefaultCommand(TyperGroup):
    """`bench` without a subcommand's name is `bench linear`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["linear", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_DefaultCommand, context_settings=SETTINGS, help="Measure speed, and what is learnt, against the baselines."
)


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
    device: Device = "auto",
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
        from . import micro

        given: dict[str, Any] = {
            "rows": tuple(numbers("rows", rows)),
            "ranks": tuple(numbers("rank", rank)),
            "lora_ranks": tuple(numbers("lora-rank", lora_rank)),
            "dtypes": tuple(split(dtype)),
        }
        given = {name: value for name, value in given.items() if value}
        if tune:
            from . import tune as tuner

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

    leave(work)


add_command(
    bench_app,
    "step",
    step.StepOptions,
    step.run,
    "A training step of a LLaMA-shaped model with random weights, in turn: PEFT's exact LoRA, the same through this "
    "package's op, and what --policy names. With --on-paper it is predicted for a GPU instead.",
)
add_command(
    bench_app,
    "fidelity",
    fidelity.FidelityOptions,
    fidelity.run,
    "The time in which each policy comes to exact LoRA's held-out loss on a real model, measured here and predicted "
    "for a GPU.\n\nInterrupted, it goes on with the same --json where it stopped; policies and seeds can be added.",
)
add_command(
    bench_app,
    "scratch",
    scratch.ScratchOptions,
    scratch.run,
    "Train a wide LLaMA from nothing for a few minutes, for `bench fidelity --model` where no pretrained model of that "
    "width is at hand.",
)
add_command(
    bench_app,
    "scale",
    scale.ScaleOptions,
    scale.run,
    "On paper, not measured: what PEFT and this package send under FSDP2 and DDP, and how long their steps take on 8 "
    "to 1024 GPUs, from counted collectives and published link speeds.",
)
add_command(
    bench_app,
    "classify",
    classify.ClassifyOptions,
    classify.run,
    "A real encoder on a real classification text: exact LoRA, the same through apply, low rank, and frozen layers.",
)
add_command(
    bench_app,
    "pretrain",
    pretrain.PretrainOptions,
    pretrain.run,
    "A small LLaMA from scratch on real text: every parameter, LoRA and SwitchLoRA, by held-out loss.\n\nThe exit "
    "status says whether SwitchLoRA ended between the two.",
)
