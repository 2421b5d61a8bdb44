"""The exact gradients of `bench linear`: by which backends, in which 8 bits, and that the gate knows what is right."""

from __future__ import annotations

import pytest
import torch

from loge_kernels.bench.linear import baselines
from loge_kernels.bench.linear.gate import Gate
from loge_kernels.bench.linear.operands import make_operands


@pytest.fixture
def operands() -> baselines.Operands:
    return make_operands(40, 64, 48, (16,), 4, torch.bfloat16, torch.device("cpu"))


def test_a_cpu_has_one(operands: baselines.Operands) -> None:
    found = baselines.candidates(operands, "backward", ["reference"], ["exact"])
    assert [(c.name, c.kind) for c in found] == [("exact", "exact"), ("loge reference R=16", "loge")]


def test_every_backend_with_kernels_in_every_dtype(
    operands: baselines.Operands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_takes", lambda o, dtype: True)
    found = baselines.candidates(operands, "backward", ["triton", "cuda", "reference"], ["exact"])
    names = ["exact", "exact triton"]
    names += [f"exact {dtype}{backend}" for dtype in ("float8", "int8") for backend in ("", " triton")]
    assert [c.name for c in found if c.rank is None] == names
    assert [c.kind for c in found if c.rank is None] == ["exact"] + ["loge"] * 5


def test_the_gate_tells_8_bits_from_16(operands: baselines.Operands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_takes", lambda o, dtype: True)
    gate = Gate(operands)
    for candidate in baselines.candidates(operands, "backward", ["reference"], ["exact"]):
        results = candidate.prepare()()
        verdicts = gate.check(results, candidate.rank, candidate.adapter, candidate.eight_bits)
        assert all(verdict.passed for verdict in verdicts.values()), candidate.name
        if candidate.eight_bits is not None:
            # Of int8's rounding bfloat16's own hides too much.
            assert candidate.eight_bits == "int8" or not gate.check(results, None)["dx"].passed
            other = "int8" if candidate.eight_bits == "float8" else "float8"
            assert not gate.check(results, None, True, other)["dx"].passed
