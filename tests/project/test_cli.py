"""The commands as a user types them: output, JSON, exit status and one line on bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loge_kernels.__main__ import app

runner = CliRunner()


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loge_kernels", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    for command in ("info", "check", "bench", "finetune"):
        assert command in done.stdout


def test_the_command_that_the_package_installs_is_the_modules() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    scripts = re.search(r"^\[project\.scripts\]\nloge = \"(.+):(.+)\"\n$", project, re.MULTILINE)
    assert scripts is not None
    assert getattr(import_module(scripts[1]), scripts[2]) is app


@pytest.mark.parametrize(
    "command",
    [
        ("info",),
        ("check",),
        ("bench", "linear"),
        ("bench", "step"),
        ("bench", "fidelity"),
        ("bench", "scale"),
        ("finetune",),
    ],
)
def test_help(command: tuple[str, ...]) -> None:
    result = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.output


def test_info(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    result = runner.invoke(app, ["info", "--json", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    facts = json.loads(file.read_text())
    assert {row["name"] for row in facts["backends"]} >= {"reference", "triton"}
    assert facts["torch"] in result.output


def test_check(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    result = runner.invoke(app, ["check", "--dtype", "float32", "--sample", "8", "--json", str(file)])
    assert result.exit_code == 0
    assert json.loads(file.read_text())["passed"] is True


def test_check_fails_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for slack in ("FACTOR", "_RMS_ULP", "_MAX_ULP"):
        monkeypatch.setattr(f"loge_kernels.check.accuracy.{slack}", 0.0)
    result = runner.invoke(app, ["check", "--dtype", "float32", "--sample", "8"])
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--backend", "nope"], ["backend='nope'", "reference"]),
        (["bench", "no-such-model"], ["no-such-model", "LLaMA-2-7B"]),
        (["bench", "16,16,16", "--rank", "many"], ["--rank 'many' is not a number"]),
        (["bench", "fidelity", "--policy", "svg:rank=1/8"], ["--policy 'svg:rank=1/8'", "random"]),
        (["bench", "fidelity", "--seed", "0.5"], ["--seed 0.5 is not an integer"]),
        (["finetune", "--text", "/no/such/file"], ["--text '/no/such/file'"]),
        (["info", "--json", "/no/such/folder/info.json"], ["/no/such/folder"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words)
    assert "Traceback" not in result.output


def test_bad_input_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "loge_kernels", "check", "--backend", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: backend='nope'" in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_without_a_subcommand_is_linear(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", "32,48,40", "-R", "16", "-P", "4", "--dtype", "float32", "--device", "cpu", "--budget", "0.2"]
    result = runner.invoke(app, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["benchmark"] == "linear"


def test_bench_linear_passes_on_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from loge_kernels.bench.linear import run as micro
    from loge_kernels.bench.linear import tune

    seen: dict[str, micro.MicroOptions] = {}
    monkeypatch.setattr(micro, "run", lambda options: seen.update(micro=options))
    monkeypatch.setattr(tune, "run", lambda options: seen.update(tune=options))
    arguments = ["SmolLM2-135M", "8,16,16", "-M", "8,16", "-R", "16,0.5", "-P", "4", "--dtype", "float32,bf16"]
    assert runner.invoke(app, ["bench", *arguments, "--csv", "x.csv"]).exit_code == 0
    assert runner.invoke(app, ["bench", "--tune", "--budget", "2"]).exit_code == 0
    given = {"shapes": ("SmolLM2-135M", "8,16,16"), "rows": (8, 16), "ranks": (16, 0.5), "lora_ranks": (4,)}
    assert seen["micro"] == micro.MicroOptions(dtypes=("float32", "bf16"), csv=Path("x.csv"), **given)
    assert seen["tune"] == micro.MicroOptions(tune=True, budget=2.0)


def test_finetune_passes_on_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from loge_kernels import finetune

    seen: list[finetune.FinetuneOptions] = []
    monkeypatch.setattr(finetune, "run", seen.append)
    arguments = ["--method", "lora,low-rank:1e-3", "--freeze", "2", "--rank", "16", "--exact-layers", "0.25"]
    arguments += ["--exact-every", "3", "--subspace", "svd", "--exact-dtype", "none", "--out", "x"]
    for given in ([], arguments):
        assert runner.invoke(app, ["finetune", *given]).exit_code == 0
    assert seen[0] == finetune.FinetuneOptions(out=Path("out"))
    policy = {"rank": 16, "exact_layers": 0.25, "exact_every": 3, "subspace": "svd", "exact_dtype": "none"}
    assert seen[1] == finetune.FinetuneOptions(method=("lora", "low-rank:1e-3"), freeze=2, out=Path("x"), **policy)
    assert runner.invoke(app, ["finetune", "--rank", "many"]).exit_code == 1
