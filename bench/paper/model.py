"""Kernels of a LoRA training step, counted, and the time that a named GPU is predicted to take. Nothing is measured.

    time of a kernel = max(flops / rate, bytes / (share · copy rate)) + 2.5 us for its start and end

`GPUS` has the rates. Kernels reach these shares of the copy rate:

    skinny product summed over the wide side (x Aᵀ, dY B, dA, dB)     0.72 (H100, A100), 0.62 (H200)
    elementwise pass, or skinny product that writes the wide side      0.85
    passes around 8-bit products                                       `triton_kernels.dense`

A product with a side of width w, the rank, reaches w / (w + 160) of the GPU's rate: cuBLAS wastes tiles and fills its
pipeline for few columns. A dense product reaches all of it where its result has a tile of 128 x 128 for each SM, and
with fewer tiles the share of the SMs that have one. Operands have 16 bits; M tokens, N out, K in, R factor rank, P
adapter rank. Left out: the host (every kernel is in the queue when its turn comes), the embedding, the last norm, and
that the first block needs no dX of q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from loge_kernels.triton_kernels.dense import quantisation_passes

from ..measure.shapes import LLAMAS, Llama

Elementwise = Literal["lean", "eager"]
EightBits = Literal["int8", "float8"]

_LAUNCH = 2.5e-6  # seconds from one kernel's end to the next one's full speed, in a queue that is never empty
_PASS = 0.85  # share of the copy rate, as above
_HALF_WIDTH = 160  # columns at which a narrow product reaches half of the rate
_TILE = 128  # rows and columns of a dense product's result that one SM computes at a time
_CROSS_ENTROPY = 28  # bytes a logit: to float32 (6), log-softmax (8), its backward (8), to 16 bits (6)
_OPTIMIZER = 96  # bytes an adapter element: 21 reads and writes of AdamW's foreach passes, 3 of clipping, in float32
_OPTIMIZER_KERNELS = 11
_EIGHT_BIT_STEP = 16  # 8-bit products take N and K that are multiples of this


# LLaMA-2-7B from its published config, the others from `shapes`.
MODELS = {"LLaMA-2-7B": Llama(4096, 4096, 11008, 32, 32000), **LLAMAS}


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates of one GPU, sustained in a training step of a second: products and attention in TFLOP/s, copies in TB/s.

    float8 is None where there is none; `float8_fast` is with use_fast_accum. `skinny` is a share of `copy`.
    """

    sms: int
    bf16: float
    int8: float
    float8: float | None
    float8_fast: float | None
    attention_forward: float
    attention_backward: float
    copy: float
    skinny: float

    def rate(self, dtype: EightBits | None, fast_accumulation: bool = False) -> float:
        """flop/s of a dense product in `dtype`, None for 16 bits. Raises ValueError where the GPU has none."""
        float8 = self.float8_fast if fast_accumulation else self.float8
        rate = self.bf16 if dtype is None else self.int8 if dtype == "int8" else float8
        if rate is None:
            raise ValueError(f"dtype={dtype!r} does not run on this GPU; give 'int8' or None")
        return rate * 1e12


# Recalled from datasheets and published measurements; none was taken for this table.
# bf16: cuBLAS, on Hopper under a limit of 700 W, which holds it below the 740 to 790 of a short run. float8: row-wise
# torch._scaled_mm of cuBLAS 12.9 or newer. int8: on Hopper as slow float8, whose datasheet peak it shares; on A100 0.72
# of its own. attention: causal, heads of 128, 4096 tokens; FlashAttention 3 on Hopper, 2 on A100. copy: 0.90 of the
# datasheet. skinny: cuBLAS, thousands of tokens.
GPUS = {
    "H100": Gpu(132, 660, 980, 980, 1150, 450, 380, 3.0, 0.72),
    "H200": Gpu(132, 720, 1080, 1080, 1280, 450, 380, 4.3, 0.62),
    "A100": Gpu(108, 250, 450, None, None, 190, 150, 1.8, 0.72),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Counted flops, bytes and kernels, and predicted seconds, each kernel's under the bound that holds it."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    flops_seconds: float = 0.0
    bytes_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.flops_seconds + self.bytes_seconds + self.kernels * _LAUNCH

    @property
    def bound(self) -> Literal["flops", "bytes", "launches"]:
        """What most of the time goes to."""
        longest = max(self.flops_seconds, self.bytes_seconds, self.kernels * _LAUNCH)
        if longest == self.flops_seconds:
            return "flops"
        return "bytes" if longest == self.bytes_seconds else "launches"

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.flops_seconds + other.flops_seconds,
            self.bytes_seconds + other.bytes_seconds,
        )

    def __mul__(self, count: float) -> Cost:
        """The cost of `count` such parts; a share, such as of exact steps, is a count too."""
        return Cost(
            self.flops * count,
            self.bytes * count,
            self.kernels * count,
            self.flops_seconds * count,
            self.bytes_seconds * count,
        )


