"""`make gpu` without a GPU: its steps, their limits, and what it writes when one fails or hangs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from loge_kernels.bench import gpu
from loge_kernels.bench.gpu import Step


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_correctness_first_and_within_the_time() -> None:
    everything, quick = gpu.steps(Path("r"), "cuda", False), gpu.steps(Path("r"), "cuda", True)
    names = [step.name for step in everything]
    assert names.index("check") < names.index("linear")
    for tool in ("memcheck", "racecheck"):
        (step,) = [step for step in everything if step.name == tool]
        watched = [" ".join(command) for command in step.commands]
        assert all(f"--tool {tool}" in command for command in watched)
        assert any("--backend triton" in command for command in watched)
        assert any("test_cuda_kernels" in command for command in watched) is (find_spec("loge_kernels._C") is not None)
    assert sum(step.limit for step in quick) <= 3 * 60
    assert sum(step.limit for step in everything) <= 10 * 60 + 10


def test_outcomes_log_and_summary(tmp_path: Path) -> None:
    fine = Step("fine", (python("print('all well')"), python("print('here too')")), 60)
    missing = Step("missing", (("no-such-program-here",),), 60)
    steps = [
        fine,
        Step("wrong", (python("pass"), python("raise SystemExit(3)")), 60),
        Step("hangs", (python("import time; print('so far', flush=True); time.sleep(60)"),), 2),
        missing,
    ]
    assert gpu.run(tmp_path, "cpu", chosen=steps) is False
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["name"]: row["status"] for row in summary["steps"]} == {
        "fine": "passed",
        "wrong": "failed",
        "hangs": "timed out",
        "missing": "not run",
    }
    assert summary["passed"] is False
    log = (tmp_path / "log").read_text()
    for text in ("all well", "here too", "so far"):
        assert text in log
    assert gpu.run(tmp_path, "cpu", chosen=[fine, missing]) is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        gpu.run(tmp_path)
