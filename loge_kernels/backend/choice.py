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

from ..numerics.eight_bit import from_bits
from ..triton_kernels import ExactForm
from . import cuda as cuda_backend
from . import cuda_measured, predicted, reference
from . import triton as triton_backend
from .problem import BackwardProblem, Gradients, Operands
from .verified import is_verified

logger = logging.getLogger("loge_kernels")

_UNVERIFIED = "not verified on this GPU: 'auto' waits for python -m loge_kernels check --device cuda"


@dataclass(frozen=True, slots=True)
class _Implementation:
    backward: Callable[[BackwardProblem], Gradients]
    why_not: Callable[[BackwardProblem], str | None]  # the reason why it cannot run this problem
    why_not_here: Callable[[], str | None]  # the reason why this machine cannot run it at all
    about: str
    why_not_auto: Callable[[BackwardProblem], str | None] = lambda problem: None  # the reason why "auto" goes on
    state: Callable[[], str] = lambda: ""  # follows `about` where it can run


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of `backends()`: a name for `backend=`, whether it can run here, and why or why not."""

    name: str
    available: bool
    reason: str


def _why_not_triton(problem: BackwardProblem) -> str | None:
    device = problem.dy.device
    if device.type != "cuda":
        return "on the CPU it runs in an interpreter, for tests"
    if not is_verified("triton", device):
        return _UNVERIFIED
    known = "measured" if cuda_measured.faster_than_triton(problem) else "predicted"
    if (
        (known == "measured" or predicted.cuda_wins(problem))
        and is_verified("cuda", device)
        and not cuda_backend.why_not(problem)
    ):
        return f"the CUDA kernels are {known} to be faster for this shape"
    return predicted.why_not(problem, "triton")


def _why_not_cuda(problem: BackwardProblem) -> str | None:
    device = problem.dy.device
    if device.type != "cuda":
        return None  # that reason is the backend's own
    if not is_verified("cuda", device):
        return _UNVERIFIED
    return None if cuda_measured.faster_than_triton(problem) else predicted.why_not(problem, "cuda")


def _state_on_gpu(name: str) -> str:
    if not torch.cuda.is_available():
        return ""
    verified = is_verified(name, torch.device("cuda", torch.cuda.current_device()))
    return "; verified on this GPU" if verified else f"; {_UNVERIFIED}"


# In the order in which "auto" considers them.
_REGISTRY: dict[str, _Implementation] = {
    "triton": _Implementation(
        triton_backend.backward,
        triton_backend.why_not,
        triton_backend.why_not_here,
        about="one-launch and two-launch kernels",
        why_not_auto=_why_not_triton,
        state=lambda: _state_on_gpu("triton"),
    ),
    "cuda": _Implementation(
        cuda_backend.backward,
        cuda_backend.why_not,
        cuda_backend.why_not_here,
        about="one-launch CUDA C++ kernels",
        why_not_auto=_why_not_cuda,
        state=lambda: f", built {cuda_backend.built_for()}{_state_on_gpu('cuda')}",
    ),
    "reference": _Implementation(
        reference.backward,
        why_not=lambda problem: None,
        why_not_here=lambda: None,
        about="plain PyTorch, any device",
    ),
}
_override: str | None = None  # a plain global: torch.compile guards on it, and cannot read a ContextVar
_announced: set[str] = set()


def backends() -> list[Backend]:
    """Every backend of this package, in the order in which "auto" considers them."""
    rows = []
    for name, implementation in _REGISTRY.items():
        reason = implementation.why_not_here()
        rows.append(Backend(name, reason is None, reason or implementation.about + implementation.state()))
    return rows


def register_backend(
    name: str,
    backward: Callable[[BackwardProblem], Gradients],
    *,
    why_not: Callable[[BackwardProblem], str | None] | None = None,
    why_not_here: Callable[[], str | None] | None = None,
    about: str = "",
) -> None:
    """Add a backend of your own, for the low-rank backward passes that name it (`backend=`, `use_backend`,
    LOGE_BACKEND). "auto" does not choose it, and exact layers keep PyTorch's products.

    Args:
        name: its name; not one of `backends()`, nor "auto".
        backward: computes what a `BackwardProblem` asks for (`loge_kernels.backend.problem`).
        why_not: the reason why it cannot run a problem, or None; None: it runs all.
        why_not_here: the reason why this machine cannot run it at all, or None; None: every machine can.
        about: a few words for `backends()`.

    Raises:
        ValueError: a name that is taken.
    """
    if name == "auto" or name in _REGISTRY:
        raise ValueError(f"name={name!r} is taken; these are: {', '.join(map(repr, ('auto', *_REGISTRY)))}")
    _REGISTRY[name] = _Implementation(
        backward,
        why_not or (lambda problem: None),
        why_not_here or (lambda: None),
        about or "registered by the user",
        why_not_auto=lambda problem: "registered by the user, and runs where it is named",
    )


def check_name(name: str, argument: str) -> str:
    """`name` itself; ValueError naming `argument` when it is neither "auto" nor a backend that can run here."""
    if name == "auto":
        return name
    if name not in _REGISTRY:
        known = ", ".join(repr(known) for known in ("auto", *_REGISTRY))
        raise ValueError(f"{argument}={name!r} is not a backend; choose one of {known}")
    reason = _REGISTRY[name].why_not_here()
    if reason is not None:
        raise ValueError(f"{argument}={name!r} cannot run here: {reason}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call in the block with backend `name` ("auto" restores the choice by preference).

    The name holds for the backward passes of the forwards made inside the block, whenever they run. Raises ValueError
    for a name that is unknown or cannot run here. An explicit `backend=` argument wins over the block, the block over
    the `LOGE_BACKEND` environment variable. The block holds for the whole process, other threads included. A backward
    that computes checkpointed forwards again belongs into the block as well.
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


def run_forward(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and xa [M, P] (None without an adapter): PyTorch's products, or Triton's fused forward.

    The fused one is taken by "auto" where it is verified on this GPU and predicted to win, and by "triton" wherever it
    can run.
    """
    if operands.weight is None:
        by_triton = _by_triton(operands) and (operands.backend == "triton" or triton_backend.eight_bits_win(operands))
        return triton_backend.forward_in_eight_bits(operands) if by_triton else reference.forward(operands)
    return triton_backend.forward(operands) if _fused_forward(operands) else reference.forward(operands)


