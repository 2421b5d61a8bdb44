"""The one place that chooses what computes a backward pass.

A backend is two functions: `why_not(problem)`, the reason it cannot run this problem or None, and
`backward(problem)`. "auto" goes through the registry in order, passes over what cannot run, what is not verified on
this GPU and what the cost model predicts to be slower, and says once, on the `loge_kernels` logger, what it took and
why. A backend named by the user (argument, `use_backend` or `LOGE_BACKEND`) runs or raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cuda_backend, cuda_measured, reference, triton_backend
from .problem import BackwardProblem, Gradients
from .verification import is_verified

logger = logging.getLogger("loge_kernels")

_UNVERIFIED = "not verified on this GPU: 'auto' waits for python -m loge_kernels check --device cuda"


@dataclass(frozen=True, slots=True)
class _Implementation:
    unavailable: Callable[[], str | None]  # the reason why this machine cannot run it at all
    why_not: Callable[[BackwardProblem], str | None]  # the reason why it cannot run this problem
    backward: Callable[[BackwardProblem], Gradients]
    about: str
    worse_than_next: Callable[[BackwardProblem], str | None] = lambda problem: None  # asked by "auto" alone
    state: Callable[[], str] = lambda: ""  # follows `about` where it can run


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of `backends()`: a name for `backend=`, whether it can run here, and why or why not."""

    name: str
    available: bool
    reason: str


def _triton_passed_over(problem: BackwardProblem) -> str | None:
    device = problem.dy.device
    if device.type != "cuda":
        return "on the CPU it runs in an interpreter, for tests"
    if not is_verified("triton", device):
        return _UNVERIFIED
    if cuda_measured.faster_than_triton(problem) and is_verified("cuda", device) and not cuda_backend.why_not(problem):
        return "the CUDA kernels are measured to be faster for this shape"
    return triton_backend.slower_than_torch(problem)


def _cuda_passed_over(problem: BackwardProblem) -> str | None:
    device = problem.dy.device
    if device.type != "cuda":
        return None  # that reason is the backend's own
    if not is_verified("cuda", device):
        return _UNVERIFIED
    return None if cuda_measured.faster_than_triton(problem) else triton_backend.slower_than_torch(problem)


def _state_on_gpu(name: str) -> str:
    if not torch.cuda.is_available():
        return ""
    verified = is_verified(name, torch.device("cuda", torch.cuda.current_device()))
    return "; verified on this GPU" if verified else f"; {_UNVERIFIED}"


# In the order in which "auto" considers them.
_REGISTRY: dict[str, _Implementation] = {
    "triton": _Implementation(
        unavailable=triton_backend.unavailable,
        why_not=triton_backend.why_not,
        backward=triton_backend.backward,
        about="one-launch and two-launch kernels",
        worse_than_next=_triton_passed_over,
        state=lambda: _state_on_gpu("triton"),
    ),
    "cuda": _Implementation(
        unavailable=cuda_backend.unavailable,
        why_not=cuda_backend.why_not,
        backward=cuda_backend.backward,
        about="one-launch CUDA C++ kernels",
        worse_than_next=_cuda_passed_over,
        state=lambda: f", built {cuda_backend.built_for()}{_state_on_gpu('cuda')}",
    ),
    "reference": _Implementation(
        unavailable=lambda: None,
        why_not=lambda problem: None,
        backward=reference.backward,
        about="plain PyTorch, any device; the specification",
    ),
}
_override: str | None = None  # a plain global: torch.compile guards on it, and cannot read a ContextVar
_announced: set[str] = set()


def backends() -> list[Backend]:
    """Every backend of this package, in the order in which "auto" considers them."""
    rows = []
    for name, implementation in _REGISTRY.items():
        reason = implementation.unavailable()
        rows.append(Backend(name, reason is None, reason or implementation.about + implementation.state()))
    return rows


