"""The correctness harness: every available backend, over awkward shapes, against `naive` in float64.

Products in 8 bits are those of the rounded operands; where T = dY left is rounded again, dY and left are such that its
sums are exact in any order, so that what it is rounded to is the same for all. The rule is that of `accuracy`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import eight_bit, naive
from .accuracy import Verdict, judge
from .backends import backends, check_name, why_not
from .dropout import draw_seed, keep_mask
from .factors import Factors
from .ops import linear
from .problem import BackwardProblem, Operands
from .reference import heaviest_rows
from .verification import record

Mode = Literal["low-rank", "exact", "exact rows", "residual", "float8", "int8", "low-rank float8", "low-rank int8"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B")
_SCALING = 0.7
_DROPOUT = 0.25
_EXACT_ROWS = 0.3
_LOW_RANK_DTYPE = {f"low-rank {name}": name for name in eight_bit.DTYPES}
_WITH_FACTORS = ("low-rank", "exact rows", "residual", *_LOW_RANK_DTYPE)
# (M, N, K, R, P): empty, one row, ragged everything, N < K and N > K, more than one tile of any kernel; and, for
# kernels that want rows on 16-byte boundaries, full pipelines and slabs that blocks share.
_SHAPES = (
    (0, 24, 40, 16, 8),
    (1, 40, 24, 16, 8),
    (7, 33, 21, 5, 3),
    (65, 96, 80, 32, 8),
    (130, 257, 130, 67, 17),
    (150, 1032, 776, 136, 24),
)
_SUBSET_SHAPE = (19, 48, 40, 16, 8)


@dataclass(frozen=True, slots=True)
class Case:
    """One call of the op: its shape, features, and the arguments that require a gradient."""

    M: int
    N: int
    K: int
    R: int
    P: int  # 0: no adapter
    mode: Mode
    bias: bool
    dropout: bool
    contiguous: bool
    wanted: tuple[str, ...]


@dataclass(slots=True)
class Row:
    """All cases of one backend, dtype and result: how many were run, how many failed, the worst error / allowed error,
    and how many the backend declines."""

    backend: str
    dtype: str
    result: str
    cases: int = 0
    failed: int = 0
    declined: int = 0
    worst: float = 0.0
    worst_case: Case | None = None

    def add(self, verdict: Verdict, case: Case) -> None:
        self.cases += 1
        self.failed += not verdict.passed
        if verdict.ratio >= self.worst:
            self.worst, self.worst_case = verdict.ratio, case


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The rows, and why backends declined cases, with counts."""

    rows: list[Row] = field(default_factory=list)
    declined: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was run and nothing failed."""
        return any(row.cases for row in self.rows) and all(row.failed == 0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "rows": [asdict(row) for row in self.rows], "declined": self.declined}

    def print(self, console: Console) -> None:
        table = Table(title="error / allowed error, against float64 dense autograd", title_justify="left")
        for heading in ("backend", "dtype", "result", "cases", "failed", "declined", "worst", "verdict"):
            numeric = heading in ("cases", "failed", "declined", "worst")
            table.add_column(heading, justify="right" if numeric else "left")
        for row in self.rows:
            verdict = "[red]FAILED[/red]" if row.failed else "[green]ok[/green]"
            counts = (str(row.cases), str(row.failed), str(row.declined), f"{row.worst:.2f}")
            table.add_row(row.backend, row.dtype, row.result, *counts, verdict)
        console.print(table)
        for reason, count in self.declined.items():
            console.print(f"declined {count} times: {reason}")
        for row in self.rows:
            if row.failed and row.worst_case is not None:
                console.print(f"worst {row.backend} {row.dtype} {row.result}: {describe(row.worst_case)}")


def describe(case: Case) -> str:
    """A case in a few words."""
    features: list[str] = [case.mode]
    features += ["bias"] if case.bias else []
    features += ["dropout"] if case.dropout else []
    features += [] if case.contiguous else ["strided"]
    sizes = f"M={case.M} N={case.N} K={case.K} R={case.R} P={case.P}"
    return f"{sizes} {', '.join(features)}, gradients of {'+'.join(case.wanted)}"


def grid() -> Iterator[Case]:
    """Every shape with every feature, all gradients; and on one shape every subset of the gradients."""
    modes: tuple[Mode, ...] = ("low-rank", "exact", "exact rows")
    more: tuple[Mode, ...] = ("residual", "float8", "int8", "low-rank float8", "low-rank int8")
    flags = (False, True)
    for shape, mode, adapter, bias, dropout, contiguous in itertools.product(
        _SHAPES, modes + more, flags, flags, flags, flags
    ):
        if dropout and not adapter:
            continue
        M, N, K, R, P = shape
        wanted = ("x", *(("bias",) if bias else ()), *(("lora_A", "lora_B") if adapter else ()))
        yield Case(M, N, K, R, P if adapter else 0, mode, bias, dropout, contiguous, wanted)
    M, N, K, R, P = _SUBSET_SHAPE
    for count in range(1, len(GRADIENTS) + 1):
        for wanted in itertools.combinations(GRADIENTS, count):
            for mode, dropout in itertools.product(modes, flags):
                yield Case(M, N, K, R, P, mode, True, dropout, True, wanted)


def run(
    backend: str | None = None,
    device: str = "cpu",
    dtypes: tuple[str, ...] | None = None,
    progress: Callable[[str], None] | None = None,
    sample: int | None = None,
    part: tuple[int, int] = (1, 1),
) -> CheckReport:
    """Check one backend, or every available one, on `device` in the given dtypes (names of `DTYPES`; all by default).

    `sample` takes that many cases, spread evenly over the grid; `part=(i, n)` takes the i-th of n equal parts. On a GPU
    a backend that passes the whole grid in every dtype is recorded as verified there. Raises ValueError for an unknown
    backend, device or dtype.
    """
    names = [row.name for row in backends() if row.available]
    if backend is not None and check_name(backend, "backend") != "auto":
        names = [backend]
    target = _device(device)
    chosen = tuple(DTYPES) if dtypes is None else dtypes
    for name in chosen:
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is unknown; choose one of {', '.join(DTYPES)}")
    cases = list(grid())
    if sample is not None:
        if sample < 1:
            raise ValueError(f"sample={sample} must be at least 1")
        cases = cases[:: max(1, len(cases) // sample)]
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part={part[0]}/{part[1]} is not one of 1/n to n/n")
    cases = cases[part[0] - 1 :: part[1]]
    report = CheckReport()
    for name, dtype in itertools.product(names, chosen):
        rows = {result: Row(name, dtype, result) for result in ("y", *GRADIENTS)}
        for case in cases:
            inputs = _inputs(case, target, DTYPES[dtype])
            reason = _why_not_eight_bits(case, target) or why_not(_problem(case, inputs), name)
            if reason is None:
                for result, verdict in _check_case(case, inputs, name).items():
                    rows[result].add(verdict, case)
            else:
                for result in ("y", *case.wanted):
                    rows[result].declined += 1
                key = f"{name}: {reason}"
                report.declined[key] = report.declined.get(key, 0) + 1
            if progress is not None:
                progress(f"{name} {dtype}")
        report.rows.extend(row for row in rows.values() if row.cases or row.declined)
    if target.type == "cuda" and sample is None and part == (1, 1) and set(chosen) == set(DTYPES):
        for name in names:
            own = [row for row in report.rows if row.backend == name]
            if any(row.cases for row in own) and all(row.failed == 0 for row in own):
                record(name, target)
    return report


def _check_case(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Verdict]:
    """The verdict on y and on each wanted gradient of one case."""
    results = _through_op(case, inputs, backend)
    double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    truth, plain = _naive(case, double, inputs), _naive(case, inputs, inputs)
    return {name: judge(results[name], plain[name], truth[name]) for name in results}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random operands of the case, the same on every device; strided ones are every second column and row."""
    generator = torch.Generator().manual_seed(_seed_of(case))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    step = 1 if case.contiguous else 2
    M, N, K, R, P = case.M, case.N, case.K, case.R, case.P
    tensors = {
        "x": random(M * step, K * step)[::step, ::step],
        "dy": random(M * step, N * step)[::step, ::step],
        "weight": random(N, K, scale=K**-0.5),
        "left": random(N, R, scale=R**-0.5),
        "right": random(R, K, scale=K**-0.5),
    }
    if case.mode in _LOW_RANK_DTYPE:
        # Signs, but for each row's of dY and each column's of left largest element, where the other has zeros: scales
        # are 1/64, and every sum is a small integer.
        largest = (448.0 if _LOW_RANK_DTYPE[case.mode] == "float8" else 127.0) / 64.0
        for tensor, own, others in ((tensors["dy"].t(), 0, 1), (tensors["left"], 1, 0)):
            tensor.sign_()
            tensor[own], tensor[others] = largest, 0.0
    if case.mode == "residual":
        tensors["rows"] = torch.arange(0, N, 3, device=device)
        tensors["residual"] = random(len(tensors["rows"]), K, scale=K**-0.5)
    if case.bias:
        tensors["bias"] = random(N)
    if P:
        tensors["lora_A"] = random(P, K, scale=K**-0.5)
        tensors["lora_B"] = random(N, P)
    if case.dropout:
        torch.manual_seed(_seed_of(case))
        tensors["keep"] = keep_mask(draw_seed(device), M, K, _DROPOUT)
    return tensors


