"""`bench fidelity` on a tiny LLaMA: what the file holds, what is not run twice, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import tiny_llama

import loge_kernels as loge
from loge_kernels.bench import fidelity, fidelity_report, fidelity_training
from loge_kernels.bench.commands import bench_app
from loge_kernels.bench.fidelity import FidelityOptions
from loge_kernels.bench.fidelity_policies import DEFAULTS, parse
from loge_kernels.finetune import training


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(model: Path, tmp_path: Path) -> FidelityOptions:
    """Two steps of two policies, beside exact LoRA."""
    text = tmp_path / "text.py"
    text.write_text(tiny_llama.TEXT)
    return FidelityOptions(
        policies=("svd:rank=1/4", "svd:rank=1/4,exact_every=2"),
        seeds=(0, 1),
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
        json=tmp_path / "fidelity.json",
    )


def go(options: FidelityOptions, **changes: Any) -> tuple[dict[str, Any], str]:
    """Run with `changes`; the result and the printed table."""
    printed = io.StringIO()
    quiet = Console(file=io.StringIO())
    result = fidelity.run(dataclasses.replace(options, **changes), Console(file=printed, width=200), quiet)
    return result, printed.getvalue()


def rows(result: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["policy"] == policy]


def test_what_is_measured(base: FidelityOptions) -> None:
    result, printed = go(base)
    assert base.json is not None
    assert json.loads(base.json.read_text()) == result
    assert [(row["policy"], row["seed"]) for row in result["rows"]] == [
        (policy, seed) for seed in (0, 1) for policy in ("exact", *base.policies)
    ]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["steps"] == 2
        assert [point["step"] for point in row["curve"]] == [1, 2]
        assert [len(row[name]) for name in ("losses", "cpu_seconds", "backward_seconds")] == [2, 2, 2]
        assert row["total_time"] == pytest.approx((1 + row["cost"]) / 2)
        assert row["curve"][1]["heldout"] < result["heldout_before"]
        assert row["gradient"]["layers"].keys() == {"0", "1"}
        assert row["gradient"]["all"].keys() == {"cosine", "norm_ratio"}
    exact, cheap, mixed = (rows(result, policy)[0] for policy in ("exact", *base.policies))
    assert exact["cost"] == 1.0
    assert exact["gradient"]["all"] == {"cosine": 1.0, "norm_ratio": 1.0}
    assert 0.0 < cheap["cost"] < mixed["cost"]
    assert 0.1 < cheap["gradient"]["all"]["cosine"] < 0.999
    # The top layer's o_proj, gate, up and down have little or nothing above them: its gradient is the better one.
    layers = cheap["gradient"]["layers"]
    assert layers["1"]["B"]["cosine"] > layers["0"]["B"]["cosine"]
    # The gradient of a cheap step, whatever the schedule makes of the first one.
    assert mixed["gradient"]["all"] == pytest.approx(cheap["gradient"]["all"], rel=1e-4)
    assert all(math.isclose(row["losses"][0], exact["losses"][0], rel_tol=1e-5) for row in (cheap, mixed))
    assert rows(result, "exact")[1]["losses"][0] != exact["losses"][0]
    (summary,) = [entry for entry in result["summary"] if entry["policy"] == "svd:rank=1/4"]
    gains = [
        (result["heldout_before"] - rows(result, "svd:rank=1/4")[seed]["curve"][-1]["heldout"])
        / (result["heldout_before"] - rows(result, "exact")[seed]["curve"][-1]["heldout"])
        for seed in (0, 1)
    ]
    assert summary["recovered"] == pytest.approx(sum(gains) / 2)
    assert (summary["recovered_min"], summary["recovered_max"]) == pytest.approx((min(gains), max(gains)))
    assert "svd:rank=1/4" in printed
    assert "recovered" in printed


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
        go(base, seeds=(0,))
    assert base.json is not None
    assert len(json.loads(base.json.read_text())["rows"]) == 2
    result, _ = go(base, seeds=(0,))
    assert ran[3:] == [ran[2]]
    ran.clear()
    again, _ = go(base, seeds=(0,))
    assert ran == []
    assert again == result
    ran.clear()
    go(base, seeds=(0,), policies=("dropped",))
    assert ran == [("dropped", 0)]
    with pytest.raises(ValueError, match=r"--steps 3: .* holds runs with 2"):
        go(base, steps=3)
    Path(base.text[0]).write_text(tiny_llama.TEXT.replace("x", "z"))
    with pytest.raises(ValueError, match="the text has changed"):
        go(base, seeds=(1,))


def test_two_processes_share_a_file(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fidelity_training.Workbench.run
    ran: list[tuple[str, int]] = []

    def beside_another(self: Any, policies: Any, seed: int, checkpoints: Any) -> list[dict[str, Any]]:
        ran.extend((policy.text, seed) for policy in policies)
        if len(ran) == 1:  # while the first run goes on, another process does these
            go(base, seeds=(0, 1), policies=("exact", base.policies[0]))
        return run(self, policies, seed, checkpoints)

    monkeypatch.setattr(fidelity_training.Workbench, "run", beside_another)
    result, _ = go(base)
    assert len(result["rows"]) == len({(row["policy"], row["seed"]) for row in result["rows"]}) == 6
    assert len(ran) == 7  # the first one twice
    assert base.json is not None
    assert json.loads(base.json.read_text()) == result


def test_a_resumed_run_is_the_same(base: FidelityOptions, tmp_path: Path) -> None:
    whole, _ = go(base, seeds=(0,))
    go(base, seeds=(0,), policies=("exact",), json=tmp_path / "parts.json")
    parts, _ = go(base, seeds=(0,), json=tmp_path / "parts.json")
    for ours, theirs in zip(parts["rows"], whole["rows"], strict=True):
        for name in ("losses", "gradient"):
            assert ours[name] == theirs[name], (ours["policy"], name)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_control_with_fewer_steps(base: FidelityOptions, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    trained = training.Trainer.step

    def noting(self: Any) -> None:
        trained(self)
        rates.append(self._optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(training.Trainer, "step", noting)
    result, _ = go(base, seeds=(0,), steps=4, policies=("exact:cost=0.1",), schedule=schedule)
    (exact,), (control,) = rows(result, "exact"), rows(result, "exact:cost=0.1")
    assert control["steps"] == len(control["losses"]) == 2
    assert control["total_time"] == 0.5
    assert control["curve"][-1]["step"] == 2
    if schedule == "constant":
        # Three steps before the gradient, four of exact LoRA; the control is the first half of that run.
        assert rates == [base.lr] * 7
        assert control["losses"] == exact["losses"][:2]
        assert control["curve"][-1] in exact["curve"]
    else:
        shape = [0.5 * (1 + math.cos(math.pi * part)) for part in (0, 1 / 4, 2 / 4, 3 / 4, 0, 1 / 2)]
        assert rates == pytest.approx([base.lr] * 3 + [base.lr * share for share in shape])
        assert control["losses"][0] == exact["losses"][0]


def test_a_longer_run_goes_on_where_the_others_end(base: FidelityOptions) -> None:
    result, _ = go(base, seeds=(0,), policies=("exact:steps=2", "svd:rank=1/4,steps=1.5"))
    exact, longer, cheap = result["rows"]
    assert (longer["steps"], longer["total_time"]) == (4, 2.0)
    assert longer["losses"][:2] == exact["losses"]
    assert [point["step"] for point in longer["curve"]] == [1, 2, 4]
    assert cheap["steps"] == 3
    assert cheap["total_time"] == pytest.approx(1.5 * (1 + cheap["cost"]) / 2)
    found = {entry["policy"]: (entry["reaches"], entry["reached_by"]) for entry in result["summary"]}
    assert found["exact"] == found["exact:steps=2"] == (1.0, 1)


def test_when_a_run_reaches_the_last_loss_of_exact_lora(base: FidelityOptions) -> None:
    result, _ = go(base, seeds=(0,), policies=("svd:rank=1/4",))
    exact, cheap = result["rows"]
    exact["curve"][-1]["heldout"] = 1.0
    for losses, expected in (((0.9, 0.8), 0.5), ((1.1, 1.0), 1.0), ((1.1, 1.01), None)):
        cheap["curve"] = [{"step": step, "heldout": loss} for step, loss in enumerate(losses, 1)]
        found = fidelity_report.reaches(cheap, result)
        assert found == (None if expected is None else pytest.approx(expected * (1 + cheap["cost"]) / 2))


def test_taking_turns_changes_nothing_but_the_seconds(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, _ = go(base, policies=(*base.policies, "svd:rank=1/4,steps=1.5"))
    order: list[int] = []
    trained = training.Trainer.step

    def noting(self: Any) -> None:
        order.append(id(self))
        trained(self)

    monkeypatch.setattr(training.Trainer, "step", noting)
    together, _ = go(base, policies=(*base.policies, "svd:rank=1/4,steps=1.5"), together=True, json=None)
    for ours, theirs in zip(together["rows"], apart["rows"], strict=True):
        for name in ("policy", "seed", "losses", "gradient", "cost", "total_time"):
            assert ours[name] == theirs[name], (ours["policy"], name)
        assert (ours["together"], theirs["together"]) == (True, False)
    # After three steps before the gradient: every policy once, then in the opposite order, then who is left.
    turns = order[3 : len(order) // 2]
    assert len(set(turns[:4])) == 4
    assert turns[4:8] == turns[:4][::-1]
    assert len(turns) == 9


def test_warmup(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fidelity_training.Workbench(base.training(), "constant", 1, 2, 2, 1, Console(file=io.StringIO()))
    bench.options = dataclasses.replace(bench.options, steps=8)
    bench._warmup = 4
    assert [bench._rate(step, 8) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [bench._rate(step, 4) for step in range(3)] == [0.5, 1.0, 1.0]


def test_text_is_kept_apart(base: FidelityOptions) -> None:
    bench = fidelity_training.Workbench(base.training(), "constant", 0, 2, 2, 1, Console(file=io.StringIO()))
    parts = [{tuple(row.tolist()) for row in part} for part in (bench.train, bench.heldout, bench.calibration)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert not torch.equal(bench.corpus(0).order, bench.corpus(1).order)


def test_a_run_that_diverges_is_told_and_the_rest_goes_on(
    base: FidelityOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = fidelity_training.heldout_loss
    values = iter([False, False, False, True])  # before; exact LoRA's two; the policy's first

    def sometimes(*arguments: Any) -> float | None:
        return math.nan if next(values, False) else losses(*arguments)

    monkeypatch.setattr(fidelity_training, "heldout_loss", sometimes)
    result, printed = go(base, seeds=(0,))
    cheap, mixed = (rows(result, policy)[0] for policy in base.policies)
    assert cheap["status"] == "diverged"
    assert "step 1" in cheap["note"]
    assert cheap["curve"] == []
    assert mixed["status"] == "ok"
    assert "1 diverged" in printed
    assert next(entry for entry in result["summary"] if entry["policy"] == cheap["policy"])["recovered"] is None


def test_plot(base: FidelityOptions, tmp_path: Path) -> None:
    png = tmp_path / "deep" / "fidelity.png"
    go(base, png=png, policies=("svd:rank=1/4", "svd:rank=1/2", "exact:cost=0.1"))
    assert png.read_bytes().startswith(b"\x89PNG")


def test_csv(base: FidelityOptions, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "fidelity.csv"
    result, _ = go(base, csv=path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["policy"] for line in lines] == [entry["policy"] for entry in result["summary"]]
    for line, entry in zip(lines, result["summary"], strict=True):
        assert line["seeds"] == "0 1"
        assert float(line["recovered"]) == entry["recovered"]
        assert (line["lora_rank"], line["model"]) == ("4", result["model"])
        assert line["device"] == result["environment"]["device"]
        assert line["version_torch"] == torch.__version__
    assert "csv" not in result["settings"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=f"cannot write {path.parent}"):
        go(base, csv=path.parent)


def test_every_option_of_the_command_arrives(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FidelityOptions] = []
    monkeypatch.setattr(fidelity, "run", seen.append)
    asked = ["fidelity", "--csv", "a.csv", "--json", "b.json", "--png", "c.png", "--seed", "3", "--steps", "7"]
    assert CliRunner().invoke(bench_app, asked).exit_code == 0
    assert seen == [FidelityOptions(csv=Path("a.csv"), json=Path("b.json"), png=Path("c.png"), seeds=(3,), steps=7)]


def test_control_of_the_summary() -> None:
    points = [(0.5, 0.6), (0.75, 0.8), (1.0, 1.0)]
    assert fidelity_report._interpolated(points, 0.625) == pytest.approx(0.7)
    assert fidelity_report._interpolated(points, 1.0) == 1.0
    assert fidelity_report._interpolated(points, 0.4) is None


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


# Policies as typed


def test_policies() -> None:
    policy = parse("gradient: rank=1/8, exact_every=4, correction=none")
    assert policy.text == "gradient:rank=1/8,exact_every=4,correction=none"
    assert policy.arguments == {"subspace": "gradient", "rank": 0.125, "exact_every": 4, "correction": None}
    assert policy.calibration == "statistics"
    assert policy.applied
    assert parse("salience:rank=64").calibration == "scores"
    assert parse("svd:low_rank_dtype=int8").arguments == {"subspace": "svd", "low_rank_dtype": "int8"}
    assert parse("budget=0.35").arguments == {"budget": 0.35}
    assert parse("budget=0.35,calibration=statistics").calibration == "statistics"
    assert parse("int8").arguments == {"exact_every": 1, "exact_dtype": "int8"}
    assert not parse("exact").applied
    control = parse("exact:cost=0.35")
    assert not control.applied
    assert control.steps(50) == 34
    assert [parse(text).family for text in ("svd:rank=1/8", "budget=0.2", "exact:cost=0.2", "exact", "int8")] == [
        "svd",
        "budget",
        "exact, fewer steps",
        "exact",
        "int8",
    ]
    assert len({parse(text).text for text in DEFAULTS}) == len(DEFAULTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("svg:rank=1/8", ["'svg' is unknown", "svd", "gradient"]),
        ("", ["unknown"]),
        ("svd:rank", ["'rank' is not of the form name=value"]),
        ("svd:ranks=1/8", ["'ranks' is no argument of apply", "rank"]),
        ("exact:rank=1/8", ["exact LoRA takes cost="]),
        ("exact:cost=0.3,steps=2", ["exact LoRA takes cost="]),
        ("svd:rank=1/8,steps=3", ["steps=3", "(0, 2]"]),
        ("svd:rank=1/8,steps=0", ["steps=0"]),
        ("exact:cost=2", ["cost=2"]),
        ("budget=0.3,calibration=yes", ["calibration='yes'"]),
    ],
)
def test_policies_that_cannot_be(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="--policy") as refused:
        parse(text)
    assert all(word in str(refused.value) for word in words)


def test_a_policy_that_apply_refuses_is_named(base: FidelityOptions) -> None:
    with pytest.raises(ValueError, match="--policy 'svd:rank=0': rank=0"):
        go(base, policies=("svd:rank=0",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "--seed"),
        ({"schedule": "linear"}, "--schedule 'linear': choose constant or cosine"),
        ({"warmup": 2}, "--warmup 2"),
        ({"gradient_steps": 0}, "--gradient-steps 0"),
        ({"lr": -1.0}, "--lr -1"),
        ({"heldout": 5000}, "5000"),
    ],
)
def test_options_that_cannot_be(base: FidelityOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        go(base, **changes)


def test_another_file_is_not_overwritten(base: FidelityOptions) -> None:
    assert base.json is not None
    base.json.write_text('{"benchmark": "linear"}')
    with pytest.raises(ValueError, match="no result of bench fidelity"):
        go(base)
    assert base.json.read_text() == '{"benchmark": "linear"}'


def test_calibrated_policies(base: FidelityOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    calibrate = loge.calibrate

    def noting(model: Any, batches: Any, **options: Any) -> Any:
        seen.append((options["scores"], sum(len(batch["input_ids"]) for batch in batches)))
        assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)
        return calibrate(model, batches, **options)

    monkeypatch.setattr(loge, "calibrate", noting)
    result, _ = go(base, policies=("gradient:rank=1/4", "gradient:rank=1/2", "salience:rank=1/4"))
    assert seen == [(False, base.calibration), (True, base.calibration)]  # once for all ranks and seeds
    assert result["calibration_seconds"].keys() == {"statistics", "scores"}
    quarter, half = (rows(result, f"gradient:rank={rank}")[0]["gradient"]["all"]["cosine"] for rank in ("1/4", "1/2"))
    assert 0.1 < quarter < half < 1.0