def check_name(name: str, argument: str) -> str:
    """`name` itself; ValueError naming `argument` when it is neither "auto" nor a backend that can run here."""
    if name == "auto":
        return name
    if name not in _REGISTRY:
        known = ", ".join(repr(known) for known in ("auto", *_REGISTRY))
        raise ValueError(f"{argument}={name!r} is not a backend; choose one of {known}")
    reason = _REGISTRY[name].unavailable()
    if reason is not None:
        raise ValueError(f"{argument}={name!r} cannot run here: {reason}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call in the block with backend `name` ("auto" restores the choice by preference).

    The name holds for the backward passes of the forwards made inside the block, whenever they run. Raises ValueError
    for a name that is unknown or cannot run here. An explicit `backend=` argument wins over the block, the block over
    the `LOGE_BACKEND` environment variable. The block holds for the whole process, other threads included.
    """
    global _override
    before, _override = _override, check_name(name, "use_backend(name)")
    try:
        yield
    finally:
        _override = before


def requested(backend: str | None) -> str:
    """The name in force for a call that was given `backend`: the argument, `use_backend`, `LOGE_BACKEND`, "auto"."""
    if backend is not None:
        return check_name(backend, "backend")
    if _override is not None:
        return _override
    from_environment = os.environ.get("LOGE_BACKEND")
    return "auto" if not from_environment else check_name(from_environment, "LOGE_BACKEND")


def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and xa [M, P] (None without an adapter): PyTorch's products, or Triton's fused forward.

    The fused one is taken by "auto" where it is verified on this GPU and predicted to win, and by "triton" wherever it
    can run.
    """
    if lora_A is not None and lora_B is not None and _fused_forward(x, weight, lora_A, dropout, name):
        return triton_backend.forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seed)
    return reference.forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seed)


def _fused_forward(x: Tensor, weight: Tensor, lora_A: Tensor, dropout: float, name: str) -> bool:
    if name == "triton":
        return triton_backend.forward_why_not(x, lora_A) is None
    return (
        name == "auto"
        and x.is_cuda
        and is_verified("triton", x.device)
        and triton_backend.forward_why_not(x, lora_A) is None
        and triton_backend.forward_wins(x, weight, lora_A, dropout)
    )


def obstacle(problem: BackwardProblem, name: str) -> str | None:
    """The reason why backend `name` cannot run `problem`, or None; "auto" can run everything."""
    return None if name == "auto" else _REGISTRY[name].why_not(problem)


def run_backward(problem: BackwardProblem, name: str) -> Gradients:
    """The gradients of `problem` by backend `name`, or by the preferred one that can run it when `name` is "auto".

    Without factors dX is a dense product, which PyTorch computes whatever the name: a model may have both kinds of
    layers. Raises ValueError with the backend's reason when a named backend cannot run this problem otherwise.
    """
    if problem.need_dx and problem.left is None:
        return reference.backward(problem)
    gradients = _choose(problem, name)(problem)
    if problem.rows is not None and gradients.dx is not None:
        gradients.dx = reference.add_residual(gradients.dx, problem)
    return gradients


def _choose(problem: BackwardProblem, name: str) -> Callable[[BackwardProblem], Gradients]:
    if name != "auto":
        reason = obstacle(problem, name)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run this backward pass: {reason}; use backend='auto'")
        return _REGISTRY[name].backward
    passed_over: list[str] = []
    for candidate, implementation in _REGISTRY.items():
        reason = (
            implementation.unavailable() or implementation.worse_than_next(problem) or implementation.why_not(problem)
        )
        if reason is None:
            _announce(candidate, passed_over)
            return implementation.backward
        passed_over.append(f"{candidate}: {reason}")
    raise RuntimeError("no backend can run this backward pass: " + "; ".join(passed_over))


def _announce(name: str, passed_over: list[str]) -> None:
    message = f"backend 'auto' uses {name!r}" + (f" ({'; '.join(passed_over)})" if passed_over else "")
    if message not in _announced:
        _announced.add(message)
        logger.info(message)
