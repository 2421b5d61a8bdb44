"""A model on paper of LoRA training on many GPUs: bytes that each step moves, and how long it takes. Nothing here is
measured.

Per block, N·K the sizes of its linear layers, in bytes of the base's dtype, what each GPU receives with n GPUs is
(n - 1) / n of

                          forward gathers       backward gathers          backward reduces
    PEFT under FSDP2      weights + adapters    weights + adapters        adapters' gradients
    loge.fully_shard      weights + adapters    factors + adapters        adapters' gradients
    DDP                   -                     -                         adapters' gradients, twice

(norms count with the adapters). These are the bytes that tests count on two ranks. Activation checkpointing computes
the forward again in backward, and makes loge.fully_shard gather the weights there as well.

Time: a block takes the longer of its arithmetic (the roofline of `roofline.py` on `Machine`'s ceilings, attention
added) and its collectives: perfect overlap, and links at their full speed. Both are optimistic, for every method alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from loge_kernels.factors import resolve_rank
from loge_kernels.triton_kernels.devices import KNOWN

from .output import check_writable, duration, print_wide, size, write
from .roofline import Formula, Work, backward_work, forward_work

Method = Literal["peft-fsdp2", "loge-fsdp2", "peft-ddp", "loge-ddp"]
METHODS: tuple[Method, ...] = ("peft-fsdp2", "loge-fsdp2", "peft-ddp", "loge-ddp")

_BASE = 2  # bytes of an element: bfloat16
_ADAPTER = 4  # float32, as PEFT makes adapters over a 16-bit base
_TRAINED = 16  # bytes of a trained element: itself, its gradient and AdamW's two means, in float32


@dataclass(frozen=True, slots=True)
class Llama:
    """Sizes of a LLaMA, from its published config; `key_value` is the width of all key (or value) heads."""

    hidden: int
    key_value: int
    intermediate: int
    layers: int
    vocabulary: int

    def linears(self) -> list[tuple[int, int]]:
        """[N, K] of every linear layer of a block."""
        h, kv, i = self.hidden, self.key_value, self.intermediate
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]


LLAMAS = {
    "LLaMA-3-8B": Llama(4096, 1024, 14336, 32, 128256),
    "LLaMA-3-70B": Llama(8192, 1024, 28672, 80, 128256),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs and links; speeds in bytes/s and flop/s, each way.

    matmul, copy: attainable on an H200, as the kernels' cost model has them. nvlink: 900 GB/s a GPU in both directions
    together (NVIDIA H100 datasheet, NVLink 4). network: one 400 Gb/s port a GPU (NVIDIA DGX H100 datasheet, ConnectX-7
    NDR InfiniBand). memory: the H200 datasheet's 141 GB.
    """

    matmul: float = KNOWN["NVIDIA H200"].tflops_16 * 1e12
    copy: float = KNOWN["NVIDIA H200"].hbm_gbs * 1e9
    nvlink: float = 450e9
    network: float = 50e9
    node: int = 8
    memory: float = 141e9

    def gather_seconds(self, nbytes: float, gpus: int) -> float:
        """A ring all-gather, or a reduce-scatter, of `nbytes` in all. Over several nodes there is a ring for each port,
        so that the ports of a node share what enters it."""
        link = self.nvlink if gpus <= self.node else min(self.nvlink, self.node * self.network)
        return nbytes * (gpus - 1) / gpus / link

    def seconds(self, work: Work) -> float:
        return max(work.flops / self.matmul, work.moved_bytes / self.copy)


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


def traffic(method: Method, held: BlockBytes, checkpointing: bool = False) -> Traffic:
    """What one block sends; a DDP all-reduce counts as a reduce-scatter and an all-gather."""
    if method.endswith("ddp"):
        return Traffic(0, 0, 2 * held.adapters)
    others = held.adapters + held.norms
    backward = (
        held.weights if method == "peft-fsdp2" else held.factors + (held.weights if checkpointing else held.exact)
    )
    return Traffic(held.weights + others, backward + others, held.adapters)


@dataclass(frozen=True)
class ScaleOptions:
    """See `python -m loge_kernels bench scale --help`."""

    models: tuple[str, ...] = ()
    gpus: tuple[int, ...] = (8, 16, 64, 256, 1024)
    tokens: int = 8192
    seq: int = 4096
    rank: int | float = 1 / 8
    lora_rank: int = 16
    checkpointing: bool = False
    json: Path | None = None
    machine: Machine = field(default_factory=Machine)


