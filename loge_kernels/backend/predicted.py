"""What the cost model says of a backward problem: microseconds of each backend, and the reason to pass one over."""

from __future__ import annotations

from .. import triton_kernels as kernels
from .problem import BackwardProblem


def microseconds(p: BackwardProblem) -> dict[str, float]:
    """Predicted time by backend, "reference", "triton" and "cuda", of what can hold a low-rank problem's ranks."""
    assert p.left is not None
    assert p.right is not None
    M, N = p.dy.shape
    R, K = p.right.shape
    P = 0 if p.lora_B is None else p.lora_B.shape[1]
    flags = kernels.Flags(p.need_dx, p.need_dA, p.need_dB, p.need_dbias, p.dropout > 0.0, p.deterministic)
    return kernels.explain(M, N, K, R, P, p.dy.dtype, p.dy.device, flags).by_backend()


def why_not(p: BackwardProblem, name: str) -> str | None:
    """The reason to prefer the PyTorch composition to backend `name` for this problem, or None."""
    if p.left is None or p.right is None:
        return "without factors dX is a dense product"
    if p.right.shape[0] == 0:
        return "the frozen path is dropped: rank 0"
    if not p.need_dx:
        return "without dX there is no chain to fuse"
    times = microseconds(p)
    slower = times["reference"] <= times.get(name, float("inf"))
    return "PyTorch's products are predicted to be faster" if slower else None


def cuda_wins(p: BackwardProblem) -> bool:
    """Whether the CUDA kernels are predicted to be faster than Triton's and than PyTorch."""
    if p.left is None or p.right is None or p.right.shape[0] == 0 or not p.need_dx:
        return False
    times = microseconds(p)
    return min(times, key=lambda name: times[name]) == "cuda"
