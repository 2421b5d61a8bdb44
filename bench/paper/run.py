"""A LoRA training step on paper: the milliseconds that a named GPU is predicted to need, by what must be computed.

Every part of the step is counted in flops, bytes and kernels and timed on the GPU's rates (`paper_model`). Nothing is
measured. Per linear layer of a block, where dX = dY W is

    exact        one product in 16 or 8 bits, the passes that quantise dY, and the LoRA gradients beside it
    low rank     T = dY [left | s·B], dX = T [right ; A] by cuBLAS, then dA and dB

and a policy says which layers, in which share of the steps, are what. Checkpointing adds one more forward of the
blocks. Adapters of one rank are on every linear layer, in 16 bits, without dropout. Whether the model fits into the
GPU's memory is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from loge_kernels.factors.factors import resolve_rank
from loge_kernels.numerics.exact_dtypes import EXACT_DTYPES
from loge_kernels.numerics.four_bit import FORMATS

from ..measure.output import check_writable, print_wide, table, write
from ..measure.shapes import Llama
from . import model as paper_model
from .model import GPUS, MODELS, Cost, EightBits, FewBits, Gpu, check_count, known

_RECOMPUTATION = "recomputation"
_EXACT = ", ".join(map(repr, EXACT_DTYPES))


@dataclass(frozen=True, slots=True)
class PaperPolicy:
    """How the backward of the frozen layers runs.

    name: of its line in the table.   peft: PEFT's own exact LoRA in 16 bits; it takes no other field.
    exact_dtype: of exact dX: None for 16 bits, "int8", "float8", or "auto", the fastest by shape; "nvfp4" or "mxfp4",
        for which no kernel of this package quantises.
    base_dtype: of the frozen weights, None for 16 bits; forward and exact dX are then in it, by this package's kernels.
    full_accumulation: float8 products without use_fast_accum, which is not the default.
    rank: R of a low-rank dX, an int or a share in (0, 1] of min(N, K); None for exact everywhere. A layer whose dense
        product has no more flops stays exact.
    exact_layers: share in [0, 1] of the frozen weights, from the output downwards, that is exact.
    exact_every: of so many steps one is exact in every layer; any number from 1, None for no such step.
    frozen: share in [0, 1) of the blocks, from the embedding upwards, that have no backward and train nothing.
    kernels: exact backwards by this package's kernels, which read dY once beside the product (twice for scales of its
        rows), where PyTorch's composition reads it up to four times.
    """

    name: str
    peft: bool = False
    exact_dtype: FewBits | Literal["auto"] | None = None
    base_dtype: EightBits | None = None
    full_accumulation: bool = False
    rank: int | float | None = None
    exact_layers: float = 0.0
    exact_every: float | None = None
    frozen: float = 0.0
    kernels: bool = False

    def __post_init__(self) -> None:
        if self.exact_dtype not in (None, "int8", "float8", "auto", *FORMATS):
            raise ValueError(f"exact_dtype={self.exact_dtype!r} is unknown; choose {_EXACT}, 'auto' or None")
        if self.base_dtype not in (None, "int8", "float8"):
            raise ValueError(f"base_dtype={self.base_dtype!r} is unknown; choose 'int8', 'float8' or None")
        if self.base_dtype and self.exact_dtype != "auto":
            raise ValueError(
                f"exact_dtype={self.exact_dtype!r} with base_dtype={self.base_dtype!r}: leave it at 'auto'"
            )
        if self.rank is not None and not (self.rank >= 1 if isinstance(self.rank, int) else 0.0 < self.rank <= 1.0):
            raise ValueError(f"rank={self.rank!r}; give an int of at least 1, a share in (0, 1], or None for exact")
        if not 0.0 <= self.exact_layers <= 1.0:
            raise ValueError(f"exact_layers={self.exact_layers!r}; give a share of the frozen weights in [0, 1]")
        if self.exact_every is not None and not self.exact_every >= 1:
            raise ValueError(f"exact_every={self.exact_every!r}; give a number of steps from 1, or None")
        if self.rank is None and (self.exact_layers or self.exact_every is not None):
            raise ValueError(
                f"exact_layers={self.exact_layers!r}, exact_every={self.exact_every!r}: without a rank every layer is "
                "exact in every step; give rank= as well"
            )
        if self.full_accumulation and not self.base_dtype and self.exact_dtype not in ("float8", "auto"):
            raise ValueError(
                f"full_accumulation=True, exact_dtype={self.exact_dtype!r}: only float8 has it; give 'float8' or 'auto'"
            )
        if not 0.0 <= self.frozen < 1.0:
            raise ValueError(f"frozen={self.frozen!r}; give a share of the blocks in [0, 1)")
        if self.frozen and (self.rank is not None or self.base_dtype):
            other = f"base_dtype={self.base_dtype!r}" if self.base_dtype else f"rank={self.rank!r}"
            raise ValueError(f"frozen={self.frozen!r} with {other}: paper knows one of them at a time")
        others = self.exact_dtype, self.base_dtype, self.full_accumulation, self.kernels, self.frozen
        if self.peft and (any(others) or self.rank is not None):
            raise ValueError(f"policy {self.name!r}: peft=True is exact in 16 bits; give it no other field")

    @property
    def exact_share(self) -> float:
        """The share of the frozen weights' backward that is exact, averaged over the steps."""
        if self.rank is None:
            return 1.0
        return self.exact_layers + (1.0 - self.exact_layers) * (1.0 / self.exact_every if self.exact_every else 0.0)


