"""A model on paper of LoRA training on many GPUs: bytes that each step moves, and how long it takes. Nothing here is
measured.

Per block, N·K the sizes of its linear layers, in bytes of the base's dtype, what each GPU receives with n GPUs is
(n - 1) / n of

                             forward gathers       backward gathers        backward reduces
    exact under FSDP2        weights + adapters    weights + adapters      adapters' gradients
    low rank, fully_shard    weights + adapters    factors + adapters      adapters' gradients
    DDP                      -                     -                       adapters' gradients, twice

(norms count with the adapters). These are the bytes that tests count on two ranks. Activation checkpointing computes
the forward again in backward, and makes loge.fully_shard gather the weights there as well. 8-bit copies of weights are
for DDP alone: every GPU holds them whole.

Time: a block takes the longer of its kernels (`on_paper`) and its collectives: perfect overlap, and links at their full
speed. Both are optimistic, for every method alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from rich import box
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from loge_kernels.command_line import Json, check_counts
from loge_kernels.factors.factors import resolve_rank

from .measure.output import check_writable, duration, print_wide, size, without_files, write
from .measure.shapes import LLAMAS, Llama
from .paper.run import PaperPolicy, predict

POLICIES = {
    "peft": PaperPolicy("peft", peft=True),
    "exact": PaperPolicy("exact"),
    "apply": PaperPolicy("apply", exact_dtype="auto"),
}
METHODS = ("peft-fsdp2", "exact-fsdp2", "low-rank-fsdp2", "peft-ddp", "apply-ddp", "low-rank-ddp")

_BASE = 2  # bytes of an element: bfloat16
_ADAPTER = 4  # float32, as PEFT makes adapters over a 16-bit base
_TRAINED = 16  # bytes of a trained element: itself, its gradient and AdamW's two means, in float32


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


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What one block holds, in bytes: frozen weights, factors, what is trained, norms; `exact` is the part of the
    weights that has no factors, because the dense product is cheaper."""

    weights: int
    exact: int
    factors: int
    adapters: int
    norms: int


def block_bytes(
    llama: Llama, rank: int | float, lora_rank: int, base: int = _BASE, adapter: int = _ADAPTER
) -> BlockBytes:
    """Bytes of a block with adapters of rank `lora_rank` on every linear layer and factors of `rank` (an int, or a
    share of min(N, K)); a layer whose dense product is cheaper has none."""
    linears, ranks = llama.linears(), _ranks(llama, rank)
    factors = sum(R * (N + K) for (N, K), R in zip(linears, ranks, strict=True) if R is not None)
    exact = sum(N * K for (N, K), R in zip(linears, ranks, strict=True) if R is None)
    adapters = sum(lora_rank * (N + K) for N, K in linears)
    return BlockBytes(
        sum(N * K for N, K in linears) * base,
        exact * base,
        factors * base,
        adapters * adapter,
        2 * llama.hidden * base,
    )


def _ranks(llama: Llama, rank: int | float) -> list[int | None]:
    found: list[int | None] = []
    for N, K in llama.linears():
        R = resolve_rank(min(rank, N, K) if isinstance(rank, int) else rank, N, K)
        found.append(R if R * (N + K) <= N * K else None)
    return found


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of the whole tensors of one block's collectives in a step: gathered in forward and in backward, reduced."""

    forward: int
    backward: int
    reduced: int