def _seed_of(case: Case) -> int:
    """A seed that depends on the case's shape alone."""
    return ((case.M * 31 + case.N) * 31 + case.K) * 31 + case.P


def _problem(case: Case, inputs: dict[str, Tensor]) -> BackwardProblem:
    """The case as its backend will meet it; xa is left out, since no backend's reason depends on it."""
    given = {name: inputs.get(name) for name in ("x", "weight", "lora_A", "lora_B")}
    if case.mode in _WITH_FACTORS:
        given |= {"left": inputs["left"], "right": inputs["right"]}
    if case.mode in _LOW_RANK_DTYPE:
        given["left_scale"] = inputs["left"][0].float()  # any: that there is one counts
    operands = Operands(
        **given,  # type: ignore[arg-type]
        scaling=_SCALING,
        dropout=_DROPOUT if case.dropout else 0.0,
        exact_fraction=_EXACT_ROWS if case.mode == "exact rows" else 0.0,
    )
    return BackwardProblem.of(inputs["dy"], None, [name in case.wanted for name in GRADIENTS], operands)


def _why_not_eight_bits(case: Case, device: torch.device) -> str | None:
    """Why the op would take this case's products in another dtype than 8 bits, or None."""
    shapes = [(case.N, case.K)] if case.mode in eight_bit.DTYPES else [(case.N, case.R), (case.R, case.K)]
    name = _LOW_RANK_DTYPE.get(case.mode, case.mode)
    if name not in eight_bit.DTYPES:
        return None
    return next((reason for shape in shapes if (reason := eight_bit.why_not(name, device, *shape))), None)


