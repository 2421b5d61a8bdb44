"""`bench fidelity` on a tiny LLaMA: what the file holds, when a loss is reached, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import tiny_llama
import torch
from rich.console import Console

import loge_kernels as loge
from loge_kernels.bench.fidelity import hopper
from loge_kernels.bench.fidelity import report as fidelity_report
from loge_kernels.bench.fidelity import run as fidelity
from loge_kernels.bench.fidelity import training as fidelity_training
from loge_kernels.bench.fidelity.run import FidelityOptions
from loge_kernels.bench.paper import run as on_paper
from loge_kernels.bench.paper.model import llama
from loge_kernels.bench.policies import parse
from loge_kernels.finetune import training
from loge_kernels.numerics import eight_bit

SVD = "rank=1/4,subspace=svd"
MIXED = f"{SVD},exact_every=2"
Whole = tuple[dict[str, Any], str, Path]


def options(folder: Path, model: Path) -> FidelityOptions:
    """Two steps of two policies, beside exact LoRA."""
    text = folder / "text.py"
    text.write_text(tiny_llama.TEXT)
    return FidelityOptions(
        policies=(SVD, MIXED),
        seeds=(0,),
        model=str(model),
        text=(text,),
        steps=2,
        batch=2,
        seq=32,
        lr=5e-3,
        lora_rank=4,
        checkpoints=2,
        heldout=2,
        calibration=2,
        gradient_steps=3,  # more than `steps`
        dtype="float32",
        device="cpu",
        json=folder / "fidelity.json",
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(model: Path, tmp_path: Path) -> FidelityOptions:
    return options(tmp_path, model)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run of two seeds with every file: the result, what was printed, the folder."""
    folder = tmp_path_factory.mktemp("whole")
    files = {kind: folder / "deep" / f"fidelity.{kind}" for kind in ("csv", "png")}
    result, printed = go(options(folder, model), seeds=(0, 1), **files)
    return result, printed, folder


def go(given: FidelityOptions, **changes: Any) -> tuple[dict[str, Any], str]:
    """Run with `changes`; the result and the printed tables."""
    printed = io.StringIO()
    quiet = Console(file=io.StringIO())
    result = fidelity.run(dataclasses.replace(given, **changes), Console(file=printed, width=200), quiet)
    return result, printed.getvalue()


def rows(result: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["policy"] == policy]


def entry(result: dict[str, Any], policy: str) -> dict[str, Any]:
    (found,) = [each for each in result["summary"] if each["policy"] == policy]
    return found


def test_what_is_measured(whole: Whole) -> None:
    result, printed, folder = whole
    assert json.loads((folder / "fidelity.json").read_text()) == result
    assert [(row["policy"], row["seed"]) for row in result["rows"]] == [
        (policy, seed) for seed in (0, 1) for policy in ("peft", SVD, MIXED)
    ]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["steps"] == 2
        assert row["beside"] == ["peft", SVD, MIXED]
        assert [point["step"] for point in row["curve"]] == [1, 2]
        assert [len(row[name]) for name in ("losses", "cpu_seconds", "backward_seconds")] == [2, 2, 2]
        assert row["curve"][1]["cpu_seconds"] == pytest.approx(sum(row["cpu_seconds"]), abs=1e-3)
        assert row["curve"][1]["heldout"] < result["heldout_before"]
        assert row["gradient"]["layers"].keys() == {"0", "1"}
    exact, low_rank, mixed = (rows(result, policy)[0] for policy in ("peft", SVD, MIXED))
    assert exact["gradient"]["all"] == {"cosine": 1.0, "norm_ratio": 1.0}
    assert 0.1 < low_rank["gradient"]["all"]["cosine"] < 0.999
    # The top layer's o_proj, gate, up and down have little or nothing above them: its gradient is the better one.
    layers = low_rank["gradient"]["layers"]
    assert layers["1"]["B"]["cosine"] > layers["0"]["B"]["cosine"]
    # That of a low-rank step, although the first of two is exact.
    assert mixed["gradient"]["all"] == pytest.approx(low_rank["gradient"]["all"], rel=1e-4)
    assert all(math.isclose(row["losses"][0], exact["losses"][0], rel_tol=1e-5) for row in (low_rank, mixed))
    assert rows(result, "peft")[1]["losses"][0] != exact["losses"][0]
    assert "time to exact LoRA's loss" in printed


