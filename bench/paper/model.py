"""Kernels of a LoRA training step, counted, and the time that a named GPU is predicted to take. Nothing is measured.

The rates, the shares of them that kernels reach, and the counts of products and passes are those of `loge.explain`
(`triton_kernels.rates`, `library`, `cost_exact`). Dense products run at the rate that lasts for a training step of a
second, not at that of a short run. Operands have 16 bits; M tokens, N out, K in, R factor rank, P adapter rank. Left
out: the host (every kernel is in the queue when its turn comes), the embedding, the last norm, and that the first block
needs no dX of q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from loge_kernels.numerics.four_bit import FORMATS
from loge_kernels.triton_kernels import cost_exact, library, phases
from loge_kernels.triton_kernels.dense import ADAPTER
from loge_kernels.triton_kernels.rates import B200, KERNEL_US, KNOWN, PASS, DeviceSpec

from ..measure.shapes import LLAMAS, Llama

EightBits = Literal["int8", "float8"]
FewBits = Literal["int8", "float8", "nvfp4", "mxfp4"]

_CROSS_ENTROPY = 28  # bytes a logit: to float32 (6), log-softmax (8), its backward (8), to 16 bits (6)
_OPTIMIZER = 96  # bytes an adapter element: 21 reads and writes of AdamW's foreach passes, 3 of clipping, in float32
_OPTIMIZER_KERNELS = 11
# PyTorch's operations that make 4 bits of dY: bytes an element, kernels for the whole and for each slab of 2 ** 22.
_FOUR_BITS, _FOUR_BIT_KERNELS, _SLAB_KERNELS = 190, 15, 26


# LLaMA-2-7B from its published config, the others from `shapes`.
MODELS = {"LLaMA-2-7B": Llama(4096, 4096, 11008, 32, 32000), **LLAMAS}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: what the cost model knows of it, and causal attention with heads of 128 and 4096 tokens, in TFLOP/s."""

    spec: DeviceSpec
    attention_forward: float
    attention_backward: float

    @property
    def float8(self) -> bool:
        return self.spec.float8 > 0

    def to_dict(self) -> dict[str, Any]:
        """The rates that a step rests on, JSON-able: products and attention in TFLOP/s, copies in TB/s; float8 is None
        where there is none."""
        own = self.spec.tflops_16_sustained
        return {
            "device": self.spec.name,
            "sms": self.spec.sms,
            "bf16": own,
            "bf16_short_run": self.spec.tflops_16,
            "int8": own * self.spec.int8,
            "float8": own * self.spec.float8 or None,
            "float8_fast": own * self.spec.float8_fast or None,
            "four_bit": own * self.spec.four_bit or None,
            "attention_forward": self.attention_forward,
            "attention_backward": self.attention_backward,
            "copy": self.spec.hbm_gbs / 1e3,
            "skinny": self.spec.skinny,
        }


# Attention: FlashAttention 3 on Hopper, 2 on A100, as published, and on a B200 at Hopper's share of the matrix rate;
# none was measured for this table.
GPUS = {
    "H100": Gpu(KNOWN["NVIDIA H100 80GB HBM3"], 450, 380),
    "H200": Gpu(KNOWN["NVIDIA H200"], 450, 380),
    "A100": Gpu(KNOWN["NVIDIA A100-SXM4-80GB"], 190, 150),
    "B200": Gpu(B200, 1100, 930),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Counted flops, bytes and kernels, and predicted seconds, each kernel's under the bound that holds it."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    flops_seconds: float = 0.0
    bytes_seconds: float = 0.0

    launch_seconds: float = 0.0

    @classmethod
    def of(cls, *counted: phases.Phase) -> Cost:
        """The sum of phases, which follow each other."""
        cost = cls()
        for phase in counted:
            bound = phase.bound_us * 1e-6
            flops = (bound, 0.0) if phase.limit == "tensor" or phase.tensor_us >= phase.hbm_us > 0 else (0.0, bound)
            cost += cls(phase.flops, phase.hbm_bytes, phase.kernels, *flops, phase.launch_us * 1e-6)
        return cost

    @property
    def seconds(self) -> float:
        return self.flops_seconds + self.bytes_seconds + self.launch_seconds

    @property
    def bound(self) -> Literal["flops", "bytes", "launches"]:
        """What most of the time goes to."""
        longest = max(self.flops_seconds, self.bytes_seconds, self.launch_seconds)
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
            self.launch_seconds + other.launch_seconds,
        )

    def __mul__(self, count: float) -> Cost:
        """The cost of `count` such parts; a share, such as of exact steps, is a count too."""
        return Cost(
            self.flops * count,
            self.bytes * count,
            self.kernels * count,
            self.flops_seconds * count,
            self.bytes_seconds * count,
            self.launch_seconds * count,
        )


def kernel(gpu: Gpu, flops: float, tflops: float, nbytes: float) -> Cost:
    """One kernel: the longer of its flops at `tflops` and its bytes at a pass's rate."""
    arithmetic, memory = flops / (tflops * 1e12), nbytes / (PASS * gpu.spec.hbm_gbs * 1e9)
    seconds = (arithmetic, 0.0) if arithmetic >= memory else (0.0, memory)
    return Cost(flops, nbytes, 1, *seconds, _launches(gpu, 1))