def traffic(method: str, held: BlockBytes, checkpointing: bool = False) -> Traffic:
    """What one block sends; a DDP all-reduce counts as a reduce-scatter and an all-gather."""
    if method.endswith("ddp"):
        return Traffic(0, 0, 2 * held.adapters)
    others = held.adapters + held.norms
    backward = held.weights
    if method.startswith("low-rank"):
        backward = held.factors + (held.weights if checkpointing else held.exact)
    return Traffic(held.weights + others, backward + others, held.adapters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOptions:
    """The models, the GPUs, the step."""

    models: Annotated[Sequence[str], Argument(help="LLaMA-3-8B, LLaMA-3-70B; default: both.")] = ()
    gpus: Annotated[Sequence[int], Option(help="How many: a list.")] = (8, 16, 64, 256, 1024)
    tokens: Annotated[int, Option(help="Tokens a GPU and step.")] = 8192
    seq: Annotated[int, Option(help="Tokens a sequence, for attention; at most --tokens.")] = 4096
    rank: Annotated[int | float, Option("--rank", "-R", help="R: an int, or a share of min(N, K).")] = 1 / 8
    exact_layers: Annotated[float, Option(help="Share of the weights whose backward is exact in low-rank rows.")] = 0.0
    lora_rank: Annotated[int, Option("--lora-rank", "-P", help="P, on every linear of the blocks.")] = 16
    checkpointing: Annotated[bool, Option("--checkpointing", help="Compute blocks again in backward.")] = False
    network: Annotated[float, Option(help="Between nodes: GB/s a GPU, each way.")] = 50.0
    json: Json = None

    @property
    def machine(self) -> Machine:
        return Machine(network=self.network * 1e9)

    @property
    def sequences(self) -> int:
        return max(1, self.tokens // self.seq)

    def policy(self, method: str) -> PaperPolicy:
        known = POLICIES.get(method.rsplit("-", 1)[0])
        return known or PaperPolicy("low rank", rank=self.rank, exact_layers=self.exact_layers)

    def check(self) -> list[str]:
        """The names of the models. Raises ValueError where a value cannot work."""
        known = {name.lower(): name for name in LLAMAS}
        for model in self.models:
            if model.lower() not in known:
                raise ValueError(f"model {model!r} is not known; choose of {', '.join(LLAMAS)}")
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
        return [known[model.lower()] for model in self.models] or list(LLAMAS)


def run(options: ScaleOptions) -> dict[str, Any]:
    """Print the table; returns, and writes to `options.json`, the report. Raises ValueError for bad options."""
    names = options.check()
    rows = [_row(name, count, method, options) for name in names for count in options.gpus for method in METHODS]
    for row in rows:
        base = next(r for r in rows if (r["model"], r["gpus"], r["method"]) == (row["model"], row["gpus"], METHODS[0]))
        row["speedup"] = base["seconds"] / row["seconds"]
    settings = without_files(asdict(options)) | {"machine": asdict(options.machine)}
    report = {"benchmark": "scale", "measured": False, "options": settings, "rows": rows}
    _print(report, options)
    write(report, options.json)
    return report


def _row(name: str, gpus: int, method: str, options: ScaleOptions) -> dict[str, Any]:
    machine, llama = options.machine, LLAMAS[name]
    held = block_bytes(llama, options.rank, options.lora_rank)
    # Exact blocks and low-rank ones, on average.
    exact = held.exact + options.exact_layers * (held.weights - held.exact)
    held = replace(held, exact=round(exact), factors=round(held.factors * (1 - options.exact_layers)))
    sent = traffic(method, held, options.checkpointing)
    forward, backward, rest = _compute(llama, method, options)
    gather = machine.gather_seconds
    collectives = gather(sent.forward, gpus), gather(sent.backward, gpus) + gather(sent.reduced, gpus)
    # Embedding and head are gathered once, as FSDP2's root keeps them; nothing overlaps the first gather.
    ends = 0.0 if method.endswith("ddp") else gather(2 * llama.vocabulary * llama.hidden * _BASE, gpus)
    blocks = max(forward, llama.layers * collectives[0]) + max(backward, llama.layers * collectives[1])
    memory = _resident(llama, method, held, gpus)
    received = llama.layers * (sent.forward + sent.backward + sent.reduced) * (gpus - 1) / gpus
    return {
        "model": name,
        "gpus": gpus,
        "method": method,
        "forward_bytes": llama.layers * sent.forward,
        "backward_bytes": llama.layers * sent.backward,
        "reduced_bytes": llama.layers * sent.reduced,
        "received_bytes": round(received),
        "compute_seconds": forward + backward + rest,
        "collective_seconds": llama.layers * sum(collectives) + ends,
        "seconds": blocks + rest + ends,
        "resident_bytes": round(memory),
        "fits": memory < machine.memory,
    }


def _compute(llama: Llama, method: str, options: ScaleOptions) -> tuple[float, float, float]:
    """Seconds of the blocks forward and backward, and of the rest of a step: head, loss, optimizer."""
    sizes = options.tokens, options.sequences, options.lora_rank, options.checkpointing
    step = predict(llama, options.machine.gpu, options.policy(method), *sizes)
    forward = sum(cost.seconds for name, cost in step.parts.items() if name.endswith(", forward"))
    rest = sum(step.parts[name].seconds for name in ("output head", "cross-entropy", "optimizer"))
    return forward, step.seconds - forward - rest, rest


def _resident(llama: Llama, method: str, held: BlockBytes, gpus: int) -> float:
    """Bytes of a GPU for weights, factors, 8-bit copies, adapters with gradients and AdamW, and of two gathered blocks;
    activations come on top."""
    ends = 2 * llama.vocabulary * llama.hidden * _BASE
    trained = llama.layers * held.adapters / _ADAPTER * _TRAINED
    added = {"low-rank": held.factors, "apply": held.weights / _BASE}.get(method.rsplit("-", 1)[0], 0)
    frozen = llama.layers * (held.weights + held.norms + added)
    if method.endswith("ddp"):
        return frozen + trained + ends
    gathered = 2 * (held.weights + held.adapters + held.norms)
    return (frozen + trained + ends) / gpus + gathered + ends


def _print(report: dict[str, Any], options: ScaleOptions) -> None:
    console = Console()
    machine = options.machine
    again = ", activation checkpointing" if options.checkpointing else ""
    exact = f" below {options.exact_layers:.0%} exact layers" if options.exact_layers else ""
    console.print(
        f"[bold]A model on paper, not measured[/bold]: {options.tokens} tokens a GPU, factors of rank "
        f"{options.rank:g}{exact}, adapters of rank {options.lora_rank}{again}; nodes of {machine.node} {machine.gpu}, "
        f"NVLink {machine.nvlink / 1e9:.0f} GB/s, network {machine.network / 1e9:.0f} GB/s a GPU; perfect overlap",
        highlight=False,
        soft_wrap=True,
    )
    console.print("a low-rank step teaches less than an exact one: `bench fidelity`", style="dim", highlight=False)
    for name in dict.fromkeys(row["model"] for row in report["rows"]):
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("GPUs", "method"):
            table.add_column(heading, no_wrap=True)
        for heading in ("fwd gathers", "bwd gathers", "reduces", "arithmetic", "collectives", "step", "x PEFT", "held"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in report["rows"]:
            if row["model"] == name:
                sent = [size(row[f"{kind}_bytes"]) for kind in ("forward", "backward", "reduced")]
                times = [duration(row[f"{kind}seconds"]) for kind in ("compute_", "collective_", "")]
                held = size(row["resident_bytes"]) + ("" if row["fits"] else " [red]too much[/red]")
                table.add_row(str(row["gpus"]), row["method"], *sent, *times, f"{row['speedup']:.2f}", held)
        print_wide(console, table)