@dataclass(frozen=True, slots=True)
class PaperStep:
    """A predicted step of `policy`: its parts by name, in the order of the step."""

    policy: PaperPolicy
    parts: dict[str, Cost]

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.parts.values())

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; times in milliseconds."""
        parts = [
            {
                "name": name,
                "flops": round(cost.flops),
                "bytes": round(cost.bytes),
                "kernels": round(cost.kernels),
                "milliseconds": 1e3 * cost.seconds,
                "bound": cost.bound,
            }
            for name, cost in self.parts.items()
        ]
        return {"policy": asdict(self.policy), "predicted": True, "milliseconds": self.milliseconds, "parts": parts}


def predict(
    model: str | Llama,
    gpu: str,
    policy: PaperPolicy,
    tokens: int = 8192,
    sequences: int = 2,
    lora_rank: int = 16,
    checkpointing: bool = False,
) -> PaperStep:
    """One predicted step over `tokens` tokens in `sequences` sequences of one length.

    model: a key of `MODELS`, or sizes (`paper_model.llama`).   gpu: a key of `GPUS`.   lora_rank: P, on every linear
    layer.   checkpointing: blocks are computed again in backward. Raises ValueError, naming the argument, for what it
    does not know.
    """
    sizes, device = _model(model), _gpu(gpu)
    for name, value in (("tokens", tokens), ("sequences", sequences), ("lora_rank", lora_rank)):
        check_count(name, value)
    if tokens % sequences:
        raise ValueError(f"tokens={tokens}, sequences={sequences}: give a multiple of the sequences")
    for argument in ("exact_dtype", "base_dtype"):
        if getattr(policy, argument) == "float8" and not device.float8:
            raise ValueError(f"{argument}='float8' does not run on gpu={gpu!r}; give 'int8' or None")
    if policy.exact_dtype in FORMATS and not device.spec.four_bit:
        raise ValueError(f"exact_dtype={policy.exact_dtype!r} does not run on gpu={gpu!r}; give 'B200', or 8 bits")
    attention = paper_model.attention(device, sizes, tokens, tokens // sequences)
    others = paper_model.elementwise(device, sizes, tokens)
    head, loss = paper_model.head(device, sizes, tokens)
    blocks = _linear_forward(device, sizes, policy, tokens, lora_rank)
    blocks |= {"attention": attention[0], "elementwise": others[0]}
    backward = _linear_backward(device, sizes, policy, tokens, lora_rank)
    backward |= {"attention, backward": attention[1], "elementwise, backward": others[1]}
    parts = {f"{name}, forward": cost * sizes.layers for name, cost in blocks.items()}
    parts |= {"output head": head, "cross-entropy": loss}
    trained = sizes.layers * (1.0 - policy.frozen)
    if checkpointing:
        parts[_RECOMPUTATION] = sum(blocks.values(), Cost()) * trained
    parts |= {name: cost * trained for name, cost in backward.items() if cost.kernels}
    parts["optimizer"] = paper_model.optimizer(device, sizes, lora_rank) * (1.0 - policy.frozen)
    return PaperStep(policy, parts)


def _linear_forward(gpu: Gpu, sizes: Llama, policy: PaperPolicy, M: int, P: int) -> dict[str, Cost]:
    """The forward of one block's linear layers, by parts."""
    products, adapters, quantisation = Cost(), Cost(), Cost()
    for N, K in sizes.linears():
        if policy.base_dtype is None:
            products += paper_model.dense(gpu, M, K, N)
            adapters += paper_model.lora_forward(gpu, M, N, K, P, policy.peft)
        else:
            parts = paper_model.forward_in_eight_bits(gpu, M, N, K, P, policy.base_dtype, not policy.full_accumulation)
            products += parts["product"]
            adapters += parts["LoRA"]
    if policy.base_dtype is not None:  # once for q, k, v, once for o, gate and up, down
        for K in (sizes.hidden, sizes.hidden, sizes.hidden, sizes.intermediate):
            quantisation += paper_model.passes(gpu, 3 * M * K)
    found = {"frozen products": products, "quantisation": quantisation, "LoRA": adapters}
    return {name: cost for name, cost in found.items() if cost.kernels}


