"""`python -m loge_kernels bench`: one command a benchmark."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from loge_kernels.command_line import SETTINGS, add_command

from . import collectives, frontier, scale
from .classify import run as classify
from .fidelity import run as fidelity
from .linear import host
from .linear import run as micro
from .pretrain import run as pretrain
from .pretrain import scratch
from .step import run as step


class _DefaultCommand(TyperGroup):
    """`bench` without a subcommand's name is `bench linear`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["linear", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_DefaultCommand, context_settings=SETTINGS, help="Measure speed, and what is learnt, against the baselines."
)


def _linear(options: micro.MicroOptions) -> dict[str, Any]:
    if not options.tune:
        return micro.run(options)
    from .linear import tune

    return tune.run(options)


add_command(
    bench_app,
    "linear",
    micro.MicroOptions,
    _linear,
    "One frozen linear layer with LoRA: every backend against the dense product, PEFT and the unfused composition.\n\n"
    "Lists are given by repeating an option or separating values by commas. No speed-up is printed for a wrong result.",
)
add_command(
    bench_app,
    "host",
    host.HostOptions,
    host.run,
    "What a call of the op costs the host, over an autograd function that does nothing: with kernels that do nothing "
    "and, on a GPU, with those that it launches.",
)
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
    "frontier",
    frontier.FrontierOptions,
    frontier.run,
    "Reports of `bench fidelity` on one page: what each policy takes to exact LoRA's loss, in predicted time on each "
    "GPU and in bytes under FSDP2, each at its best learning rate.",
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
    "collectives",
    collectives.CollectivesOptions,
    collectives.run,
    "Counted on gloo ranks of this machine: what PEFT and each policy send under FSDP2, and what a rank holds.",
)
add_command(
    bench_app,
    "classify",
    classify.ClassifyOptions,
    classify.run,
    "Held-out accuracy and time of exact LoRA and of each policy on a classification task, of an encoder or a decoder, "
    "over several seeds.\n\nInterrupted, it goes on with the same --json where it stopped; policies and seeds can be "
    "added.",
)
add_command(
    bench_app,
    "pretrain",
    pretrain.PretrainOptions,
    pretrain.run,
    "A small LLaMA from scratch on real text: every parameter, LoRA and SwitchLoRA, by held-out loss.\n\nThe exit "
    "status says whether SwitchLoRA ended between the two.",
)
