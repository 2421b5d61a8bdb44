"""`make gpu` without a GPU: its steps, their limits, and what it writes when one fails or hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from loge_kernels.bench import gpu
from loge_kernels.bench.gpu import Step


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def names(plan: list[list[Step]]) -> list[str]:
    return [step.name for beside in plan for step in beside]


@pytest.mark.parametrize(("quick", "minutes"), [(True, 5), (False, 11)])
def test_what_an_emulator_cannot_show_comes_first_and_all_within_the_time(quick: bool, minutes: int) -> None:
    plan = gpu.steps(Path("r"), "cuda", quick)
    assert names(plan)[: len(gpu.HARDWARE) + 1] == [*gpu.HARDWARE, "linear"]
    assert "check" in names(plan)
    assert len(set(names(plan))) == len(names(plan))
    assert sum(max(step.limit for step in beside) for beside in plan) <= 60 * minutes


def test_each_hardware_step_is_a_test_that_exists() -> None:
    text = (Path(gpu.__file__).resolve().parents[1] / "tests" / "kernels" / "test_gpu.py").read_text()
    for name, test in gpu.HARDWARE.items():
        assert f"def {test}(" in text, name
    for step in gpu.steps(Path("r"), "cuda", True)[0]:
        assert step.command[-1].endswith(f"test_gpu.py::{gpu.HARDWARE[step.name]}")


def test_the_sanitizers_watch_both_kinds_of_kernels() -> None:
    plan = {step.name: " ".join(step.command) for beside in gpu.steps(Path("r"), "cuda", False) for step in beside}
    built = find_spec("loge_kernels._C") is not None
    for tool in ("memcheck", "racecheck"):
        assert f"--tool {tool} " in plan[f"{tool}-triton"]
        assert "--backend triton" in plan[f"{tool}-triton"]
        assert (f"{tool}-cuda" in plan) is built
    if built:
        assert "test_cuda_kernels" in plan["memcheck-cuda"]
        assert "sm90-1-" not in plan["memcheck-cuda"]
        assert "(sm80-1x1- or sm90-1x1-)" in plan["racecheck-cuda"]  # not for clusters


def test_outcomes_log_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = [Step("fine", python("print('all well')"), 60), Step("beside", python("print('here too')"), 60)]
    missing = [Step("missing", ("no-such-program-here",), 60)]
    wrong = [Step("wrong", python("print('why'); raise SystemExit(3)"), 60)]
    hangs = [Step("hangs", python("import time; print('so far', flush=True); time.sleep(60)"), 2)]
    assert gpu.run(tmp_path, "cpu", chosen=[fine, wrong, hangs, missing]) is False
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["name"]: row["status"] for row in summary["steps"]} == {
        "fine": "passed",
        "beside": "passed",
        "wrong": "failed",
        "hangs": "timed out",
        "missing": "not run",
    }
    assert summary["passed"] is False
    assert "torch" in summary["environment"]["versions"]
    log = (tmp_path / "log").read_text()
    for text in ("all well", "here too", "why", "so far"):
        assert text in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "summary.json"]
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in table] == ["fine", "beside", "wrong", "hangs", "missing"]
    assert table[2].split()[1] == "failed"
    assert gpu.run(tmp_path, "cpu", chosen=[fine, missing]) is True


def test_tests_that_were_all_skipped_have_not_run(tmp_path: Path) -> None:
    printed = "print('SKIPPED [2] test_gpu.py:138: no sm90 kernel in this build'); print('{} in 1.2s')"
    skipped = Step("skipped", python(printed.format("2 skipped")), 60)
    some = Step("some", python(printed.format("1 passed, 2 skipped")), 60)
    assert gpu.run(tmp_path, "cpu", chosen=[[skipped, some]]) is True
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["steps"]}
    assert (rows["skipped"]["status"], rows["some"]["status"]) == ("not run", "passed")
    assert "no sm90 kernel" in rows["skipped"]["note"]


def test_what_has_passed_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "identity", lambda device: {"sources": "as they were"})
    results, seen = tmp_path / "results", tmp_path / "seen"
    seen.mkdir()

    def noting(name: str, code: str = "") -> Step:
        return Step(name, python(f"open(r'{seen}/{name}', 'a').write('1'); {code}"), 60)

    def times() -> dict[str, int]:
        return {path.name: len(path.read_text()) for path in seen.iterdir()}

    plan = [[noting("passes"), noting("fails", "raise SystemExit(1)")], [noting("last")]]
    assert gpu.run(results, "cpu", chosen=plan) is False
    assert gpu.run(results, "cpu", chosen=plan) is False
    assert times() == {"passes": 1, "fails": 2, "last": 1}
    gpu.run(results, "cpu", chosen=[[noting("passes", "pass")]])  # another command
    assert times()["passes"] == 2
    monkeypatch.setattr(gpu, "identity", lambda device: {"sources": "changed"})
    gpu.run(results, "cpu", chosen=plan)
    assert times() == {"passes": 3, "fails": 3, "last": 2}
    (results / "summary.json").write_text("{")
    gpu.run(results, "cpu", chosen=plan)
    assert times() == {"passes": 4, "fails": 4, "last": 3}


def test_the_identity_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "kernel.cu"
    kernel.write_text("one")
    before = gpu.identity("cpu")
    assert gpu.identity("cpu") == before
    assert {"versions", "device", "commit"} <= before.keys()
    kernel.write_text("two")
    assert gpu.identity("cpu") != before


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    """Outcomes so far are in the file, what the running step has printed is too, and no process is left behind."""
    results, child = tmp_path / "results", tmp_path / "child"
    waits = (
        f"import os, time; print(1234, flush=True); open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    plan = [[Step("first", python(""), 60)], [Step("second", python(waits), 60)]]
    code = (
        "import sys\nfrom loge_kernels.bench import gpu\nfrom loge_kernels.bench.gpu import Step\n"
        f"gpu.steps = lambda *given: {plan!r}\n"
        f"sys.argv = ['gpu', '--device', 'cpu', '--results', {str(results)!r}]\nraise SystemExit(gpu.main())\n"
    )
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (child.exists() and child.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    kept = json.loads((results / "summary.json").read_text())["steps"]
    assert [(row["name"], row["status"]) for row in kept] == [("first", "passed")]  # before anything is told to stop
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert (results / "running" / "second").read_text() == "1234\n"
    assert [line.split()[:2] for line in printed.splitlines()[-2:]] == [["first", "passed"], ["second", "not"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        gpu.run(tmp_path)