def _linear_backward(gpu: Gpu, sizes: Llama, policy: PaperPolicy, M: int, P: int) -> dict[str, Cost]:
    """The backward of one block's linear layers, by parts, averaged over the layers and steps of the policy."""
    dense, quantisation, low_rank, adapters = Cost(), Cost(), Cost(), Cost()
    for N, K in sizes.linears():
        R = layer_rank(policy.rank, N, K)
        exact = 1.0 if R is None else policy.exact_share
        dtype = _dtype(gpu, policy, M, N, K)
        if dtype != "nvfp4" and dtype != "mxfp4" and (policy.kernels or policy.base_dtype):
            base = policy.base_dtype is not None
            parts = paper_model.exact_kernels(gpu, M, N, K, P, dtype, not policy.full_accumulation, base)
            dense += parts["product"] * exact
            quantisation += parts["quantise"] * exact
            adapters += parts["LoRA"] * exact
        else:
            dense += paper_model.dense(gpu, M, N, K, dtype, not policy.full_accumulation) * exact
            if dtype is not None:
                quantisation += paper_model.quantisation(gpu, M, N, K, dtype) * exact
            adapters += paper_model.lora_backward(gpu, M, N, K, P, policy.peft) * exact
        if R is not None:
            low_rank += paper_model.low_rank_dx(gpu, M, N, K, R, P) * (1.0 - exact)
            adapters += paper_model.lora_gradients(gpu, M, N, K, P) * (1.0 - exact)
    return {
        "exact dX": dense,
        "quantisation": quantisation,
        "low-rank dX, the adapter's in it": low_rank,
        "LoRA, backward": adapters,
    }


def layer_rank(rank: int | float | None, N: int, K: int) -> int | None:
    """R of the factors of a layer [N, K], or None where it stays exact."""
    if rank is None:
        return None
    R = resolve_rank(min(rank, N, K) if isinstance(rank, int) else rank, N, K)
    return R if R * (N + K) < N * K else None


def layer_dtype(gpu: str, policy: PaperPolicy, M: int, N: int, K: int) -> FewBits | None:
    """What the exact dX [M, K] of a layer [N, K] runs in; None for 16 bits."""
    return None if policy.peft else _dtype(_gpu(gpu), policy, M, N, K)


def _dtype(gpu: Gpu, policy: PaperPolicy, M: int, N: int, K: int) -> FewBits | None:
    if policy.base_dtype is not None:
        return policy.base_dtype
    if policy.exact_dtype == "auto":
        return paper_model.fastest_dtype(gpu, M, N, K, not policy.full_accumulation, policy.kernels)
    return policy.exact_dtype if paper_model.runs_in_eight_bits(N, K) else None


def step_seconds(
    policy: PaperPolicy,
    gpu: str,
    model: str | Llama,
    tokens: int = 8192,
    sequences: int = 2,
    lora_rank: int = 16,
) -> float:
    """Predicted seconds of one step, averaged over the policy's exact and low-rank steps; arguments as in `predict`."""
    return predict(model, gpu, policy, tokens, sequences, lora_rank).seconds


def standard_policies(gpu: str) -> tuple[PaperPolicy, ...]:
    """PEFT, and this package's policies that run on `gpu`."""
    eight: EightBits = "int8" if not _gpu(gpu).float8 else "float8"
    full = PaperPolicy("exact float8, full accumulation", exact_dtype="float8", full_accumulation=True)
    ours = "exact kernels"
    return (
        PaperPolicy("peft", peft=True),
        PaperPolicy("exact"),
        PaperPolicy(f"exact {eight}", exact_dtype=eight),
        *((full,) if eight == "float8" else ()),
        PaperPolicy(ours, kernels=True),
        PaperPolicy(f"{ours}, {eight}", exact_dtype=eight, kernels=True),
        *((PaperPolicy("exact nvfp4", exact_dtype="nvfp4"),) if _gpu(gpu).spec.four_bit else ()),
        *((replace(full, name=f"{ours}, float8, full accumulation", kernels=True),) if eight == "float8" else ()),
        PaperPolicy("exact auto", exact_dtype="auto"),
        PaperPolicy(f"{ours}, auto", exact_dtype="auto", kernels=True),
        PaperPolicy(f"{eight} base", exact_dtype="auto", base_dtype=eight),
        *((PaperPolicy("int8 base", exact_dtype="auto", base_dtype="int8"),) if eight == "float8" else ()),
        PaperPolicy("rank 256", rank=256),
        PaperPolicy("rank 1/4, exact_layers 0.5 auto", rank=1 / 4, exact_layers=0.5, exact_dtype="auto"),
        PaperPolicy(
            f"{ours}, rank 1/16, exact_layers 0.75", rank=1 / 16, exact_layers=0.75, exact_dtype="auto", kernels=True
        ),
    )


