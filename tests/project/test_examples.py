"""The scripts in examples/, run as a user runs them on a tiny model: each prints a loss that falls."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama

pytest.importorskip("peft")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, on one CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def assert_learned(output: str) -> None:
    before, after = map(float, re.findall(r"held-out loss: ([\d.]+) before, ([\d.]+) after", output)[-1])
    assert 0 < after < before - 0.01
    assert re.search(r"^15 linear layers: 14 (fused|base)", output, re.MULTILINE), output


@pytest.mark.parametrize("script", ["peft_loop", "trainer", "qlora"])
def test_one_process(
    script: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if script == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(model)])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert_learned(capsys.readouterr().out)
    assert script == "qlora" or (folder / "adapter" / "adapter_model.safetensors").exists()


def test_two_ranks(model: Path, folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, str(EXAMPLES / "fsdp2.py"), str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_learned(done.stdout)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_page_at_most(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f" examples/{path.name} [" in text  # how it is called