def _launches(gpu: Gpu, kernels: float) -> float:
    """Seconds from kernels' ends to the next ones' full speed, in a queue that is never empty."""
    return kernels * (gpu.spec.gap_us + KERNEL_US) * 1e-6


def small(gpu: Gpu, kernels: int) -> Cost:
    """Kernels that move next to nothing."""
    return passes(gpu, 0, kernels)


def passes(gpu: Gpu, nbytes: float, kernels: int = 1, share: float = PASS) -> Cost:
    """Elementwise kernels that move `nbytes` in all."""
    return Cost.of(phases.passes("", gpu.spec, int(nbytes), kernels, share))


def dense(gpu: Gpu, I: int, J: int, L: int, dtype: FewBits | None = None, fast_accumulation: bool = True) -> Cost:
    """[I, J] @ [J, L] with no narrow side, operands in `dtype` or 16 bits; int8 writes int32, all else 16 bits. Raises
    ValueError where the GPU has no such product."""
    if dtype is None:
        return Cost.of(library.dense_product("", gpu.spec, I, J, L))
    times = cost_exact.rate_of(gpu.spec, precision(dtype, fast_accumulation))
    if not times:
        raise ValueError(f"dtype={dtype!r} does not run on this GPU; give 'int8' or None")
    out_size = 4 if dtype == "int8" else 2
    return Cost.of(library.dense_product("", gpu.spec, I, J, L, 1, times=times, out_size=out_size))


def precision(dtype: FewBits, fast_accumulation: bool) -> str:
    """The name that the cost model gives to `dtype`."""
    return cost_exact.FAST if dtype == "float8" and fast_accumulation else dtype


def narrow(gpu: Gpu, I: int, J: int, L: int, accumulates: bool = False) -> Cost:
    """[I, J] @ [J, L] in 16 bits whose narrowest side is a rank; `accumulates`: it reads what it adds to."""
    return Cost.of(library.narrow_product("", gpu.spec, I, J, L, accumulates=accumulates))


def lora_forward(gpu: Gpu, M: int, N: int, K: int, P: int, peft: bool) -> Cost:
    """What the adapter adds to y = x Wᵀ: PEFT moves MK + 6 MN elements, the op MK + 2 MN and s·B."""
    if peft:  # x Aᵀ; xa Bᵀ; times s; added to y
        return narrow(gpu, M, K, P) + narrow(gpu, M, P, N) + passes(gpu, 4 * M * N) + passes(gpu, 6 * M * N)
    return small(gpu, 1) + narrow(gpu, M, K, P) + narrow(gpu, M, P, N, accumulates=True)


def lora_gradients(gpu: Gpu, M: int, N: int, K: int, P: int) -> Cost:
    """dA = Tᵀ x and dB = dYᵀ xa, each one read of a wide operand."""
    return narrow(gpu, P, M, K) + narrow(gpu, N, M, P)


def lora_backward(gpu: Gpu, M: int, N: int, K: int, P: int, peft: bool) -> Cost:
    """dA, dB and the adapter's part of an exact dX: PEFT moves 4 MN + 5 MK elements, the op 2 MN + 3 MK."""
    gradients = lora_gradients(gpu, M, N, K, P) + narrow(gpu, M, N, P)
    if peft:  # s·dY; its product with B; that with A; added to dX
        return gradients + passes(gpu, 4 * M * N) + narrow(gpu, M, P, K) + passes(gpu, 6 * M * K)
    # Small kernels: s·B, s·dB. The product with A is added to dX in place.
    return gradients + small(gpu, 2) + narrow(gpu, M, P, K, accumulates=True)