def test_the_summary(whole: Whole) -> None:
    result, printed, _ = whole
    before, found = result["heldout_before"], entry(result, SVD)
    ends = [[row["curve"][-1]["heldout"] for row in rows(result, policy)] for policy in (SVD, "peft")]
    gains = [(before - ours) / (before - exact) for ours, exact in zip(*ends, strict=True)]
    assert found["recovered"] == pytest.approx(sum(gains) / 2)
    assert (found["recovered_min"], found["recovered_max"]) == pytest.approx((min(gains), max(gains)))
    # Of the model trained, on the GPU that was named.
    sizes = llama(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=result["sizes"]["vocab"])
    step = on_paper.step_seconds(parse(SVD).on_paper(), "H100", sizes, tokens=64, sequences=2, lora_rank=4)
    assert found["step_seconds"]["predicted_seconds"] == step
    times = found["to_loss"]["0.5"]
    assert times["seeds"] == 2
    assert times["predicted_seconds"] == pytest.approx(times["step"] * step)
    assert entry(result, "peft")["to_loss"]["1"]["step"] == pytest.approx(2.0, abs=0.05)
    assert "predicted seconds on H100" in printed


def test_when_a_loss_is_reached() -> None:
    points = [(1, 0.5, 2.0), (3, 1.5, 1.0), (4, 2.0, 1.2), (6, 3.0, 0.5)]
    row = {"curve": [{"step": s, "seconds": t, "cpu_seconds": 2 * t, "heldout": loss} for s, t, loss in points]}
    found = [fidelity_report.reached(row, 4.0, loss) for loss in (5.0, 3.0, 1.5, 1.0, 0.85, 0.4)]
    assert [each and each["step"] for each in found] == pytest.approx([0, 0.5, 2, 3, 5, None])
    assert found[4] == pytest.approx({"step": 5, "seconds": 2.5, "cpu_seconds": 5.0})


def test_never_and_the_seeds_that_came_to_it(whole: Whole) -> None:
    result = json.loads(json.dumps(whole[0]))
    for row in result["rows"]:
        if row["policy"] != "peft":
            row["curve"][-1]["heldout"] = 1.0 if row["policy"] == SVD and row["seed"] == 0 else 50.0
            row["curve"][0]["heldout"] = 50.0
    fidelity_report.conclude(result, "A100", "LLaMA-3-8B")
    assert [entry(result, policy)["to_loss"]["1"]["seeds"] for policy in (SVD, MIXED)] == [1, 0]
    assert entry(result, MIXED)["to_loss"]["0.5"]["seconds"] is None
    printed = io.StringIO()
    fidelity_report.print_tables(Console(file=printed, width=200), result)
    lines = [line for line in printed.getvalue().splitlines() if line.strip().startswith((SVD, MIXED))]
    assert "(1 of 2)" in lines[0]
    assert "never" in lines[1]
    assert "predicted seconds on A100, LLaMA-3-8B, 2 x 4096" in printed.getvalue()
    assert entry(result, SVD)["step_seconds"]["predicted_seconds"] > 0.1


def test_what_paper_does_not_know_is_not_predicted() -> None:
    sizes = llama(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=50)
    known = [
        fidelity_report.predicted_step("A100", sizes, policy)
        for policy in ("peft", "dropped", "exact_dtype=float8", "rank=16,residual=0.1")
    ]
    assert [each is None for each in known] == [False, False, True, True]


