"""The choice of a backend: by argument, by block, by environment, by preference."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import loge_kernels as loge
from loge_kernels.backend import reference
from loge_kernels.backend.problem import BackwardProblem, Gradients

registry = import_module("loge_kernels.backend.choice")


class Fake:
    """A backend that records its problems and answers with the reference's gradients."""

    def __init__(self, missing: str | None = None, refuses: str | None = None, slower: str | None = None) -> None:
        self.missing, self.refuses, self.slower = missing, refuses, slower
        self.problems: list[BackwardProblem] = []

    def backward(self, problem: BackwardProblem) -> Gradients:
        self.problems.append(problem)
        return reference.backward(problem)


Register = Callable[[str, Fake], Fake]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Puts a fake first in the order in which "auto" considers backends."""

    def put(name: str, fake: Fake) -> Fake:
        made = replace(
            registry._REGISTRY["reference"],
            why_not_here=lambda: fake.missing,
            why_not=lambda problem: fake.refuses,
            why_not_auto=lambda problem: fake.slower,
            backward=fake.backward,
            about="a fake",
        )
        monkeypatch.setattr(registry, "_REGISTRY", {name: made, **registry._REGISTRY})
        return fake

    return put


def step(backend: str | None = None) -> torch.Tensor:
    """Forward and backward of one small layer; the gradient of x."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6)
    y = loge.linear(x, weight, loge.Factors(torch.randn(5, 2), torch.randn(2, 6)), backend=backend)
    with loge.use_backend("auto"):  # the name at the forward counts
        y.sum().backward()
    return x.grad


def test_reference_is_always_there() -> None:
    (row,) = [b for b in loge.backends() if b.name == "reference"]
    assert row.available
    assert "PyTorch" in row.reason
    assert torch.equal(step("reference"), step())


def test_rows_say_why_a_backend_is_missing(register: Register) -> None:
    register("fake", Fake(missing="no such card"))
    rows = {b.name: b for b in loge.backends()}
    assert rows["fake"] == loge.Backend("fake", False, "no such card")
    assert all(isinstance(b.available, bool) and b.reason for b in rows.values())


def test_argument_over_block_over_environment_over_auto(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {name: register(name, Fake()) for name in ("environment", "block", "argument", "preferred")}

    def used(backend: str | None = None) -> str:
        for fake in fakes.values():
            fake.problems.clear()
        step(backend)
        (name,) = [name for name, fake in fakes.items() if fake.problems]
        return name

    assert used() == "preferred"
    monkeypatch.setenv("LOGE_BACKEND", "environment")
    assert used() == "environment"
    with loge.use_backend("block"):
        assert used() == "block"
        assert used("argument") == "argument"
        assert used("auto") == "preferred"
        with loge.use_backend("auto"):
            assert used() == "preferred"
        assert used() == "block"
    assert used() == "environment"
    with pytest.raises(KeyError), loge.use_backend("block"):
        raise KeyError
    assert used() == "environment"
    monkeypatch.setenv("LOGE_BACKEND", "")
    assert used() == "preferred"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend='nope' is not a backend; choose one of 'auto'.*'reference'"):
        step("nope")
    with pytest.raises(ValueError, match=r"use_backend.*'nope'.*'reference'"), loge.use_backend("nope"):
        pass
    monkeypatch.setenv("LOGE_BACKEND", "nope")
    with pytest.raises(ValueError, match=r"LOGE_BACKEND='nope'.*'reference'"):
        step()


def test_a_named_backend_runs_or_raises(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    register("absent", Fake(missing="no such card"))
    register("picky", Fake(refuses="M is odd"))
    with pytest.raises(ValueError, match=r"backend='absent' cannot run here: no such card"):
        step("absent")
    with pytest.raises(ValueError, match="no such card"), loge.use_backend("absent"):
        pass
    monkeypatch.setenv("LOGE_BACKEND", "absent")
    with pytest.raises(ValueError, match=r"LOGE_BACKEND='absent' cannot run here: no such card"):
        step()
    with pytest.raises(ValueError, match=r"backend='picky'.*M is odd.*'auto'"):
        step("picky")


def test_auto_says_once_what_it_took_and_why(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    expected = step("reference")
    taken = register("taken", Fake())
    picky = register("picky", Fake(refuses="M is odd"))
    absent = register("absent", Fake(missing="no such card"))
    slow = register("slow", Fake(slower="cuBLAS wins at M = 3"))
    with caplog.at_level(logging.INFO, "loge_kernels"):
        assert torch.equal(step(), expected)
        assert torch.equal(step(), expected)
    (record,) = [r for r in caplog.records if r.name == "loge_kernels"]
    for part in ("'taken'", "absent: no such card", "picky: M is odd", "slow: cuBLAS wins at M = 3"):
        assert part in record.getMessage()
    assert (len(taken.problems), picky.problems, absent.problems, slow.problems) == (2, [], [], [])
    step("slow")  # a named backend runs, faster or not
    assert len(slow.problems) == 1


def test_auto_without_any_backend_raises(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    register("picky", Fake(refuses="M is odd"))
    monkeypatch.setattr(registry, "_REGISTRY", {"picky": registry._REGISTRY["picky"]})
    with pytest.raises(RuntimeError, match="picky: M is odd"):
        step()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_problem_carries_torchs_determinism(register: Register, deterministic: bool) -> None:
    fake = register("fake", Fake())
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        step("fake")
    finally:
        torch.use_deterministic_algorithms(before)
    assert fake.problems[0].deterministic is deterministic


def test_a_registered_backend_runs_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    toy = Fake()
    loge.register_backend("toy", toy.backward, why_not=lambda problem: toy.refuses, about="a toy")
    assert loge.backends()[-1] == loge.Backend("toy", True, "a toy")
    expected = step("reference")
    assert torch.equal(step(), expected)
    assert toy.problems == []  # "auto" does not choose it
    assert torch.equal(step("toy"), expected)
    with loge.use_backend("toy"):
        assert torch.equal(step(), expected)
    assert len(toy.problems) == 2
    toy.refuses = "only on Sundays"
    with pytest.raises(ValueError, match="only on Sundays"):
        step("toy")
    for name in ("toy", "auto", "reference"):
        with pytest.raises(ValueError, match=f"name='{name}' is taken"):
            loge.register_backend(name, toy.backward)
    loge.register_backend("elsewhere", toy.backward, why_not_here=lambda: "no such card")
    assert loge.backends()[-1] == loge.Backend("elsewhere", False, "no such card")
    with pytest.raises(ValueError, match="no such card"):
        step("elsewhere")