def quantisation(gpu: Gpu, M: int, N: int, K: int, dtype: FewBits) -> Cost:
    """Passes around the product for dX: row maxima of dY, two small kernels for the scales, the division; int8 also
    rounds and converts, and scales int32 sums by row and by column afterwards. 4 bits are made by PyTorch's operations
    one by one (`numerics.four_bit`), which rotate, scale, round and pack."""
    if dtype in FORMATS:
        slabs = -(-M * N // 2**22)
        return passes(gpu, _FOUR_BITS * M * N, _FOUR_BIT_KERNELS + slabs * _SLAB_KERNELS)
    before, after = cost_exact.quantisation(M, N, K, dtype)
    return sum((passes(gpu, nbytes, share=share) for nbytes, share in before + after), small(gpu, 2))


def exact_kernels(
    gpu: Gpu,
    M: int,
    N: int,
    K: int,
    P: int,
    dtype: EightBits | None,
    fast_accumulation: bool = True,
    base: bool = False,
) -> dict[str, Cost]:
    """One linear layer's exact backward by this package's kernels around and in the product, in the form that takes
    least time: its product, what quantises dY, and all else. `base`: the weight is kept in `dtype` row by row, as the
    forward wants it, and transposed for the product; in int8 that is ours, which rotates dX back."""
    forms = ("fused",) if base and dtype == "int8" else ("prepared", "fused")
    parts = _parts(_cheapest(gpu, forms, M, N, K, P, dtype, phases.Flags(), fast_accumulation))
    if base:
        parts["quantise"] += passes(gpu, 2 * N * K)
    return parts


def forward_in_eight_bits(
    gpu: Gpu, M: int, N: int, K: int, P: int, dtype: EightBits, fast_accumulation: bool = True
) -> dict[str, Cost]:
    """y = x Wᵀ + s (x Aᵀ) Bᵀ with x and W in 8 bits, in the form that takes least time: product and adapter."""
    flags = phases.Flags(need_dx=True, need_dA=False, need_dB=False)
    parts = _parts(
        _cheapest(gpu, ("prepared", "fused"), M, K, N, P, dtype, flags, fast_accumulation, ("product", "adapter"))
    )
    return {"product": parts["product"], "LoRA": parts["LoRA"] + small(gpu, 2) + narrow(gpu, M, K, P)}


def _cheapest(
    gpu: Gpu,
    forms: Iterable[str],
    M: int,
    N: int,
    K: int,
    P: int,
    dtype: EightBits | None,
    flags: phases.Flags,
    fast_accumulation: bool,
    only: tuple[str, ...] = (),
) -> list[phases.Phase]:
    """The phases, all or those named `only`, of the form whose phases take least time."""
    name = dtype and precision(dtype, fast_accumulation)
    found = [cost_exact.estimate_exact(form, name, M, N, K, P, flags, gpu.spec).phases for form in forms]
    kept = [[phase for phase in each if not only or phase.name in only] for each in found]
    return min(kept, key=lambda each: sum(phase.us for phase in each))


def _parts(counted: Iterable[phases.Phase]) -> dict[str, Cost]:
    parts = {"product": Cost(), "quantise": Cost(), "LoRA": Cost()}
    for phase in counted:
        parts[phase.name if phase.name in parts else "LoRA"] += Cost.of(phase)
    return parts


def fastest_dtype(
    gpu: Gpu, M: int, N: int, K: int, fast_accumulation: bool = True, kernels: bool = False
) -> EightBits | None:
    """What the dense product dX = dY W takes least time in, its quantisation counted; None for 16 bits. `kernels`: by
    this package's, with an adapter."""

    def seconds(dtype: EightBits | None) -> float:
        if kernels:
            return sum(part.seconds for part in exact_kernels(gpu, M, N, K, ADAPTER, dtype, fast_accumulation).values())
        product = dense(gpu, M, N, K, dtype, fast_accumulation)
        return product.seconds if dtype is None else (product + quantisation(gpu, M, N, K, dtype)).seconds

    eight_bits: tuple[EightBits, ...] = ("int8", "float8") if gpu.float8 else ("int8",)
    return min((None, *(eight_bits if runs_in_eight_bits(N, K) else ())), key=seconds)


def runs_in_eight_bits(N: int, K: int) -> bool:
    """Whether cuBLAS has an 8-bit product for a weight [N, K]."""
    return N % cost_exact.EIGHT_BIT_STEP == 0 and K % cost_exact.EIGHT_BIT_STEP == 0


def low_rank_dx(gpu: Gpu, M: int, N: int, K: int, R: int, P: int) -> Cost:
    """T = dY [left | s·B], dX = T [right ; A] by cuBLAS: s·B, two concatenations, two products, s·dB."""
    joined = passes(gpu, 4 * (R + P) * (N + K), kernels=2) + small(gpu, 2)
    return joined + narrow(gpu, M, N, R + P) + narrow(gpu, M, R + P, K)


def attention(gpu: Gpu, model: Llama, M: int, length: int) -> tuple[Cost, Cost]:
    """Forward and backward of one block's causal attention: half of the two products of all tokens with `length` keys,
    and five in backward; queries, keys, values and outputs read or written once, their gradients as well."""
    flops = 2.0 * M * length * model.hidden
    tensors = 2 * M * (2 * model.hidden + 2 * model.key_value)
    forward = kernel(gpu, flops, gpu.attention_forward, tensors)
    backward = kernel(gpu, 2.5 * flops, gpu.attention_backward, 2 * tensors)
    return forward, backward + small(gpu, 2)  # row sums before, dq to 16 bits after


def elementwise(gpu: Gpu, model: Llama, M: int) -> tuple[Cost, Cost]:
    """Forward and backward of one block's two norms, two residual sums, rotations of q and k, and SwiGLU; backward has
    three more sums, of the gradients of the inputs that q, k, v and gate, up share. Each is one kernel that reads and
    writes its operands once.
    """
    h, rotated, wide = (2 * M * width for width in (model.hidden, model.hidden + model.key_value, model.intermediate))
    sums = 2 * 3 * h, 5 * 3 * h
    forward = passes(gpu, sums[0] + 2 * 2 * h + 2 * rotated + 3 * wide, kernels=7)
    return forward, passes(gpu, sums[1] + 2 * 3 * h + 2 * rotated + 5 * wide, kernels=10)


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
