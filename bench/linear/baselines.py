"""What is measured side by side on the same operands, each through the path that its users run.

| name             | what                                                                                             |
| ---------------- | ------------------------------------------------------------------------------------------------ |
| dense            | the frozen products alone, `x @ W.t()` and `dY @ W`: no adapter, no autograd                     |
| peft             | exact LoRA as PEFT computes it: its Linear layer through autograd                                |
| exact            | exact LoRA through this package's op (`factors=None`): the same products as the low-rank op,     |
|                  | so that what the method gains is apart from what better products gain                            |
| unfused R        | the low-rank formula as separate plain PyTorch products, dY read for each: no autograd           |
| exact triton     | the same by the exact kernels, where they are available; on a GPU also `exact float8`,           |
|                  | `exact int8 triton` and so on, whose dX is taken in 8 bits                                       |
| loge BACKEND R   | `loge_kernels.linear` with factors, by each backend that is available here, through autograd     |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.numerics import eight_bit

from ..measure.roofline import Ceilings, Formula, Sequence_, Work, backward_work, forward_work
from .operands import Operands

DIRECTIONS = ("backward", "forward+backward")
BASELINES = ("dense", "peft", "exact", "unfused")

Results = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing to time.

    `prepare()` returns the call (for "backward" it runs the forward first, outside the timing); the call returns its
    results by name: "y" (with the forward), "dx", "dA", "dB". `plain` marks calls made of torch's own products, which
    are slow for 16-bit dtypes on many CPUs.
    """

    name: str
    kind: str  # "dense", "peft", "exact", "unfused" or "loge"
    rank: int | None
    prepare: Callable[[], Callable[[], Results]]
    work: Work
    plain: bool
    factor_bytes: int = 0
    eight_bits: str | None = None  # what dX is taken in

    @property
    def adapter(self) -> bool:
        """Whether it computes the adapter's part."""
        return self.kind != "dense"

    def predicted_seconds(self, ceilings: Ceilings, direction: str, operands: Operands) -> float:
        """A rough time of one call from the measured rates of torch's own products; 0 where that is no concern."""
        if not self.plain:
            return 0.0
        M, N, K, P = operands.sizes
        itemsize = operands.dy.element_size()
        formula: Formula = "exact" if self.adapter else "product"
        forward = forward_work(formula, M, N, K, P, itemsize).flops if direction != "backward" else 0
        both = self.work.flops
        return forward / ceilings.plain_nt + (both - forward) / ceilings.plain_nn