def kernel(flops: float, rate: float, nbytes: float, bandwidth: float) -> Cost:
    """One kernel: the longer of its flops at `rate` flop/s and its bytes at `bandwidth` bytes/s."""
    arithmetic, memory = flops / rate, nbytes / bandwidth
    return Cost(flops, nbytes, 1, arithmetic if arithmetic >= memory else 0.0, memory if memory > arithmetic else 0.0)


def passes(gpu: Gpu, nbytes: float, kernels: int = 1, share: float = _PASS) -> Cost:
    """Elementwise kernels that move `nbytes` in all."""
    return Cost(bytes=nbytes, kernels=kernels, bytes_seconds=nbytes / (share * gpu.copy * 1e12))


def dense(gpu: Gpu, I: int, J: int, L: int, dtype: EightBits | None = None, fast_accumulation: bool = False) -> Cost:
    """[I, J] @ [J, L] with no narrow side, operands in `dtype` or 16 bits; int8 writes int32, all else 16 bits."""
    nbytes = (I * J + J * L) * (1 if dtype else 2) + I * L * (4 if dtype == "int8" else 2)
    busy = min(1.0, ceil(I / _TILE) * ceil(L / _TILE) / gpu.sms)
    return kernel(2.0 * I * J * L, busy * gpu.rate(dtype, fast_accumulation), nbytes, _PASS * gpu.copy * 1e12)


def narrow(gpu: Gpu, I: int, J: int, L: int, accumulates: bool = False) -> Cost:
    """[I, J] @ [J, L] in 16 bits whose narrowest side is a rank; `accumulates`: it reads what it adds to."""
    width = min(I, J, L)
    share = _PASS if width == J else gpu.skinny
    nbytes = 2 * (I * J + J * L + I * L * (2 if accumulates else 1))
    rate = gpu.rate(None) * width / (width + _HALF_WIDTH)
    return kernel(2.0 * I * J * L, rate, nbytes, share * gpu.copy * 1e12)


def lora_forward(gpu: Gpu, M: int, N: int, K: int, P: int, peft: bool) -> Cost:
    """What the adapter adds to y = x Wᵀ: PEFT moves MK + 6 MN elements, the op MK + 2 MN and s·B."""
    if peft:  # x Aᵀ; xa Bᵀ; times s; added to y
        return narrow(gpu, M, K, P) + narrow(gpu, M, P, N) + passes(gpu, 4 * M * N) + passes(gpu, 6 * M * N)
    return Cost(kernels=1) + narrow(gpu, M, K, P) + narrow(gpu, M, P, N, accumulates=True)


def lora_gradients(gpu: Gpu, M: int, N: int, K: int, P: int) -> Cost:
    """dA = Tᵀ x and dB = dYᵀ xa, each one read of a wide operand."""
    return narrow(gpu, P, M, K) + narrow(gpu, N, M, P)


def lora_backward(gpu: Gpu, M: int, N: int, K: int, P: int, peft: bool) -> Cost:
    """dA, dB and the adapter's part of an exact dX: PEFT moves 4 MN + 5 MK elements, the op 2 MN + 3 MK."""
    gradients = lora_gradients(gpu, M, N, K, P) + narrow(gpu, M, N, P)
    if peft:  # s·dY; its product with B; that with A; added to dX
        return gradients + passes(gpu, 4 * M * N) + narrow(gpu, M, P, K) + passes(gpu, 6 * M * K)
    # Small kernels: s·B, its copy, s·dB. The product with A is added to dX in place.
    return gradients + Cost(kernels=3) + narrow(gpu, M, P, K, accumulates=True)


def quantisation(gpu: Gpu, M: int, N: int, K: int, dtype: EightBits) -> Cost:
    """Passes around the 8-bit product for dX: row maxima of dY, two small kernels for the scales, the division; int8
    also rounds and converts, and scales int32 sums by row and by column afterwards."""
    counted = quantisation_passes(M, N, K, dtype)
    return sum((passes(gpu, nbytes, share=share) for nbytes, share in counted), Cost(kernels=2))


def fastest_dtype(gpu: Gpu, M: int, N: int, K: int, fast_accumulation: bool = False) -> EightBits | None:
    """What the dense product dX = dY W takes least time in, its quantisation counted; None for 16 bits."""
    seconds: dict[EightBits | None, float] = {None: dense(gpu, M, N, K).seconds}
    eight_bits: tuple[EightBits, ...] = ("int8",) if gpu.float8 is None else ("int8", "float8")
    for dtype in eight_bits if runs_in_eight_bits(N, K) else ():
        product = dense(gpu, M, N, K, dtype, fast_accumulation)
        seconds[dtype] = (product + quantisation(gpu, M, N, K, dtype)).seconds
    return min(seconds, key=lambda dtype: seconds[dtype])


