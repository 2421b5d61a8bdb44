"""A run of `loge_kernels.finetune` that is interrupted, or whose disk is full, and goes on."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import signal
import stat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from finetuning import CURVES, TEXT, go, interrupted, tokenizer_of
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneError, FinetuneOptions, Interrupted, files, options, results, training


# Turns are lora, loge, low rank and back again.
@pytest.mark.parametrize(("at", "steps"), [(2, (1, 1, 0)), (7, (3, 2, 2)), (12, (4, 4, 4))])
def test_interrupted_and_resumed_equals_uninterrupted(base, whole, at, steps):
    whole_out, uninterrupted, _ = whole
    stopped = interrupted(base, at)
    where = "at step {} of lora, {} of loge, {} of low_rank (of 4); saved in".format(*steps)
    assert where in str(stopped)
    assert f"--resume --out {base.out}" in str(stopped)
    assert stopped.exit_status == 130
    assert not (Path(base.out) / "metrics.json").exists()
    resumed, printed = go(base, resume=True)
    for name in ("lora", "loge", "low_rank"):
        ours, theirs = (metrics["methods"][name] for metrics in (resumed, uninterrupted))
        for key in ("losses", "heldout_before", "heldout_after", "exact_steps", "first_gradient_cosine", "report"):
            assert ours[key] == theirs[key], (name, key)
        adapters = [load_file(Path(out) / name / "adapter_model.safetensors") for out in (base.out, whole_out)]
        torch.testing.assert_close(*adapters, rtol=0, atol=0)
    assert f"LoGE low rank: going on after step {steps[2]}" in printed
    with pytest.raises(FinetuneError, match="has finished"):
        go(base, resume=True)


def test_exact_every_begins_again_with_an_exact_step(base):
    changes = {"method": ("low-rank",), "rank": 16, "exact_every": 3, "subspace": "svd"}
    interrupted(base, 4, **changes)
    resumed, _ = go(base, resume=True, **changes)
    assert resumed["methods"]["low_rank"]["exact_steps"] == [True, False, True, False]


def test_interrupted_while_evaluating(base, whole, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    calls = itertools.count(1)

    def interrupting(*args):
        if next(calls) == 3:  # that of LoGE
            os.kill(os.getpid(), signal.SIGINT)
        return training.heldout_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.job, "heldout_loss", interrupting)
        with pytest.raises(Interrupted, match="at step 4 of lora, 4 of loge"):
            go(base)
    assert signal.getsignal(signal.SIGINT) is handler
    metrics, printed = go(base, resume=True)
    assert "PEFT) held-out" not in printed
    assert "LoGE held-out" in printed
    for name, own in metrics["methods"].items():
        assert own["heldout_after"] == whole[1]["methods"][name]["heldout_after"]


def test_interrupted_before_training(base, monkeypatch):
    monkeypatch.setattr(finetune.job, "heldout_loss", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(Interrupted, match="nothing to resume"):
        go(base)


def test_resume_with_other_arguments(base):
    interrupted(base, 2)
    others = {"lr": 1e-3, "lora_rank": 8, "rank": 0.125, "steps": 7, "targets": ("q_proj",), "method": ("loge",)}
    for name, value in others.items():
        words = f"{options.flag(name)} .*differs from the interrupted run"
        with pytest.raises(FinetuneError, match=words):
            go(base, resume=True, **{name: value})
    Path(base.text[0]).write_text(TEXT.replace("return", "yield"))
    with pytest.raises(FinetuneError, match="the text has changed"):
        go(base, resume=True)


def test_resume_from_nothing_or_damage(base):
    with pytest.raises(FinetuneError, match="--resume: no interrupted run"):
        go(base, resume=True)
    state = Path(base.out) / "state"
    state.mkdir()
    (state / "lora.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(FinetuneError, match="is damaged"):
        go(base, resume=True)


def test_starting_anew_over_an_interrupted_run(base):
    interrupted(base, 8)
    metrics, printed = go(base, steps=2)
    assert "starting anew" in printed
    assert len(metrics["methods"]["loge"]["losses"]) == 2


def test_resume_command_is_complete():
    command = FinetuneOptions(text=("a b.txt", "c.txt"), lora_rank=4, targets=("q_proj",), out="x y").resume_command()
    assert command == (
        "python -m loge_kernels finetune --resume --out 'x y' --text 'a b.txt' --text c.txt --lora-rank 4 "
        "--targets q_proj"
    )


@pytest.mark.parametrize("where", ["state", "adapter", "curves", "metrics"])
def test_full_disk(base, monkeypatch, where):
    """At whatever write it happens: one line, and once there is space again the run goes on where it was."""
    base = dataclasses.replace(base, method=("loge",), steps=2)

    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    rust_full = Mock(side_effect=SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"))
    with monkeypatch.context() as patch:
        if where == "state":
            patch.setattr(Path, "write_bytes", full)
        elif where == "adapter":
            patch.setattr(finetune.models, "save_adapter", rust_full)
        elif where == "curves":
            patch.setattr(results, "curves", CURVES)
            patch.setattr(Figure, "savefig", full)
        else:  # the first write through write_bytes after the picture
            patch.setattr(results, "curves", lambda *args: patch.setattr(Path, "write_bytes", full))
        words = r"--out: cannot write .*, the disk is full; free some space"
        with pytest.raises(FinetuneError, match=words) as failure:
            go(base)
    assert "\n" not in str(failure.value)
    assert not (Path(base.out) / "metrics.json").exists()
    if where != "state":
        metrics, printed = go(base, resume=True)
        assert "going on after step 2" in printed
        for method in ("lora", "loge"):
            assert len(metrics["methods"][method]["losses"]) == 2
            assert (Path(base.out) / method / "adapter_model.safetensors").exists()


def test_nearly_full_disk_is_noticed_before_training(base, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(FinetuneError, match=r"--out .*: the disk is nearly full, 1 MB free and \d+ MB needed"):
        go(base)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    with contextlib.suppress(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_follow_the_umask(tmp_path):
    files.write(tmp_path / "x.json", b"{}")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o666 & ~umask


def test_dropout_of_the_model_survives_a_resume(base, tmp_path):
    """A model with dropout of its own draws the same masks after a resume."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.model)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "dropout")
    tokenizer_of(base).save_pretrained(tmp_path / "dropout")
    base = dataclasses.replace(base, model=str(tmp_path / "dropout"), steps=2, method=("loge",))
    whole, _ = go(base, out=tmp_path / "whole")
    interrupted(base, 2)
    resumed, _ = go(base, resume=True)
    for method in ("lora", "loge"):
        assert resumed["methods"][method]["losses"] == whole["methods"][method]["losses"]