def run(options: ScaleOptions) -> dict[str, Any]:
    """Print the table; returns, and writes to `options.json`, the report. Raises ValueError for bad options."""
    names = _names(options.models)
    for option in ("tokens", "seq", "lora_rank"):
        if getattr(options, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(options, option)}: give at least 1")
    for count in options.gpus:
        if not isinstance(count, int) or count < 2 or (count > options.machine.node and count % options.machine.node):
            raise ValueError(
                f"--gpus {count}: give 2 to {options.machine.node} GPUs, or a multiple of {options.machine.node}"
            )
    if not options.machine.network > 0:
        raise ValueError(f"--network {options.machine.network / 1e9:g}: give GB/s above 0")
    check_writable(options.json)
    rows = [
        _row(name, LLAMAS[name], count, method, options)
        for name in names
        for count in options.gpus
        for method in METHODS
    ]
    for row in rows:
        base = next(r for r in rows if (r["model"], r["gpus"], r["method"]) == (row["model"], row["gpus"], METHODS[0]))
        row["speedup"] = base["seconds"] / row["seconds"]
    report = {"benchmark": "scale", "measured": False, "options": _plain(options), "rows": rows}
    _print(report, options)
    write(report, options.json)
    return report


def _names(models: tuple[str, ...]) -> list[str]:
    known = {name.lower(): name for name in LLAMAS}
    for model in models:
        if model.lower() not in known:
            raise ValueError(f"model {model!r} is not known; choose of {', '.join(LLAMAS)}")
    return [known[model.lower()] for model in models] or list(LLAMAS)


def _plain(options: ScaleOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "json"}


def _row(name: str, llama: Llama, gpus: int, method: Method, options: ScaleOptions) -> dict[str, Any]:
    machine = options.machine
    held = block_bytes(llama, options.rank, options.lora_rank)
    sent = traffic(method, held, options.checkpointing)
    forward, backward = _block_seconds(llama, method, options)
    head_forward, head_backward = _head_seconds(llama, options)
    gather = machine.gather_seconds
    collectives = gather(sent.forward, gpus), gather(sent.backward, gpus) + gather(sent.reduced, gpus)
    compute = llama.layers * (forward + backward) + head_forward + head_backward
    # Embedding and head are gathered once, as FSDP2's root keeps them; nothing overlaps the first gather.
    ends = 0.0 if method.endswith("ddp") else gather(2 * llama.vocabulary * llama.hidden * _BASE, gpus)
    blocks = max(forward, collectives[0]) + max(backward, collectives[1])
    seconds = llama.layers * blocks + head_forward + head_backward + ends
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
        "compute_seconds": compute,
        "collective_seconds": llama.layers * sum(collectives) + ends,
        "seconds": seconds,
        "resident_bytes": round(memory),
        "fits": memory < machine.memory,
    }


def _block_seconds(llama: Llama, method: Method, options: ScaleOptions) -> tuple[float, float]:
    machine, M, P = options.machine, options.tokens, options.lora_rank
    forward = sum(machine.seconds(forward_work("exact", M, N, K, P, _BASE)) for N, K in llama.linears())
    backward = 0.0
    for (N, K), R in zip(llama.linears(), _ranks(llama, options.rank), strict=True):
        formula: Formula = "exact" if R is None or method.startswith("peft") else "low-rank"
        backward += machine.seconds(backward_work(formula, M, N, K, R or 0, P, _BASE))
    # Causal attention: half of q kᵀ and of its product with v; backward has five such products for two.
    attention = 2 * M * options.seq * llama.hidden / machine.matmul
    forward, backward = forward + attention, backward + 2.5 * attention
    return forward, backward + (forward if options.checkpointing else 0.0)


def _head_seconds(llama: Llama, options: ScaleOptions) -> tuple[float, float]:
    sizes = options.tokens, llama.vocabulary, llama.hidden
    forward = forward_work("product", *sizes, 0, _BASE)
    backward = backward_work("product", *sizes, 0, 0, _BASE)
    return options.machine.seconds(forward), options.machine.seconds(backward)


def _resident(llama: Llama, method: Method, held: BlockBytes, gpus: int) -> float:
    """Bytes of a GPU for weights, factors, adapters with gradients and AdamW, and of two gathered blocks; activations
    come on top."""
    ends = 2 * llama.vocabulary * llama.hidden * _BASE
    trained = llama.layers * held.adapters / _ADAPTER * _TRAINED
    factors = 0 if method.startswith("peft") else held.factors
    frozen = llama.layers * (held.weights + held.norms + factors)
    if method.endswith("ddp"):
        return frozen + trained + ends
    gathered = 2 * (held.weights + held.adapters + held.norms)
    return (frozen + trained + ends) / gpus + gathered + ends


def _print(report: dict[str, Any], options: ScaleOptions) -> None:
    console = Console()
    machine = options.machine
    again = ", activation checkpointing" if options.checkpointing else ""
    console.print(
        f"[bold]A model on paper, not measured[/bold]: {options.tokens} tokens a GPU, factors of rank "
        f"{options.rank:g}, adapters of rank {options.lora_rank}{again}; nodes of {machine.node} GPUs, NVLink "
        f"{machine.nvlink / 1e9:.0f} GB/s, network {machine.network / 1e9:.0f} GB/s a GPU, "
        f"{machine.matmul / 1e12:.0f} TFLOP/s; perfect overlap, no latencies",
        highlight=False,
        soft_wrap=True,
    )
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
