"""Counted work of every candidate, the measured ceilings of the device, and the time that the two allow.

All counts are of the formulas in `loge_kernels.backend.naive`; M tokens, N out, K in, R factor rank, P adapter rank. A
multiply and an add are two flops; elementwise passes count no flops.

    matrix product [I, J] @ [J, L]   2·I·J·L flops; I·J + J·L elements read, I·L written (I·L more read to accumulate)

    formula          forward (every one: 2MNK + 2MP(N+K))        backward
    product alone    x Wᵀ                        2MNK            dY W                      2MNK
    exact            x Wᵀ, xa = x Aᵀ, + xa Bᵀ                    dY W            2MNK      + 4MP(N+K)
    low rank         the same                                    dY·left·right   2MR(N+K)  + 4MP(N+K)

    4MP(N+K): the adapter's dY B and (dY B) A for dX, dA = (dY B)ᵀ x, dB = dYᵀ xa.

Two byte counts: `moved`, what the candidate's sequence of products reads and writes when each runs on its own, and
`floor`, each operand read once and each result written once, whatever the sequence. The roofline of a formula is
max(floor / bandwidth, flops / matmul rate), the launch overhead left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from loge_kernels.numerics.matmul import slow_on_cpu

Formula = Literal["product", "exact", "low-rank"]
Sequence_ = Literal["separate", "concatenated", "fused"]


@dataclass(frozen=True, slots=True)
class Work:
    """Counted work: flops, bytes moved by this sequence of products, bytes that no sequence can avoid."""

    flops: int
    moved_bytes: int
    floor_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.moved_bytes + other.moved_bytes, self.floor_bytes + other.floor_bytes
        )


def _products(*sizes: tuple[int, int, int, bool]) -> tuple[int, int]:
    """(flops, elements moved) of products [I, J] @ [J, L], given as (I, J, L, accumulates)."""
    flops = sum(2 * I * J * L for I, J, L, _ in sizes)
    moved = sum(I * J + J * L + I * L * (2 if accumulates else 1) for I, J, L, accumulates in sizes)
    return flops, moved


def forward_work(formula: Formula, M: int, N: int, K: int, P: int, itemsize: int) -> Work:
    """Work of y = x Wᵀ (+ s (x Aᵀ) Bᵀ, unless `formula` is "product")."""
    if formula == "product":
        flops, moved = _products((M, K, N, False))
        return Work(flops, moved * itemsize, moved * itemsize)
    flops, moved = _products((M, K, N, False), (M, K, P, False), (M, P, N, True))
    floor = M * K + N * K + P * (N + K) + M * N + M * P  # x, W, A, B -> y, xa
    return Work(flops, moved * itemsize, floor * itemsize)


def backward_work(
    formula: Formula, M: int, N: int, K: int, R: int, P: int, itemsize: int, sequence: Sequence_ = "separate"
) -> Work:
    """Work of dX, dA, dB (dX alone when `formula` is "product") from dY.

    `sequence` says how the products of the low-rank formula run: "separate" reads dY for dY·left, dY B and dB;
    "concatenated" takes [left | s·B] and [right ; A] as one matrix each; "fused" is one launch that moves the floor.
    """
    if formula == "product":
        flops, moved = _products((M, N, K, False))
        return Work(flops, moved * itemsize, moved * itemsize)
    adapter_grads = [(P, M, K, False), (N, M, P, False)]  # dA, dB
    if formula == "exact":
        adapter_dx = [(M, N, P, False), (M, P, K, True)]
        flops, moved = _products((M, N, K, False), *adapter_dx, *adapter_grads)
        frozen = N * K
    elif sequence == "concatenated":
        flops, moved = _products((M, N, R + P, False), (M, R + P, K, False), *adapter_grads)
        frozen = R * (N + K)
    else:
        adapter_dx = [(M, N, P, False), (M, P, K, True)]
        flops, moved = _products((M, N, R, False), (M, R, K, False), *adapter_dx, *adapter_grads)
        frozen = R * (N + K)
    # dY, W or the factors, x, xa, A, B -> dX, dA, dB
    floor = M * N + frozen + M * K + M * P + P * (N + K) + M * K + P * (N + K)
    if sequence == "fused":
        moved = floor
    return Work(flops, moved * itemsize, floor * itemsize)


def speedup_ceiling(direction: str, N: int, K: int, R: int) -> float:
    """The most that rank R can gain over the dense frozen products by flops: 2/(1+f) for forward + backward, 1/f for
    backward alone, with f = R(N+K)/(NK)."""
    f = R * (N + K) / (N * K)
    return 1 / f if direction == "backward" else 2 / (1 + f)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reaches, measured before anything else.

    `copy`: bytes/s of a device copy, read + write. `matmul`: flop/s of the best product found for the dtype (on a CPU
    without 16-bit matrix instructions that is the float32 one). `plain_nn`, `plain_nt`: flop/s of torch's own `a @ b`
    and `a @ b.t()` in the dtype, from which the slow baselines are predicted.
    """

    dtype: str
    copy: float
    matmul: float
    plain_nn: float
    plain_nt: float

    def seconds(self, work: Work) -> float:
        """The roofline: no sequence of kernels for this work can be faster."""
        return max(work.floor_bytes / self.copy, work.flops / self.matmul)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of `device` for `dtype`; about two seconds."""
    on_gpu = device.type == "cuda"
    copy = _copy_rate(1 << (30 if on_gpu else 27), device)
    side = 8192 if on_gpu else 1024
    slow = not on_gpu and slow_on_cpu(dtype)
    matmul = [_matmul_rate(side, torch.float32 if slow else dtype, device, transposed) for transposed in (False, True)]
    plain = plain_rates(torch.randn(2048, 2048, device=device).to(dtype)) if slow else tuple(matmul)
    return Ceilings(str(dtype).removeprefix("torch."), copy, max(*matmul, *plain), *plain)


def plain_rates(weight: torch.Tensor, rows: int = 8) -> tuple[float, float]:
    """Flop/s of torch's own `a @ weight` and `a @ weight.t()` for a few rows, once: scalar loops are as fast, or
    rather as slow, for many rows, and they depend on whether the weight fits in a cache."""
    rates = []
    for matrix in (weight, weight.t()):
        a = torch.ones(rows, matrix.shape[0], dtype=weight.dtype, device=weight.device)
        started = time.perf_counter()
        a @ matrix
        rates.append(2 * rows * weight.numel() / (time.perf_counter() - started))
    return rates[0], rates[1]


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _matmul_rate(side: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if transposed:
        b = b.t()
    out = torch.empty(side, side, dtype=dtype, device=device)
    torch.mm(a, b, out=out)
    return 2 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)


def _best_seconds(call: Callable[[], Any], device: torch.device, runs: int = 7) -> float:
    """The fastest of `runs` calls: a ceiling is what the device can do, not what it did on average."""
    best = float("inf")
    for _ in range(runs):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            seconds = start.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
        best = min(best, seconds)
    return best
