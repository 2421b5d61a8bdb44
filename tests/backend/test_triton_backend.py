"""The adapter between the op and the Triton kernels, and what "auto" makes of it, in the interpreter."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from interpreter import interpreted, needs_triton
from surrogate import case, problem_of

import loge_kernels as loge
from loge_kernels.backend import cuda as cuda_backend
from loge_kernels.backend import triton as triton_backend


@needs_triton
def test_the_harness_through_the_op(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    command = ["-m", "loge_kernels", "check", "--backend", "triton", "--dtype", "float32", "--part", "2/28"]
    done = interpreted(*command, "--json", str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    report = json.loads(file.read_text())
    assert {row["result"] for row in report["rows"] if row["cases"]} == {"y", "x", "weight", "bias", "lora_A", "lora_B"}
    reasons = " ".join(report["declined"])
    assert "exact_fraction" in reasons
    assert "without factors" not in reasons


@needs_triton
def test_auto_leaves_the_cpu_to_torch_and_says_why() -> None:
    code = (
        "import logging, torch, loge_kernels as loge; logging.basicConfig(level=logging.INFO);"
        "x = torch.randn(3, 16, requires_grad=True); w = torch.randn(20, 16);"
        "loge.linear(x, w, loge.factorize(w, 16)).sum().backward()"
    )
    done = interpreted("-c", code)
    assert "backend 'auto' uses 'reference' (triton: on the CPU it runs in an interpreter" in done.stderr


def test_reasons() -> None:
    c = case(dtype=torch.float32)
    assert "exact_fraction" in (triton_backend.why_not(problem_of(c, exact_fraction=0.5)) or "")
    declined = problem_of(c, left_scale=torch.ones(5), right_scale=torch.ones(11))
    assert triton_backend.why_not(declined) == "the low-rank product is in 8 bits, which PyTorch computes"
    assert triton_backend.why_not(problem_of(c)) != triton_backend.why_not(declined)
    if cuda_backend.why_not_here() is None:
        assert cuda_backend.why_not(declined) == triton_backend.why_not(declined)
    if find_spec("triton") is None:
        assert triton_backend.why_not_here() == "Triton is not installed"
    elif not torch.cuda.is_available():
        assert "no CUDA GPU" in (triton_backend.why_not_here() or "")
        with pytest.raises(ValueError, match="backend='triton' cannot run here: no CUDA GPU"):
            loge.linear(torch.randn(2, 4), torch.randn(5, 4), None, backend="triton")
