"""The registered operators under torch.library's own checks and under torch.compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from surrogate import NAMES, Case, call, case, leaves_of
from torch import Tensor

from loge_kernels.backend import choice, reference
from loge_kernels.backend.problem import BackwardProblem, Gradients, Operands
from loge_kernels.numerics.eight_bit import EightBitWeight, as_bits
from loge_kernels.numerics.exact_dtypes import weight_copy
from loge_kernels.op.linear import stand_ins

LINEAR_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "dropout": {"dropout": 0.5},
    "exact": {"R": None},
    "exact, no adapter": {"R": None, "P": None},
    "exact rows": {"exact_fraction": 0.5},
    "no bias, one row": {"bias": False, "M": 1},
    "residual": {"count": 4},
    "exact rows, residual, int8": {"exact_fraction": 0.5, "count": 2, "exact_dtype": "int8"},
    "exact, int8": {"R": None, "exact_dtype": "int8"},
    "exact, float8": {"R": None, "exact_dtype": "float8"},
    "exact, nvfp4": {"R": None, "exact_dtype": "nvfp4"},
    "exact rows, mxfp4": {"exact_fraction": 0.5, "exact_dtype": "mxfp4"},
    "int8": {"low_rank_dtype": "int8"},
    "float8, exact rows": {"exact_fraction": 0.5, "count": 2, "low_rank_dtype": "float8"},
}


def frozen_path(
    c: Case, count: int = 0, exact_dtype: str | None = None, low_rank_dtype: str | None = None
) -> dict[str, Any]:
    """The operands that stand for the weight, as the op passes them on."""
    made = c.factors()
    if made is not None and count:
        made = made.with_residual(c.weight.detach(), count)
    found: dict[str, Any] = stand_ins(made)
    if exact_dtype is not None:
        found |= weight_copy(exact_dtype).operands(c.weight)
    if low_rank_dtype is not None:
        for name in ("left", "right"):
            tensor, found[f"{name}_scale"] = EightBitWeight(low_rank_dtype).current(getattr(c, name))
            found[name] = as_bits(tensor)
    return found


@pytest.mark.parametrize("options", LINEAR_CASES.values(), ids=LINEAR_CASES)
def test_opcheck_linear(options: dict[str, Any]) -> None:
    options = dict(options)
    dropout, fraction = options.pop("dropout", 0.0), options.pop("exact_fraction", 0.0)
    names = ("count", "exact_dtype", "low_rank_dtype")
    given = {name: options.pop(name) for name in names if name in options}
    c = case(dtype=torch.float32, **options)
    frozen = frozen_path(c, **given)
    trained = {name: t.requires_grad_() for name in ("bias", "lora_A", "lora_B") if (t := getattr(c, name)) is not None}
    seed = torch.tensor([1, 2]) if dropout else None
    constants = {"scaling": 0.5, "dropout": dropout, "seed": seed, "exact_fraction": fraction, "backend": "reference"}
    weight = c.weight.requires_grad_("exact_dtype" not in given)
    operands = Operands(c.x.requires_grad_(), weight, **frozen, **trained, **constants)
    torch.library.opcheck(torch.ops.loge_kernels.linear.default, tuple(operands))


@pytest.mark.parametrize("exact_dtype", [None, "float8", "int8"])
@pytest.mark.parametrize("needs", [(True,) * 5, (True, False, False, True, True), (False, False, True, False, True)])
def test_opcheck_backward(needs: tuple[bool, ...], exact_dtype: str | None) -> None:
    c = case(dtype=torch.bfloat16)
    fraction = 0.0 if exact_dtype is None else 0.4
    constants = {"scaling": 0.5, "dropout": 0.25, "seed": torch.tensor([1, 2]), "exact_fraction": fraction}
    adapter = {"lora_A": c.lora_A.float(), "lora_B": c.lora_B.float()}
    frozen = frozen_path(c, 3, exact_dtype, exact_dtype)
    operands = Operands(c.x, c.weight, **frozen, **adapter, **constants, backend="reference")
    given = (c.dy, c.x @ c.lora_A.t(), list(needs), *operands)
    torch.library.opcheck(torch.ops.loge_kernels.linear_backward.default, given)


def test_gradients_of_one_workspace_leave_the_operator_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels add dA and dB up in one allocation; an operator's outputs may not share one."""

    def backward(problem: BackwardProblem) -> Gradients:
        found = reference.backward(problem)
        assert found.dA is not None
        assert found.dB is not None
        space = torch.cat([found.dA.flatten(), found.dB.flatten()])
        dA, dB = space.split([found.dA.numel(), found.dB.numel()])
        return Gradients(found.dx, found.dweight, found.dbias, dA.view_as(found.dA), dB.view_as(found.dB))

    monkeypatch.setattr(choice, "_REGISTRY", dict(choice._REGISTRY))
    choice.register_backend("one workspace", backward)
    c = case(dtype=torch.float32)
    adapter = {"lora_A": c.lora_A, "lora_B": c.lora_B}
    operands = Operands(c.x, c.weight, **frozen_path(c), **adapter, backend="one workspace")
    given = (c.dy, c.x @ c.lora_A.t(), [True, False, True, True, True], *operands)
    *_, dA, dB = torch.ops.loge_kernels.linear_backward(*given)
    assert dA.untyped_storage().data_ptr() != dB.untyped_storage().data_ptr()
    torch.library.opcheck(torch.ops.loge_kernels.linear_backward.default, given)