def test_the_files(whole: Whole) -> None:
    result, _, folder = whole
    assert (folder / "deep" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "deep" / "fidelity.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["policy"] for line in lines] == [each["policy"] for each in result["summary"]]
    for line, found in zip(lines, result["summary"], strict=True):
        assert line["seeds"] == "0 1"
        assert float(line["to_0.5_predicted_seconds"]) == found["to_loss"]["0.5"]["predicted_seconds"]
        assert (line["lora_rank"], line["model"], line["gpu"]) == ("4", result["model"], "H100")
        assert line["version_torch"] == torch.__version__
    assert "csv" not in result["settings"]
    assert sorted(each.name for each in (folder / "deep").iterdir()) == ["fidelity.csv", "fidelity.png"]


def test_finished_runs_are_skipped(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []
    run = fidelity_training.Workbench.run

    def interrupted(self: Any, policies: Any, seed: int, checkpoints: Any) -> list[dict[str, Any]]:
        ran.extend((policy.text, seed) for policy in policies)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run(self, policies, seed, checkpoints)

    monkeypatch.setattr(fidelity_training.Workbench, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(base, together=False)
    assert len(json.loads(base.json.read_text())["rows"]) == 2
    result, printed = go(base, together=False)
    assert ran[3:] == [ran[2]]
    assert f"not run in turn with peft, so that measured seconds do not compare: {SVD}, {MIXED}" in printed
    ran.clear()
    again, _ = go(base)
    assert ran == []
    assert again == result
    with pytest.raises(ValueError, match=r"--steps 3: .* holds runs with 2"):
        go(base, steps=3)
    Path(base.text[0]).write_text(tiny_llama.TEXT.replace("x", "z"))
    with pytest.raises(ValueError, match="the text has changed"):
        go(base, seeds=(1,))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_and_fewer_steps(base: FidelityOptions, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    trained = training.Trainer.step

    def noting(self: Any) -> None:
        trained(self)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(training.Trainer, "step", noting)
    policies = ("peft:steps=0.5", f"{SVD},steps=1.5")
    result, _ = go(base, steps=4, policies=policies, schedule=schedule, together=False, json=None)
    exact, fewer, more = result["rows"]
    assert [row["steps"] for row in result["rows"]] == [len(row["losses"]) for row in result["rows"]] == [4, 2, 6]
    assert [point["step"] for point in more["curve"]] == [1, 4, 6]
    # Three steps before the gradient, at the whole rate; every schedule is as long as its run.
    if schedule == "constant":
        assert rates == [base.lr] * (3 + 4 + 2 + 6)
        assert fewer["losses"] == exact["losses"][:2]
    else:
        shape = [0.5 * (1 + math.cos(math.pi * step / steps)) for steps in (4, 2, 6) for step in range(steps)]
        assert rates == pytest.approx([base.lr] * 3 + [base.lr * share for share in shape])
        assert fewer["losses"][0] == exact["losses"][0]


def test_turns_change_the_seconds_alone(base: FidelityOptions, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    trained = training.Trainer.step

    def noting(self: Any) -> None:
        order.append(id(self))
        trained(self)

    apart, _ = go(base, together=False, json=None)
    monkeypatch.setattr(training.Trainer, "step", noting)
    together, _ = go(base, policies=(SVD, MIXED, f"{SVD},steps=1.5"), json=None)
    assert together["rows"][0]["losses"] == whole[0]["rows"][0]["losses"]
    for ours, theirs in zip(together["rows"][:3], apart["rows"], strict=True):
        for name in ("policy", "seed", "losses", "gradient"):
            assert ours[name] == theirs[name], (ours["policy"], name)
    # After three steps before the gradient: every policy once, then in the opposite order, then who is left.
    turns = order[3:]
    assert len(set(turns[:4])) == 4
    assert turns[4:8] == turns[:4][::-1]
    assert len(turns) == 9


def test_warmup_and_the_text(base: FidelityOptions) -> None:
    bench = fidelity_training.Workbench(base.training(), "constant", 1, 2, 2, 1, Console(file=io.StringIO()))
    parts = [{tuple(row.tolist()) for row in part} for part in (bench.train, bench.heldout, bench.calibration)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert not torch.equal(bench.corpus(0).order, bench.corpus(1).order)
    bench.options = dataclasses.replace(bench.options, steps=8)
    bench._warmup = 4
    assert [bench._rate(step, 8) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [bench._rate(step, 4) for step in range(3)] == [0.5, 1.0, 1.0]


def test_the_loss_is_taken_more_often_early(base: FidelityOptions) -> None:
    points = sorted(fidelity._checkpoints(dataclasses.replace(base, steps=50, checkpoints=12)))
    assert [point for point in points if point <= 50] == [1, 2, 4, 6, 9, 13, 18, 23, 29, 35, 43, 50]
    assert max(points) >= 100


def test_the_rest_goes_on_where_one_diverges(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before; exact LoRA's two; the policy's first. What follows is as it was.
    losses = Mock(wraps=fidelity_training.heldout_loss, side_effect=chain([DEFAULT] * 3, [math.nan], repeat(DEFAULT)))
    monkeypatch.setattr(fidelity_training, "heldout_loss", losses)
    result, printed = go(base, together=False, json=None)
    _, low_rank, mixed = result["rows"]
    assert low_rank["status"] == "diverged"
    assert "step 1" in low_rank["note"]
    assert low_rank["curve"] == []
    assert mixed["status"] == "ok"
    assert "1 diverged" in printed
    assert entry(result, SVD)["recovered"] is None


def test_calibrated_policies_and_controls(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    calibrate = loge.calibrate

    def noting(model: Any, batches: Any, **options: Any) -> Any:
        seen.append((options["scores"], sum(len(batch["input_ids"]) for batch in batches)))
        assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)
        return calibrate(model, batches, **options)

    monkeypatch.setattr(loge, "calibrate", noting)
    policies = ("dropped", "random:rank=1/4", "rank=1/4", "rank=1/2", "rank=1/4,subspace=salience")
    result, _ = go(base, policies=policies, json=None)
    assert seen == [(False, base.calibration), (True, base.calibration)]  # once for all ranks
    assert result["calibration_seconds"].keys() == {"statistics", "scores"}
    exact, dropped, noise, quarter, half, _ = (row["gradient"]["all"]["cosine"] for row in result["rows"])
    assert dropped < noise < quarter < half < exact == 1.0


def test_a_frozen_layer_has_no_gradient_and_thaws(base: FidelityOptions) -> None:
    result, _ = go(base, policies=("freeze_below=1", "exact"), seeds=(0,), together=False)
    frozen, exact, peft = (rows(result, policy)[0] for policy in ("freeze_below=1", "exact", "peft"))
    layers, ends = frozen["gradient"]["layers"], [row["curve"][-1]["heldout"] for row in (frozen, exact, peft)]
    assert [layers[i]["B"]["norm_ratio"] for i in "01"] == [0.0, pytest.approx(1.0, abs=0.1)]
    assert ends[0] > ends[1] == pytest.approx(ends[2], rel=1e-5)


def test_comparison_by_hand() -> None:
    exact = {"m.layers.3.q.lora_A.w": torch.tensor([3.0, 4.0]), "m.layers.3.q.lora_B.w": torch.tensor([0.0, 1.0])}
    cheap = {"m.layers.3.q.lora_A.w": torch.tensor([3.0, 0.0]), "m.layers.3.q.lora_B.w": torch.tensor([0.0, 2.0])}
    found = fidelity_training.compare(cheap, exact)
    assert found["A"] == {"cosine": 0.6, "norm_ratio": 0.6}
    assert found["B"] == {"cosine": 1.0, "norm_ratio": 2.0}
    assert found["all"] == pytest.approx({"cosine": 11 / math.sqrt(13 * 26), "norm_ratio": math.sqrt(0.5)}, abs=1e-6)
    assert found["layers"] == {"3": {part: found[part] for part in ("all", "A", "B")}}
    nothing = fidelity_training.compare({name: torch.zeros(2) for name in exact}, exact)
    assert nothing["all"] == {"cosine": 0.0, "norm_ratio": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "--seed"),
        ({"schedule": "linear"}, "--schedule 'linear': choose constant or cosine"),
        ({"warmup": 2}, "--warmup 2"),
        ({"gradient_steps": 0}, "--gradient-steps 0"),
        ({"lr": -1.0}, "--lr -1"),
        ({"gpu": "V100"}, "gpu='V100'"),
        ({"paper_model": "GPT-2"}, "model='GPT-2'"),
        ({"heldout": 5000}, "5000"),
        ({"policies": (f"{SVD},exact_layers=2",)}, "--policy '.*': exact_layers=2"),
    ],
)
def test_options_that_cannot_be(base: FidelityOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        go(base, **changes)


@torch.no_grad()
def test_fast_accumulation_keeps_few_bits() -> None:
    """Sums of 32 terms are exact, what is added to a large sum is cut off, and the product is nearly right."""
    a, b = torch.tensor([[1.0] * 64]), torch.ones(64, 1)
    assert hopper.fast_accumulated(a, b).item() == 64.0
    a[0, :32], a[0, 32:] = 256.0, 7.0 / 32.0  # 8192, of whose 10 bits the last is 8, and 7
    assert hopper.fast_accumulated(a, b).item() == 8192.0
    assert hopper.fast_accumulated(a, b, bits=13).item() == 8199.0
    torch.manual_seed(0)
    a, b = torch.randn(16, 512), torch.randn(512, 8)
    error = (hopper.fast_accumulated(a, b) - a @ b).norm() / (a @ b).norm()
    assert 1e-4 < error < 1e-2


def test_fast_accumulation_is_for_float8_alone(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Mock(side_effect=hopper.fast_accumulated)
    monkeypatch.setattr(hopper, "fast_accumulated", taken)
    exact = eight_bit.float32_matmul
    go(base, policies=("exact",), fast_accumulation=True, json=None)
    assert not taken.called
    go(base, policies=("exact_dtype=float8",), fast_accumulation=True, json=None)
    assert taken.called
    assert eight_bit.float32_matmul is exact


def test_fast_accumulation_is_emulated_on_a_cpu(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = dataclasses.replace(base.training(), device="cuda")
    monkeypatch.setattr(FidelityOptions, "training", lambda self: on_gpu)
    monkeypatch.setattr(type(on_gpu), "check", lambda self: None)
    with pytest.raises(ValueError, match="--fast-accumulation is emulated on a CPU, and --device is cuda"):
        dataclasses.replace(base, fast_accumulation=True).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"benchmark": "linear", "settings": {}, "rows": []}', "holds bench linear"),
        ('{"benchmark": "fidelity", "settings": {}, "rows": []}', "version 1, not fidelity, version 2"),
        ("[1]", "no result of bench fidelity"),
    ],
)
def test_another_file_is_not_overwritten(base: FidelityOptions, text: str, message: str) -> None:
    base.json.write_text(text)
    with pytest.raises(ValueError, match=message):
        go(base)
    assert base.json.read_text() == text


def test_a_base_in_8_bits_gives_the_weights_back(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come after it train on the same ones, and over them its adapters are measured too: there those that
    are as good as exact LoRA's have its loss, whatever the 8 bits cost the forward."""
    monkeypatch.setitem(eight_bit._LIMIT, torch.int8, 5.0)  # so coarse that it shows
    result, printed = go(base, policies=("base_dtype=int8", "exact"), together=False, json=None)
    row, exact, peft = (rows(result, policy)[0] for policy in ("base_dtype=int8", "exact", "peft"))
    theirs = peft["curve"][-1]["heldout"]
    assert exact["curve"][-1]["heldout"] == pytest.approx(theirs, rel=1e-4)
    assert "heldout_unrounded" not in exact
    assert abs(row["heldout_unrounded"] - theirs) < 0.5 * abs(row["curve"][-1]["heldout"] - theirs)
    share = (result["heldout_before"] - row["heldout_unrounded"]) / (result["heldout_before"] - theirs)
    assert entry(result, "base_dtype=int8")["recovered_unrounded"] == pytest.approx(share)
    assert entry(result, "exact")["recovered_unrounded"] is None
    assert "unrounded" in printed