def check_baselines(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not in `BASELINES`."""
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"baseline {name!r} is unknown; choose from {', '.join(BASELINES)}")


def candidates(
    operands: Operands,
    direction: str,
    backends: Sequence[str] | None = None,
    baselines: Sequence[str] = BASELINES,
) -> list[Candidate]:
    """Every candidate for these operands: the baselines first, then the backends for each rank.

    `backends`: names, or None for all that are available here. Raises ValueError for an unknown direction or baseline.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose one of {', '.join(DIRECTIONS)}")
    check_baselines(baselines)
    if backends is None:
        backends = [backend.name for backend in loge.backends() if backend.available]
    forward = direction != "backward"
    M, N, K, P = operands.sizes
    itemsize = operands.dy.element_size()

    def work(formula: Formula, R: int = 0, sequence: Sequence_ = "separate") -> Work:
        total = backward_work(formula, M, N, K, R, P, itemsize, sequence)
        return total + forward_work(formula, M, N, K, P, itemsize) if forward else total

    found = []
    if "dense" in baselines:
        found.append(Candidate("dense", "dense", None, partial(_dense, operands, forward), work("product"), True))
    if "peft" in baselines:
        found.append(Candidate("peft", "peft", None, partial(_peft, operands, forward), work("exact"), True))
    if "exact" in baselines:
        for name, eight_bits in _exact(operands, backends):
            prepare = partial(_op, operands, forward, None, name, eight_bits)
            label = " ".join(["exact", *([eight_bits] if eight_bits else []), *([name] * (name != "reference"))])
            kind = "exact" if label == "exact" else "loge"
            found.append(Candidate(label, kind, None, prepare, work("exact"), False, eight_bits=eight_bits))
    for R in operands.factors:
        held = R * (N + K) * itemsize
        if "unfused" in baselines:
            prepare = partial(_unfused, operands, forward, R)
            found.append(Candidate(f"unfused R={R}", "unfused", R, prepare, work("low-rank", R), True, held))
        for name in backends:
            sequence: Sequence_ = "concatenated" if name == "reference" else "fused"
            prepare = partial(_op, operands, forward, R, name)
            label = f"loge {name} R={R}"
            found.append(Candidate(label, "loge", R, prepare, work("low-rank", R, sequence), False, held))
    return found


def _exact(o: Operands, backends: Sequence[str]) -> list[tuple[str, str | None]]:
    """The backend and the 8 bits of each way to an exact gradient: PyTorch's, in the operands' own dtype, first."""
    names = ["reference", *(name for name in backends if name == "triton")]  # what has exact kernels
    in_eight_bits = [dtype for dtype in eight_bit.DTYPES if _takes(o, dtype)]
    return [(name, dtype) for dtype in (None, *in_eight_bits) for name in names]


def _takes(o: Operands, eight_bits: str) -> bool:
    """Where 8 bits are what `loge.apply` might choose: on a GPU, and a CPU's are for `bench step`."""
    if not o.dy.is_cuda or o.dtype == torch.float64:
        return False
    return eight_bit.why_not(eight_bits, o.dy.device, *o.weight.shape) is None


def _dense(o: Operands, forward: bool) -> Callable[[], Results]:
    x = o.x.detach()

    def call() -> Results:
        results = {"y": x @ o.weight.t()} if forward else {}
        return {**results, "dx": o.dy @ o.weight}

    return call


def _unfused(o: Operands, forward: bool, R: int) -> Callable[[], Results]:
    x, A, B = o.x.detach(), o.lora_A.detach().to(o.dtype), o.scaled_B
    left, right = o.factors[R].left.detach(), o.factors[R].right.detach()

    def forward_pass() -> tuple[Tensor, Tensor]:
        xa = x @ A.t()
        return torch.addmm(x @ o.weight.t(), xa, B.t()), xa

    saved = None if forward else x @ A.t()

    def call() -> Results:
        results = {}
        xa = saved
        if xa is None:
            results["y"], xa = forward_pass()
        dx = (o.dy @ left) @ right
        projected = o.dy @ B
        return {
            **results,
            "dx": torch.addmm(dx, projected, A),
            "dA": projected.t() @ x,
            "dB": (o.dy.t() @ xa).mul_(o.scaling),
        }

    return call


def _differentiated(
    o: Operands, forward: bool, layer: Callable[[], tuple[Tensor, list[Tensor]]]
) -> Callable[[], Results]:
    """The call for a differentiable layer; `layer()` returns y and the inputs x, lora_A, lora_B to differentiate."""
    graph = None if forward else layer()

    def call() -> Results:
        y, inputs = graph or layer()
        dx, dA, dB = torch.autograd.grad(y, inputs, o.dy, retain_graph=graph is not None)
        results = {"dx": dx, "dA": dA, "dB": dB}
        return results if graph else {"y": y.detach(), **results}

    return call


def _op(
    o: Operands, forward: bool, R: int | None, backend: str, eight_bits: str | None = None
) -> Callable[[], Results]:
    factors = None if R is None else o.factors[R]
    copy = None if eight_bits is None else eight_bit.EightBitWeight(eight_bits)  # made once, as a layer keeps it

    def layer() -> tuple[Tensor, list[Tensor]]:
        y = loge.linear(
            o.x,
            o.weight,
            factors,
            lora_A=o.lora_A,
            lora_B=o.lora_B,
            scaling=o.scaling,
            backend=backend,
            exact_dtype=copy,
        )
        return y, [o.x, o.lora_A, o.lora_B]

    return _differentiated(o, forward, layer)


class _Holder(nn.Module):
    """PEFT replaces layers inside a module; this is the smallest one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)


def _peft(o: Operands, forward: bool) -> Callable[[], Results]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RuntimeError(f"needs PEFT (pip install 'loge_kernels[peft]'): {error}") from error
    P = o.lora_A.shape[0]
    holder = _Holder(o.weight)
    config = LoraConfig(r=P, lora_alpha=round(o.scaling * P), target_modules=["linear"], lora_dropout=0.0)
    get_peft_model(holder, config, autocast_adapter_dtype=False)  # replaces holder.linear in place
    layer: Any = holder.linear
    for part, value in ((layer.lora_A["default"], o.lora_A), (layer.lora_B["default"], o.lora_B)):
        part.weight = nn.Parameter(value.detach())
    inputs = [o.x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return _differentiated(o, forward, lambda: (layer(o.x), inputs))
