"""The correctness harness: every available backend, over awkward shapes, against `naive` in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..backend.choice import backends, check_name, why_not
from ..backend.problem import BackwardProblem, Need, Operands
from ..backend.verified import record
from ..factors.factors import Factors
from ..machine import choose_device, dtype_name
from ..numerics import eight_bit
from ..op.linear import linear
from .accuracy import Verdict, judge
from .cases import (
    DROPOUT,
    DTYPES,
    EXACT_ROWS,
    GRADIENTS,
    LOW_RANK_DTYPE,
    SCALING,
    WITH_FACTORS,
    Case,
    grid,
    inputs_of,
    seed_of,
)
from .report import CheckReport, Row
from .truth import by_naive


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
    target = choose_device(device)
    chosen = [dtype_name(name, DTYPES) for name in (DTYPES if dtypes is None else dtypes)]
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
            inputs = inputs_of(case, target, DTYPES[dtype])
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
    truth, plain = by_naive(case, double, inputs), by_naive(case, inputs, inputs)
    if case.mode in ("float8", "low-rank float8") and "x" in plain and inputs["x"].is_cuda:
        # Hopper's tensor cores keep 14 bits of a sum of float8, and the reference, which has 24, is no yardstick.
        plain["x"] = plain["x"].bfloat16().to(plain["x"].dtype)
    return {name: judge(results[name], plain[name], truth[name]) for name in results}


def _problem(case: Case, inputs: dict[str, Tensor]) -> BackwardProblem:
    """The case as its backend will meet it; xa is left out, since no backend's reason depends on it."""
    given = {name: inputs.get(name) for name in ("x", "weight", "lora_A", "lora_B")}
    if case.mode in WITH_FACTORS:
        given |= {"left": inputs["left"], "right": inputs["right"]}
    if case.mode in eight_bit.DTYPES:
        given["dense"] = eight_bit.as_bits(torch.empty_like(inputs["weight"], dtype=eight_bit.DTYPES[case.mode]))
    if case.mode in LOW_RANK_DTYPE:
        given["left_scale"] = inputs["left"][0].float()  # any: that there is one counts
    operands = Operands(
        **given,  # type: ignore[arg-type]
        scaling=SCALING,
        dropout=DROPOUT if case.dropout else 0.0,
        exact_fraction=EXACT_ROWS if case.mode == "exact rows" else 0.0,
    )
    return BackwardProblem.of(inputs["dy"], None, Need(*(name in case.wanted for name in GRADIENTS)), operands)


def _why_not_eight_bits(case: Case, device: torch.device) -> str | None:
    """Why the op would take this case's products in another dtype than 8 bits, or None."""
    shapes = [(case.N, case.K)] if case.mode in eight_bit.DTYPES else [(case.N, case.R), (case.R, case.K)]
    name = LOW_RANK_DTYPE.get(case.mode, case.mode)
    if name not in eight_bit.DTYPES:
        return None
    return next((reason for shape in shapes if (reason := eight_bit.why_not(name, device, *shape))), None)


def _through_op(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_(name in case.wanted) for name in GRADIENTS if name in inputs}
    factors = None
    if case.mode in WITH_FACTORS:
        factors = Factors(inputs["left"], inputs["right"], rows=inputs.get("rows"), residual=inputs.get("residual"))
        factors.low_rank_dtype = LOW_RANK_DTYPE.get(case.mode)
    torch.manual_seed(seed_of(case))  # the op draws the seed that `inputs_of` drew
    y = linear(
        leaves["x"],
        leaves["weight"],
        factors,
        bias=leaves.get("bias"),
        lora_A=leaves.get("lora_A"),
        lora_B=leaves.get("lora_B"),
        scaling=SCALING,
        dropout=DROPOUT if case.dropout else 0.0,
        exact_fraction=EXACT_ROWS if case.mode == "exact rows" else 0.0,
        backend=backend,
        exact_dtype=case.mode if case.mode in eight_bit.DTYPES else None,
    )
    gradients = torch.autograd.grad(y, [leaves[name] for name in case.wanted], inputs["dy"])
    return {"y": y.detach(), **dict(zip(case.wanted, gradients, strict=True))}
