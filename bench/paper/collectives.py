"""Bytes that the blocks of a LLaMA send under FSDP2 and DDP, on paper, by policy.

Per block, averaged over the layers and steps of the policy, what each GPU receives with n GPUs is (n - 1) / n of

                                        forward gathers       backward gathers          backward reduces
    FSDP2: PEFT; exact in 16 bits       weights + adapters    weights + adapters        adapters' gradients
    loge.fully_shard: exact in 8 bits   weights + adapters    8-bit copies + adapters   adapters' gradients
    loge.fully_shard: low rank          weights + adapters    factors + adapters        adapters' gradients
    loge.fully_shard: base in 8 bits    8 bits + adapters     8 bits + adapters         adapters' gradients
    either, with checkpointing          weights + adapters    weights + adapters        adapters' gradients
    DDP                                 -                     -                         adapters' gradients, twice

(norms count with the adapters; a DDP all-reduce is a reduce-scatter and an all-gather). `bench collectives` counts the
same on real ranks, and a test holds these sums to what it counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from loge_kernels.numerics.four_bit import FORMATS

from ..measure.shapes import Llama
from .run import PaperPolicy, layer_dtype, layer_rank

ENGINES = ("fsdp2", "ddp")


@dataclass(frozen=True, slots=True)
class Held:
    """What one block holds, in bytes: frozen weights, 8-bit copies, factors, what is trained, norms; and what of the
    first three a backward reads, `read`."""

    weights: float
    copies: float
    factors: float
    read: float
    adapters: int
    norms: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of the whole tensors of one block's collectives in a step: gathered in forward and in backward, reduced."""

    forward: float
    backward: float
    reduced: float


def held(
    llama: Llama, policy: PaperPolicy, gpu: str, tokens: int, lora_rank: int, base: int = 2, adapter: int = 4
) -> Held:
    """A block's bytes, on average, with weights of `base` bytes an element and adapters of rank `lora_rank` and
    `adapter` bytes on every linear layer. `gpu` and `tokens` say which layers exact_dtype="auto" has in 8 bits. Raises
    ValueError for 4 bits, which are not sharded."""
    if policy.exact_dtype in FORMATS:
        raise ValueError(f"policy {policy.name!r}: copies in 4 bits cannot be sharded; give 'float8', 'int8' or None")
    weights = copies = factors = read = 0.0
    for N, K in llama.linears():
        R, dtype = layer_rank(policy.rank, N, K), layer_dtype(gpu, policy, tokens, N, K)
        low = 0.0 if R is None else 1.0 - policy.exact_layers  # share of the layers that have factors
        exact = 1.0 if R is None else policy.exact_share  # of layers and steps
        kept = 1.0 if policy.exact_every is not None else 1.0 - low  # of the layers that ever read the dense weight
        kept_in = 1 if policy.base_dtype else base  # bytes an element; scales of rows are not sharded
        copy, factor = N * K + 4 * K, 0 if R is None else R * (N + K) * base
        weights += N * K * kept_in
        copies += 0.0 if dtype is None or policy.base_dtype else kept * copy
        factors += low * factor
        read += exact * (N * K * kept_in if dtype is None or policy.base_dtype else copy) + (1.0 - exact) * factor
    adapters = sum(lora_rank * (N + K) for N, K in llama.linears()) * adapter
    return Held(weights, copies, factors, read, adapters, 2 * llama.hidden * base)


def traffic(held: Held, engine: str, checkpointing: bool = False) -> Traffic:
    """What one block sends under `engine`, of `ENGINES`."""
    if engine == "ddp":
        return Traffic(0.0, 0.0, 2 * held.adapters)
    others = held.adapters + held.norms
    return Traffic(held.weights + others, (held.weights if checkpointing else held.read) + others, held.adapters)