def runs_in_eight_bits(N: int, K: int) -> bool:
    """Whether cuBLAS has an 8-bit product for a weight [N, K]."""
    return N % _EIGHT_BIT_STEP == 0 and K % _EIGHT_BIT_STEP == 0


def low_rank_dx(gpu: Gpu, M: int, N: int, K: int, R: int, P: int) -> Cost:
    """T = dY [left | s·B], dX = T [right ; A] by cuBLAS: s·B, two concatenations, two products, s·dB."""
    joined = passes(gpu, 4 * (R + P) * (N + K), kernels=2) + Cost(kernels=2)
    return joined + narrow(gpu, M, N, R + P) + narrow(gpu, M, R + P, K)


def attention(gpu: Gpu, model: Llama, M: int, length: int) -> tuple[Cost, Cost]:
    """Forward and backward of one block's causal attention: half of the two products of all tokens with `length` keys,
    and five in backward; queries, keys, values and outputs read or written once, their gradients as well."""
    flops = 2.0 * M * length * model.hidden
    tensors = 2 * M * (2 * model.hidden + 2 * model.key_value)
    bandwidth = _PASS * gpu.copy * 1e12
    forward = kernel(flops, gpu.attention_forward * 1e12, tensors, bandwidth)
    backward = kernel(2.5 * flops, gpu.attention_backward * 1e12, 2 * tensors, bandwidth)
    return forward, backward + Cost(kernels=2)  # row sums before, dq to 16 bits after


def elementwise(gpu: Gpu, model: Llama, M: int, kind: Elementwise) -> tuple[Cost, Cost]:
    """Forward and backward of one block's two norms, two residual sums, rotations of q and k, and SwiGLU; backward has
    three more sums, of the gradients of the inputs that q, k, v and gate, up share.

    "lean" reads and writes each operand once in one kernel an operation; "eager" is transformers' Python, one kernel
    a line of it, with the norms in float32.
    """
    h, rotated, wide = (2 * M * width for width in (model.hidden, model.hidden + model.key_value, model.intermediate))
    sums = 2 * 3 * h, 5 * 3 * h
    if kind == "lean":
        forward = passes(gpu, sums[0] + 2 * 2 * h + 2 * rotated + 3 * wide, kernels=7)
        return forward, passes(gpu, sums[1] + 2 * 3 * h + 2 * rotated + 5 * wide, kernels=10)
    forward = passes(gpu, sums[0] + 2 * 18 * h + 10 * rotated + 5 * wide, kernels=30)
    return forward, passes(gpu, sums[1] + 2 * 42 * h + 15 * rotated + 9 * wide, kernels=54)


def head(gpu: Gpu, model: Llama, M: int) -> tuple[Cost, Cost]:
    """The output head, forward and dX, and the cross-entropy of its logits in float32, forward and backward."""
    h, vocabulary = model.hidden, model.vocabulary
    products = dense(gpu, M, h, vocabulary) + dense(gpu, M, vocabulary, h)
    return products, passes(gpu, _CROSS_ENTROPY * M * vocabulary, kernels=4)


def optimizer(gpu: Gpu, model: Llama, P: int) -> Cost:
    """AdamW with gradient clipping on the adapters of all linear layers."""
    elements = model.layers * P * sum(N + K for N, K in model.linears())
    return passes(gpu, _OPTIMIZER * elements, kernels=_OPTIMIZER_KERNELS)


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None, vocab: int) -> Llama:
    """A model of any size; kv_heads None for as many as heads. Raises ValueError for sizes that do not fit."""
    key_value_heads = heads if kv_heads is None else kv_heads
    sizes = {"hidden": hidden, "intermediate": intermediate, "layers": layers, "heads": heads, "vocab": vocab}
    for name, value in (sizes | {"kv_heads": key_value_heads}).items():
        check_count(name, value)
    if hidden % heads or heads % key_value_heads:
        raise ValueError(
            f"hidden={hidden}, heads={heads}, kv_heads={key_value_heads}: hidden must be a multiple of heads, and "
            "heads of kv_heads"
        )
    return Llama(hidden, hidden // heads * key_value_heads, intermediate, layers, vocab)


def known(argument: str, value: str, names: Iterable[str]) -> str:
    """The one of `names` that `value` is in upper or lower case. Raises ValueError, naming `argument`, for none."""
    for name in names:
        if name.lower() == value.lower():
            return name
    raise ValueError(f"{argument}={value!r} is not known; choose from {', '.join(names)}")


def check_count(name: str, value: int) -> None:
    """Raises ValueError, naming it, for what is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; give an integer of at least 1")
