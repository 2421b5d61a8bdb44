"""A model on paper of LoRA training on many GPUs: bytes that each step moves, and how long it takes. Nothing here is
measured.

Bytes are those of `paper.collectives`. Time: arithmetic (`paper.run`) and collectives, once with perfect overlap, where
a block takes the longer of the two, and once with none, where they add up. A real step lies between. Links run at their
full speed, which is optimistic for every policy alike.

What a policy's steps teach is not in its time: given a report of `bench fidelity`, which has the steps that each policy
took to a share of exact LoRA's gain, the table ends with the links at which a low-rank policy gets there sooner than
`apply(model)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise, product, zip_longest
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from loge_kernels.command_line import WHOLE, Json, check_counts

from .measure.output import check_writable, duration, print_wide, size, table, without_files, write
from .measure.shapes import LLAMAS, Llama
from .paper.collectives import ENGINES, Held, held, traffic
from .paper.run import PaperPolicy, predict
from .policies import PEFT, parse, parse_all

DEFAULTS = ("exact", "apply", "base_dtype=int8", "base_dtype=float8", "rank=1/8", "rank=1/16,exact_layers=0.75")

_BASE = 2  # bytes of an element: bfloat16
_ADAPTER = 4  # float32, as PEFT makes adapters over a 16-bit base
_TRAINED = 16  # bytes of a trained element: itself, its gradient and AdamW's two means, in float32
_SLOWEST, _FASTEST = 1e-3, 1e4  # GB/s between nodes


@dataclass(frozen=True, slots=True)
class Machine:
    """H200s and links; speeds in bytes/s, each way.

    nvlink: 900 GB/s a GPU in both directions together (NVIDIA H100 datasheet, NVLink 4). network: one 400 Gb/s port a
    GPU (NVIDIA DGX H100 datasheet, ConnectX-7 NDR InfiniBand). memory: the H200 datasheet's 141 GB.
    """

    gpu: str = "H200"
    nvlink: float = 450e9
    network: float = 50e9
    node: int = 8
    memory: float = 141e9

    def gather_seconds(self, nbytes: float, gpus: int) -> float:
        """A ring all-gather, or a reduce-scatter, of `nbytes` in all. Over several nodes there is a ring for each port,
        so that the ports of a node share what enters it."""
        link = self.nvlink if gpus <= self.node else min(self.nvlink, self.node * self.network)
        return nbytes * (gpus - 1) / gpus / link


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOptions:
    """The models, the policies, the GPUs, the step."""

    models: Annotated[Sequence[str], Argument(help="LLaMA-3-8B, LLaMA-3-70B; default: both.")] = ()
    policies: Annotated[
        Sequence[str],
        Option(
            "--policy",
            help='What to compare with peft, repeated: apply, or arguments of apply ("rank=1/8,exact_layers=0.5").',
        ),
        WHOLE,
    ] = DEFAULTS
    engines: Annotated[Sequence[str], Option("--engine", help="fsdp2, ddp: a list.")] = ENGINES
    gpus: Annotated[Sequence[int], Option(help="How many: a list.")] = (8, 16, 64, 256, 1024)
    tokens: Annotated[int, Option(help="Tokens a GPU and step.")] = 8192
    seq: Annotated[int, Option(help="Tokens a sequence, for attention; at most --tokens.")] = 4096
    lora_rank: Annotated[int, Option("--lora-rank", "-P", help="P, on every linear of the blocks.")] = 16
    checkpointing: Annotated[bool, Option("--checkpointing", help="Compute blocks again in backward.")] = False
    network: Annotated[float, Option(help="Between nodes: GB/s a GPU, each way.")] = 50.0
    learning: Annotated[
        Path | None, Option(help="A report of `bench fidelity`: at which links is low rank there sooner?")
    ] = None
    share: Annotated[float, Option(help="Of exact LoRA's gain, for --learning: 0.5, 0.75, 0.9 or 1.")] = 0.9
    json: Json = None

    @property
    def machine(self) -> Machine:
        return Machine(network=self.network * 1e9)

    @property
    def sequences(self) -> int:
        return max(1, self.tokens // self.seq)

    def check(self) -> tuple[list[str], list[PaperPolicy]]:
        """The names of the models, and the policies, PEFT's first. Raises ValueError where a value cannot work."""
        known = {name.lower(): name for name in LLAMAS}
        for model in self.models:
            if model.lower() not in known:
                raise ValueError(f"model {model!r} is not known; choose of {', '.join(LLAMAS)}")
        for engine in self.engines:
            if engine not in ENGINES:
                raise ValueError(f"--engine {engine!r} is unknown; choose of {', '.join(ENGINES)}")
        check_counts(self, "tokens", "seq", "lora_rank")
        if self.tokens > self.seq and self.tokens % self.seq:
            raise ValueError(f"--tokens {self.tokens}: give a multiple of --seq {self.seq}")
        node = self.machine.node
        for count in self.gpus:
            if count < 2 or (count > node and count % node):
                raise ValueError(f"--gpus {count}: give 2 to {node} GPUs, or a multiple of {node}")
        if not self.network > 0:
            raise ValueError(f"--network {self.network:g}: give GB/s above 0")
        check_writable(self.json)
        policies = [policy.on_paper() for policy in parse_all((PEFT, *self.policies))]
        return [known[model.lower()] for model in self.models] or list(LLAMAS), policies


