"""The harness: green on the reference, red on any result made wrong, honest about what a backend declines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from loge_kernels.backend import choice as registry
from loge_kernels.backend import reference
from loge_kernels.backend.problem import BackwardProblem, Gradients
from loge_kernels.check import harness as check
from loge_kernels.check.cases import Case, Mode, describe, grid

CPU = torch.device("cpu")


def with_backward(monkeypatch: pytest.MonkeyPatch, change: Any, **functions: Any) -> None:
    """Let `change(problem, gradients)` spoil what the reference backend returns."""
    table = registry._REGISTRY

    def backward(problem: BackwardProblem) -> Gradients:
        gradients = reference.backward(problem)
        change(problem, gradients)
        return gradients

    monkeypatch.setitem(table, "reference", replace(table["reference"], backward=backward, **functions))


def failed(report: check.CheckReport) -> set[str]:
    return {row.result for row in report.rows if row.failed}


def test_reference_passes_in_every_dtype() -> None:
    report = check.run("reference", sample=40)
    assert report.passed
    assert {row.dtype for row in report.rows} == set(check.DTYPES)
    assert {row.result for row in report.rows} == {"y", *check.GRADIENTS}
    assert report.to_dict()["passed"] is True


def test_grid_covers_what_it_promises() -> None:
    cases = list(grid())
    assert {0, 1} <= {case.M for case in cases}
    assert any(case.R % 2 for case in cases)
    assert any(case.P % 2 for case in cases if case.P)
    assert {case.mode for case in cases} == set(get_args(Mode))
    for feature in ("bias", "dropout", "contiguous"):
        assert {getattr(case, feature) for case in cases} == {False, True}
    assert len({case.wanted for case in cases}) >= 2 ** len(check.GRADIENTS) - 1


@pytest.mark.parametrize("name", ["dx", "dweight", "dbias", "dA", "dB"])
@pytest.mark.parametrize("fault", ["scaled", "one element", "nan"])
def test_a_wrong_gradient_is_seen(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(problem: BackwardProblem, gradients: Gradients) -> None:
        tensor = getattr(gradients, name)
        if tensor is None or tensor.numel() == 0:
            return
        if fault == "scaled":
            tensor *= 1.02
        else:
            tensor.view(-1)[-1] += float("nan") if fault == "nan" else 0.5 * tensor.abs().max()

    with_backward(monkeypatch, spoil)
    report = check.run("reference", dtypes=("float32",), sample=60)
    assert not report.passed
    assert failed(report) == {{"dx": "x", "dweight": "weight", "dbias": "bias", "dA": "lora_A", "dB": "lora_B"}[name]}


@pytest.mark.parametrize("mode", [mode for mode in get_args(Mode) if mode not in ("low-rank", "exact")])
def test_every_mode_is_held_to_its_own_formula(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right as it is; wrong where the low-rank product alone stands in its place."""
    cases = [case for case in grid() if case.mode == mode and case.M == 65]
    assert len(cases) == 12
    monkeypatch.setattr(check, "grid", lambda: iter(cases))
    assert check.run("reference").passed
    original = check._through_op

    def low_rank(case: Case, inputs: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in inputs.items() if name not in ("rows", "residual")}
        return original(replace(case, mode="low-rank"), kept, backend)

    monkeypatch.setattr(check, "_through_op", low_rank)
    report = check.run("reference", dtypes=("float32",))
    assert failed(report) == {"x"}


def test_products_that_cannot_run_in_8_bits_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the op takes them in 16 bits, which are held to another formula."""
    asked: list[tuple[int, ...]] = []

    def why_not(name: str, device: torch.device, *shape: int) -> str | None:
        asked.append(shape)
        return "not in tiles of 16" if shape[0] == 32 else None

    cases = [case for case in grid() if case.mode in ("int8", "low-rank int8", "low-rank") and case.M == 65]
    monkeypatch.setattr(check, "grid", lambda: iter(cases))
    monkeypatch.setattr(check.eight_bit, "why_not", why_not)
    report = check.run("reference", dtypes=("float32",))
    assert report.declined == {"reference: not in tiles of 16": 12}
    assert {(96, 80), (96, 32), (32, 80)} <= set(asked)


def test_declined_cases_are_counted_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backward(monkeypatch, lambda *_: None, why_not=lambda problem: "never today")
    report = check.run("reference", dtypes=("float32",), sample=10)
    assert not report.passed  # nothing was run
    assert sum(report.declined.values()) >= 10
    assert all("never today" in reason for reason in report.declined)


def test_describe_names_the_case() -> None:
    case = Case(7, 33, 21, 5, 3, "low-rank", True, True, False, ("x", "lora_A"))
    text = describe(case)
    for word in ("M=7", "N=33", "K=21", "R=5", "P=3", "bias", "dropout", "strided", "x+lora_A"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "nope"}, ("backend='nope'", "reference")),
        ({"dtypes": ("int8",)}, ("dtype='int8'", "float32")),
        ({"device": "quantum"}, ("device='quantum'",)),
        ({"sample": 0}, ("sample=0", "at least 1")),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        check.run(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_every_available_backend_is_checked() -> None:
    names = {row.name for row in registry.backends() if row.available}
    assert {row.backend for row in check.run(dtypes=("float32",), sample=1).rows} == names