def quantize_input(operands: Operands) -> tuple[Tensor, Tensor]:
    """x [M, K] in the 8 bits of the weight, rotated as that is, and its row scales, float32 [M, 1]."""
    assert operands.x is not None
    assert operands.dense is not None
    quantize = triton_backend.quantize if _by_triton(operands) else reference.quantize
    return quantize(operands.x, from_bits(operands.dense).dtype)


def _by_triton(operands: Operands) -> bool:
    """Whether Triton can run a forward in 8 bits, and is named or verified on this GPU."""
    x = operands.x
    automatic = operands.backend == "auto" and x is not None and x.is_cuda and is_verified("triton", x.device)
    return (automatic or operands.backend == "triton") and triton_backend.why_not_eight_bits(operands) is None


def _fused_forward(operands: Operands) -> bool:
    if operands.lora_A is None or operands.x is None:
        return False
    if operands.backend == "triton":
        return triton_backend.why_not_forward(operands) is None
    return (
        operands.backend == "auto"
        and operands.x.is_cuda
        and is_verified("triton", operands.x.device)
        and triton_backend.why_not_forward(operands) is None
        and triton_backend.forward_wins(operands)
    )


def why_not(problem: BackwardProblem, name: str) -> str | None:
    """The reason why backend `name` cannot run `problem`, or None; "auto" can run everything."""
    return None if name == "auto" else _REGISTRY[name].why_not(problem)


def run_backward(problem: BackwardProblem, name: str) -> Gradients:
    """The gradients of `problem` by backend `name`, or by the preferred one that can run it when `name` is "auto".

    Without factors dX is a dense product. Triton has kernels around it, which run where they are named or predicted to
    be faster; elsewhere PyTorch computes it, whatever the name: a model may have both kinds of layers. Raises
    ValueError with the backend's reason when a named backend cannot run this problem otherwise.
    """
    if problem.need_dx and problem.kind.startswith("dense"):
        form = _exact_form(problem, name)
        return reference.backward(problem) if form == "torch" else triton_backend.exact_backward(problem, form)
    gradients = _choose(problem, name)(problem)
    if problem.rows is not None and gradients.dx is not None:
        gradients.dx = reference.add_residual(gradients.dx, problem)
    return gradients


def _exact_form(problem: BackwardProblem, name: str) -> ExactForm:
    automatic = name == "auto" and problem.dy.is_cuda and is_verified("triton", problem.dy.device)
    if not (automatic or name == "triton") or triton_backend.why_not(problem) is not None:
        return "torch"
    return triton_backend.exact_form(problem) if automatic else "fused"


def _choose(problem: BackwardProblem, name: str) -> Callable[[BackwardProblem], Gradients]:
    if name != "auto":
        reason = why_not(problem, name)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run this backward pass: {reason}; use backend='auto'")
        return _REGISTRY[name].backward
    passed_over: list[str] = []
    for candidate, implementation in _REGISTRY.items():
        reason = (
            implementation.why_not_here() or implementation.why_not_auto(problem) or implementation.why_not(problem)
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