def run(options: ScaleOptions) -> dict[str, Any]:
    """Print the tables; returns, and writes to `options.json`, the report. Raises ValueError for bad options."""
    names, policies = options.check()
    sooner = None
    if options.learning is not None:
        sooner = _sooner(names, _steps(options.learning, options.share), options)
    rows = [
        _row(name, count, policy, engine, options.machine, options)
        for name in names
        for count in options.gpus
        for engine in options.engines
        for policy in policies
    ]
    for row in rows:
        same = (r for r in rows if all(r[key] == row[key] for key in ("model", "gpus", "engine")))
        row["speedup"] = next(same)["seconds"] / row["seconds"]  # PEFT's comes first
    settings = without_files(asdict(options)) | {"machine": asdict(options.machine)}
    settings["learning"] = None if options.learning is None else options.learning.name
    report = {"benchmark": "scale", "measured": False, "options": settings, "rows": rows}
    if sooner is not None:
        report["sooner"] = sooner
    _print(report, options)
    write(report, options.json)
    return report


def _row(
    name: str, gpus: int, policy: PaperPolicy, engine: str, machine: Machine, options: ScaleOptions
) -> dict[str, Any]:
    llama = LLAMAS[name]
    block = held(llama, policy, machine.gpu, options.tokens, options.lora_rank, _BASE, _ADAPTER)
    sent = traffic(block, engine, options.checkpointing)
    sizes = options.tokens, options.sequences, options.lora_rank, options.checkpointing
    forward, backward, rest = _compute(llama, machine.gpu, policy, engine, *sizes)
    gather = machine.gather_seconds
    collectives = gather(sent.forward, gpus), gather(sent.backward, gpus) + gather(sent.reduced, gpus)
    # Embedding and head are gathered once, as FSDP2's root keeps them; nothing overlaps the first gather.
    ends = 0.0 if engine == "ddp" else gather(2 * llama.vocabulary * llama.hidden * _BASE, gpus)
    blocks = max(forward, llama.layers * collectives[0]) + max(backward, llama.layers * collectives[1])
    memory = _resident(llama, block, engine, gpus)
    received = llama.layers * (sent.forward + sent.backward + sent.reduced) * (gpus - 1) / gpus
    compute, moving = forward + backward + rest, llama.layers * sum(collectives) + ends
    return {
        "model": name,
        "gpus": gpus,
        "engine": engine,
        "policy": policy.name,
        "forward_bytes": round(llama.layers * sent.forward),
        "backward_bytes": round(llama.layers * sent.backward),
        "reduced_bytes": round(llama.layers * sent.reduced),
        "received_bytes": round(received),
        "compute_seconds": compute,
        "collective_seconds": moving,
        "seconds": blocks + rest + ends,
        "seconds_without_overlap": compute + moving,
        "resident_bytes": round(memory),
        "fits": memory < machine.memory,
    }