def run(
    model: str | Llama = "LLaMA-3-8B",
    gpu: str = "H100",
    policies: Sequence[PaperPolicy] = (),
    tokens: int = 8192,
    sequences: int = 2,
    lora_rank: int = 16,
    console: Console | None = None,
    json: Path | None = None,
) -> dict[str, Any]:
    """Print the policies against PEFT, with and without checkpointing, and the parts of each; return, and write to
    `json`, the report.

    policies: `standard_policies` where none is given. The others as in `predict`. Raises ValueError, naming the
    argument, before anything is printed or written.
    """
    policies = tuple(policies) or standard_policies(gpu)
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise ValueError(f"policies: the names {', '.join(map(repr, names))} are not all different")
    check_writable(json)

    def both(policy: PaperPolicy) -> tuple[PaperStep, PaperStep]:
        sizes = (model, gpu, policy, tokens, sequences, lora_rank)
        return predict(*sizes, False), predict(*sizes, True)

    peft = both(PaperPolicy("peft", peft=True))
    steps = {policy.name: both(policy) for policy in policies}
    rows = [
        plain.to_dict()
        | {
            "checkpointed_milliseconds": checkpointed.milliseconds,
            "recomputation_milliseconds": 1e3 * checkpointed.parts[_RECOMPUTATION].seconds,
            "speedup": peft[0].seconds / plain.seconds,
            "checkpointed_speedup": peft[1].seconds / checkpointed.seconds,
        }
        for plain, checkpointed in steps.values()
    ]
    report = {
        "benchmark": "on paper",
        "predicted": True,
        "model": {"name": known("model", model, MODELS) if isinstance(model, str) else "LLaMA"} | asdict(_model(model)),
        "gpu": {"name": known("gpu", gpu, GPUS)} | _gpu(gpu).to_dict(),
        "tokens": tokens,
        "sequences": sequences,
        "lora_rank": lora_rank,
        "rows": rows,
    }
    console = console or Console()
    _print_policies(console, report)
    for name, (plain, _) in steps.items():
        _print_parts(console, name, plain)
    write(report, json)
    return report


def _print_policies(console: Console, report: dict[str, Any]) -> None:
    gpu, model = report["gpu"], report["model"]
    float8 = (
        f", {gpu['float8_fast']:.0f} ({gpu['float8']:.0f} with full accumulation) in float8" if gpu["float8"] else ""
    )
    console.print(
        f"[bold]Predicted, not measured[/bold]: {model['name']} (hidden {model['hidden']}, {model['layers']} layers) "
        f"on one {gpu['name']}, {report['tokens']} tokens in {report['sequences']} sequences, adapters of rank "
        f"{report['lora_rank']}, fused elementwise kernels; products {gpu['bf16']:.0f} TFLOP/s in 16 "
        f"bits, {gpu['int8']:.0f} in int8{float8}; copies {gpu['copy']} TB/s; a queue that is never empty",
        highlight=False,
        soft_wrap=True,
    )
    printed = table(("policy",), ("ms", "x PEFT", "ms, checkpointing", "x PEFT"))
    for row in report["rows"]:
        times = f"{row['milliseconds']:.1f}", f"{row['speedup']:.2f}"
        again = f"{row['checkpointed_milliseconds']:.1f}", f"{row['checkpointed_speedup']:.2f}"
        printed.add_row(row["policy"]["name"], *times, *again)
    print_wide(console, printed)


def _print_parts(console: Console, policy: str, step: PaperStep) -> None:
    console.print(f"[bold]{policy}[/bold], predicted without checkpointing", highlight=False, soft_wrap=True)
    printed = table(("part",), ("GB", "TFLOP", "kernels", "ms", "bound by"))
    for name, cost in (*step.parts.items(), ("all", sum(step.parts.values(), Cost()))):
        counts = f"{cost.bytes / 1e9:.2f}", f"{cost.flops / 1e12:.2f}", f"{cost.kernels:.0f}"
        printed.add_row(name, *counts, f"{1e3 * cost.seconds:.1f}", cost.bound)
    print_wide(console, printed)


def _model(model: str | Llama) -> Llama:
    return model if isinstance(model, Llama) else MODELS[known("model", model, MODELS)]


def _gpu(gpu: str) -> Gpu:
    return GPUS[known("gpu", gpu, GPUS)]
