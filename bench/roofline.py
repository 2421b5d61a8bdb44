"""Counted work of every candidate, the measured ceilings of the device, and the time that the two allow.

All counts are of the formulas in `loge_kernels.reference`; M tokens, N out, K in, R factor rank, P adapter rank. A
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
    large = 8192 if on_gpu else 1024
    slow = not on_gpu and dtype in (torch.float16, torch.bfloat16)
    plain = (64, 512, 512) if slow else (large, large, large)  # scalar loops take 0.03 s for the small one
    plain_nn, plain_nt = (_matmul_rate(plain, dtype, device, transposed) for transposed in (False, True))
    matmul = max(plain_nn, plain_nt)
    if slow:
        matmul = max(matmul, *(_matmul_rate((large,) * 3, torch.float32, device, t) for t in (False, True)))
    return Ceilings(str(dtype).removeprefix("torch."), copy, matmul, plain_nn, plain_nt)


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _matmul_rate(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, transposed: bool) -> float:
    I, J, L = size
    a = torch.randn(I, J, device=device).to(dtype)
    b = torch.randn(*((L, J) if transposed else (J, L)), device=device).to(dtype)
    if transposed:
        b = b.t()
    out = torch.empty(I, L, dtype=dtype, device=device)
    torch.mm(a, b, out=out)
    return 2 * I * J * L / _best_seconds(lambda: torch.mm(a, b, out=out), device)


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