@cache
def _compute(
    llama: Llama, gpu: str, policy: PaperPolicy, engine: str, tokens: int, sequences: int, lora_rank: int, again: bool
) -> tuple[float, float, float]:
    """Seconds of the blocks forward and backward, and of the rest of a step: head, loss, optimizer. `again`: with
    activation checkpointing."""
    shares = [(1.0, policy)]
    if engine == "fsdp2" and again and policy.rank is not None:
        # The weights are there, and every layer's backward is exact; in 8 bits where it is given for exact steps.
        exact = replace(policy, rank=None, exact_layers=0.0, exact_every=None)
        eight = 1.0 if policy.exact_every is not None else policy.exact_layers
        shares = [(eight, exact), (1.0 - eight, replace(exact, exact_dtype=None))]
    forward = backward = rest = 0.0
    for share, each in shares:
        step = predict(llama, gpu, each, tokens, sequences, lora_rank, again)
        ahead = sum(cost.seconds for name, cost in step.parts.items() if name.endswith(", forward"))
        others = sum(step.parts[name].seconds for name in ("output head", "cross-entropy", "optimizer"))
        forward += share * ahead
        backward += share * (step.seconds - ahead - others)
        rest += share * others
    return forward, backward, rest


def _resident(llama: Llama, block: Held, engine: str, gpus: int) -> float:
    """Bytes of a GPU for weights, factors, 8-bit copies, adapters with gradients and AdamW, and of two gathered blocks;
    activations come on top."""
    ends = 2 * llama.vocabulary * llama.hidden * _BASE
    trained = llama.layers * block.adapters / _ADAPTER * _TRAINED
    frozen = llama.layers * (block.weights + block.copies + block.factors + block.norms)
    if engine == "ddp":
        return frozen + trained + ends
    gathered = 2 * (block.weights + block.adapters + block.norms)
    return (frozen + trained + ends) / gpus + gathered + ends


# ---- time to the same loss -------------------------------------------------------------------------------------------


def _steps(file: Path, share: float) -> dict[str, float | None]:
    """Steps to `share` of exact LoRA's gain by policy, None for one that did not get there. Raises ValueError for a
    file that is no report of `bench fidelity`."""
    try:
        summary = json.loads(file.read_text())["summary"]
        found = {entry["policy"]: entry["to_loss"][f"{share:g}"]["step"] for entry in summary}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--learning {file}: no report of bench fidelity with times to {share:g} of the gain ({error!r})"
        ) from error
    return found


def _sooner(names: list[str], steps: dict[str, float | None], options: ScaleOptions) -> list[dict[str, Any]]:
    """For each low-rank policy of `steps` and each number of GPUs over several nodes: its steps, and the networks
    between nodes, in ranges of GB/s a GPU, with which it is there sooner than every exact policy under FSDP2, all by
    this package's kernels. What paper does not know, or this GPU cannot run, is left out; ValueError where that is
    every exact one."""
    paper = {text: policy for text in steps if (policy := _by_kernels(text, options)) is not None}
    rivals = [
        (policy, taken) for text, policy in paper.items() if policy.rank is None and (taken := steps[text]) is not None
    ]
    if not rivals:
        raise ValueError(
            f"--learning {options.learning}: no exact policy beside {PEFT} is in it, or got to {options.share:g} of "
            "the gain"
        )
    counts = [count for count in options.gpus if count > options.machine.node]
    found = []
    for name, gpus, (text, policy) in product(names, counts, paper.items()):
        if policy.rank is not None:
            taken = steps[text]
            networks = [] if taken is None else _networks(name, gpus, (policy, taken), rivals, options)
            found.append({"model": name, "gpus": gpus, "policy": text, "steps": taken, "networks": networks})
    return found