HELD = EightBitWeight("int8")
EXACT = {"R": None, "dtype": torch.float32}
COMPILED: list[Any] = [
    ({}, {"dropout": 0.5}),
    ({"R": None}, {}),
    ({}, {"exact_fraction": 0.4}),
    ({"P": None, "bias": False}, {}),
    pytest.param({"count": 5}, {}, marks=pytest.mark.slow),
    ({"dtype": torch.float32}, {"exact_fraction": 1.0, "exact_dtype": "int8"}),
    *((EXACT, {"exact_dtype": name}) for name in ("int8", HELD)),
    ({"dtype": torch.float32, "low_rank_dtype": "int8"}, {}),
    # Another format through the same graph.
    pytest.param(EXACT, {"exact_dtype": "float8"}, marks=pytest.mark.slow),
    pytest.param({"dtype": torch.float32, "low_rank_dtype": "float8"}, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "keywords"), COMPILED)
def test_compiled_is_eager_and_one_graph_for_any_rows(options: dict[str, Any], keywords: dict[str, Any]) -> None:
    torch._dynamo.reset()
    options = dict(options)
    count, name = options.pop("count", 0), options.pop("low_rank_dtype", None)
    c = case(M=8, N=48, K=32, **options)
    made = c.factors()
    if made is not None:
        made = made.with_residual(c.weight, count) if count else made
        made.low_rank_dtype = name
    HELD.current(c.weight)
    need = tuple(n for n in NAMES if n != "weight" or c.x.dtype == torch.float64)
    names = list(leaves_of(c))

    def layer(*given: Tensor) -> Tensor:
        leaves = dict(zip(names, given, strict=True))
        return call(c, {**leaves, "x": given[0].relu()}, factors=made, **keywords).sigmoid()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    tolerance = 1e-12 if c.x.dtype == torch.float64 else 1e-6
    for rows, stance in ((8, "default"), (5, "fail_on_recompile"), (6, "fail_on_recompile")):
        part = replace(c, x=c.x[:rows], dy=c.dy[:rows])
        results = []
        for function in (layer, compiled):
            leaves = list(leaves_of(part, need).values())
            torch.manual_seed(9)
            with torch.compiler.set_stance(stance):
                y = function(*leaves)
            y.backward(part.dy)
            results.append([y.detach(), *(t.grad for t in leaves if t.requires_grad)])
        torch.testing.assert_close(*reversed(results), rtol=tolerance, atol=tolerance)