def _through_op(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_(name in case.wanted) for name in GRADIENTS if name in inputs}
    factors = None
    if case.mode in _WITH_FACTORS:
        factors = Factors(inputs["left"], inputs["right"], rows=inputs.get("rows"), residual=inputs.get("residual"))
        factors.low_rank_dtype = _LOW_RANK_DTYPE.get(case.mode)
    torch.manual_seed(_seed_of(case))  # the op draws the seed that `_inputs` drew
    y = linear(
        leaves["x"],
        leaves["weight"],
        factors,
        bias=leaves.get("bias"),
        lora_A=leaves.get("lora_A"),
        lora_B=leaves.get("lora_B"),
        scaling=_SCALING,
        dropout=_DROPOUT if case.dropout else 0.0,
        exact_fraction=_EXACT_ROWS if case.mode == "exact rows" else 0.0,
        backend=backend,
        exact_dtype=case.mode if case.mode in eight_bit.DTYPES else None,
    )
    gradients = torch.autograd.grad(y, [leaves[name] for name in case.wanted], inputs["dy"])
    return {"y": y.detach(), **dict(zip(case.wanted, gradients, strict=True))}


def _naive(case: Case, inputs: dict[str, Tensor], original: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the wanted gradients by `naive`, in the dtype of `inputs`; the heaviest rows, and what is rounded to 8
    bits, are those of the `original` operands, so that both precisions agree on them."""
    x, W, dy = inputs["x"], inputs["weight"], inputs["dy"]
    A, B = inputs.get("lora_A", x.new_empty(0, case.K)), inputs.get("lora_B", x.new_empty(case.N, 0))

    def drop(tensor: Tensor) -> Tensor:
        return torch.where(original["keep"], tensor / (1.0 - _DROPOUT), 0.0) if case.dropout else tensor

    if case.mode in eight_bit.DTYPES or case.mode in _LOW_RANK_DTYPE:
        frozen = _in_eight_bits(case, original, x.dtype)
    elif case.mode == "exact":
        frozen = dy @ W
    else:
        frozen = naive.low_rank(dy, inputs["left"], inputs["right"], inputs.get("rows"), inputs.get("residual"))
    if case.mode == "exact rows":
        heavy = heaviest_rows(original["dy"], _EXACT_ROWS)
        frozen[heavy] = dy[heavy] @ W
    y = naive.forward(x, W, inputs.get("bias", x.new_zeros(1)), A, B, _SCALING, drop)
    gradients = naive.backward(dy, x, frozen, A, B, _SCALING, drop)
    return {"y": y, **{name: gradients[name] for name in case.wanted}}


def _in_eight_bits(case: Case, original: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The frozen path's part of x's gradient from rounded operands, multiplied in `dtype`."""
    name = _LOW_RANK_DTYPE.get(case.mode, case.mode)

    def product(dy: Tensor, weight: Tensor) -> Tensor:
        return _rounded(dy, name, 1, dtype) @ _rounded(weight, name, 0, dtype)

    if case.mode not in _LOW_RANK_DTYPE:
        return product(original["dy"], original["weight"])
    T = product(original["dy"], original["left"]).to(original["dy"].dtype)
    return product(T, original["right"])


def _rounded(matrix: Tensor, mode: str, dim: int, dtype: torch.dtype) -> Tensor:
    """`matrix` with every slice along `dim` rounded to 8 bits of its own scale, in `dtype`."""
    limit = 448.0 if mode == "float8" else 127.0
    scale = (matrix.float().abs().amax(dim, keepdim=True) / limit).clamp_min(torch.finfo(torch.float32).tiny)
    steps = matrix.float() / scale
    steps = steps.to(torch.float8_e4m3fn) if mode == "float8" else steps.round()
    return steps.to(dtype) * scale.to(dtype)