def _by_kernels(text: str, options: ScaleOptions) -> PaperPolicy | None:
    """A policy on paper, with this package's kernels; None for PEFT's and what has no prediction."""
    try:
        policy = replace(parse(text).on_paper(), kernels=True)
        predict("LLaMA-3-8B", options.machine.gpu, policy)
    except ValueError:
        return None
    return policy


def _networks(
    name: str,
    gpus: int,
    own: tuple[PaperPolicy, float],
    rivals: list[tuple[PaperPolicy, float]],
    options: ScaleOptions,
) -> list[tuple[float, float | None]]:
    """The ranges, from 0 (no network is slower than `_SLOWEST`) to None (none is faster than `_FASTEST`)."""

    def sooner(network: float) -> bool:
        machine = replace(options.machine, network=network * 1e9)
        ours, *theirs = (
            taken * _row(name, gpus, policy, "fsdp2", machine, options)["seconds"] for policy, taken in (own, *rivals)
        )
        return ours < min(theirs)

    count = 10 * round(math.log10(_FASTEST / _SLOWEST))
    speeds = [_SLOWEST * 10 ** (i / 10) for i in range(count + 1)]
    edges = [0.0] if sooner(_SLOWEST) else []
    for low, high in pairwise(speeds):
        if sooner(low) != sooner(high):
            before = sooner(low)
            while high / low > 1.001:
                middle = math.sqrt(low * high)
                low, high = (middle, high) if sooner(middle) == before else (low, middle)
            edges.append(low)
    return list(zip_longest(edges[::2], edges[1::2]))


def _print(report: dict[str, Any], options: ScaleOptions) -> None:
    console = Console()
    machine = options.machine
    again = ", activation checkpointing" if options.checkpointing else ""
    console.print(
        f"[bold]A model on paper, not measured[/bold]: {options.tokens} tokens a GPU, adapters of rank "
        f"{options.lora_rank}{again}; nodes of {machine.node} {machine.gpu}, NVLink {machine.nvlink / 1e9:.0f} GB/s, "
        f"network {machine.network / 1e9:g} GB/s a GPU",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        "step: collectives hidden behind arithmetic wherever it lasts as long; at worst: none hidden. A low-rank step "
        "teaches less than an exact one: `bench fidelity`",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    for name in dict.fromkeys(row["model"] for row in report["rows"]):
        numbers = ("fwd gathers", "bwd gathers", "reduces", "arithmetic", "step", "x PEFT", "at worst", "held")
        printed = table(("GPUs", "engine", "policy"), numbers, name)
        for row in report["rows"]:
            if row["model"] == name:
                moved = [size(row[f"{kind}_bytes"]) for kind in ("forward", "backward", "reduced")]
                times = duration(row["compute_seconds"]), duration(row["seconds"]), f"{row['speedup']:.2f}"
                resident = size(row["resident_bytes"]) + ("" if row["fits"] else " [red]too much[/red]")
                worst = duration(row["seconds_without_overlap"])
                printed.add_row(str(row["gpus"]), row["engine"], row["policy"], *moved, *times, worst, resident)
        print_wide(console, printed)
    if "sooner" in report:
        title = f"Sooner than every exact policy at {options.share:.0%} of exact LoRA's gain, under FSDP2"
        printed = table(("model", "GPUs", "policy"), ("steps", "network between nodes"), title)
        for row in report["sooner"]:
            steps = "never there" if row["steps"] is None else f"{row['steps']:.1f}"
            printed.add_row(row["model"], str(row["gpus"]), row["policy"], steps, _ranges(row["networks"]))
        print_wide(console, printed)


def _ranges(networks: list[tuple[float, float | None]]) -> str:
    """Ranges of GB/s in words."""
    if not networks:
        return "at no speed"
    if networks[0] == (0.0, None):
        return "at every speed"
    words = []
    for low, high in networks:
        words.append(f"below {high:.3g}" if low == 0.0 else f"above {low:.3g}")
        if low > 0.0 and high is not None:
            words[-1] = f"{low:.3g} to {high:.3g}"
    return f"{', '.join(words)} GB/s a GPU"
