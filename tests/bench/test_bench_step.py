"""`bench step`: policies side by side, their gate, and the step on paper."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loge_kernels.bench.commands import bench_app
from loge_kernels.bench.measure.roofline import Ceilings
from loge_kernels.bench.paper import run as on_paper
from loge_kernels.bench.policies import parse, parse_all
from loge_kernels.bench.step import run as step
from loge_kernels.bench.step import trainer as step_trainer

SMALL = step.StepOptions(
    hidden=64,
    intermediate=96,
    layers=2,
    heads=2,
    vocab=64,
    batch=2,
    seq=16,
    lora_rank=4,
    policies=("exact_dtype=int8", "rank=16,exact_every=2"),
    dtypes=("float32",),
    device="cpu",
    budget=0.01,
)
# Per layer: 16 (N + K) of four 64x64 and three 64x96 matrices, in float32.
FACTORS = 2 * 16 * (4 * 128 + 3 * 160) * 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured that a test does not ask for: tests/test_bench.py measures it."""
    ceilings = Ceilings("float32", copy=1e10, matmul=1e11, plain_nn=1e11, plain_nt=1e11)
    monkeypatch.setattr(step, "measure_ceilings", lambda device, dtype: ceilings)
    monkeypatch.setattr(step, "with_peak_memory", lambda call, device: (call(), 1))


def run(**changes: Any) -> tuple[dict[str, Any], str]:
    """The report and what was printed."""
    printed = io.StringIO()
    report = step.run(replace(SMALL, **changes), Console(file=printed, width=80))
    return report, printed.getvalue()


@pytest.mark.slow
def test_the_rivals_are_always_there(tmp_path: Path) -> None:
    report, printed = run(json=tmp_path / "step.json", checkpointing="both", slow_limit=1e9)
    assert report["passed"] is True, printed
    policies = ["peft", "exact", *SMALL.policies]
    assert [(row["policy"], row["checkpointing"]) for row in report["rows"]] == [
        (policy, again) for again in (False, True) for policy in policies
    ]
    for row in report["rows"]:
        assert row["status"] == "ok"
        assert row["speedup"].keys() == row["cpu_speedup"].keys() == set(policies) - {row["policy"]}
        assert row["cpu_seconds"] > 0
        assert row["phases"].keys() == {"forward", "backward", "optimizer"}
        assert row["peak_bytes"] == 1
    peft, exact, eight_bits, low_rank = report["rows"][:4]
    assert (peft["held_bytes"], exact["held_bytes"], low_rank["held_bytes"]) == (0, 0, FACTORS)
    # A byte for each weight and a scale for each column.
    assert eight_bits["held_bytes"] == 2 * (4 * 64 * 64 + 3 * 64 * 96) + 4 * 2 * (6 * 64 + 96)
    assert "dX: 14 in int8" in eight_bits["layers"]
    assert peft["loss"] == pytest.approx(low_rank["loss"])
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == report["rows"]


def test_policies_share_the_frozen_weights() -> None:
    policies = parse_all(("peft", "apply", "random:rank=16"))
    trainers = step_trainer.build(SMALL, policies, torch.float32, False, torch.device("cpu"))
    weights = [
        {name: p.data_ptr() for name, p in t.model.named_parameters() if not p.requires_grad} for t in trainers.values()
    ]
    assert weights[0] == weights[1] == weights[2]
    adapters = [{p.data_ptr() for p in t.adapters.values()} for t in trainers.values()]
    assert not adapters[0] & adapters[2]


def test_with_exact_steps_in_turn_a_run_is_one_of_each() -> None:
    trainers = step_trainer.build(SMALL, [parse("rank=16,exact_every=3")], torch.float32, False, torch.device("cpu"))
    (trainer,) = trainers.values()
    counter = next(m.exact_every for m in trainer.model.modules() if getattr(m, "exact_every", None) is not None)
    kinds = []
    take = trainer.step
    trainer.step = lambda: (take(), kinds.append(counter.exact))[0]  # type: ignore[method-assign, func-returns-value]
    trainer.run()
    trainer.run()
    assert kinds == [True, False, False] * 2


@pytest.mark.parametrize("where", ["layers.1.mlp.down_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"])
def test_a_wrong_step_gets_no_figure(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> dict[str, step_trainer.Trainer]:
        trainers = step_trainer.build(*arguments)
        for name, trainer in trainers.items():
            for key, parameter in trainer.adapters.items():
                if where in key and name != "peft":
                    parameter.register_hook(lambda gradient: 1.3 * gradient)
        return trainers

    monkeypatch.setattr(step, "build", wrong)
    report, printed = run()
    assert report["passed"] is False
    # What is wrong below the first product that a low-rank policy approximates, only exact ones can show.
    low_rank = "ok" if "layers.0" in where else "wrong result"
    assert [row["status"] for row in report["rows"]] == ["ok", "wrong result", "wrong result", low_rank]
    assert report["rows"][1]["speedup"] == {}
    assert f"gradient of base_model.model.model.{where}" in printed


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (2.0, "wrong result")])
def test_a_forward_in_8_bits_may_differ_and_not_by_all(
    factor: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(*arguments: Any) -> dict[str, step_trainer.Trainer]:
        trainers = step_trainer.build(*arguments)
        for name, trainer in trainers.items():
            for key, parameter in trainer.adapters.items():
                if name.startswith("base") and "layers.1.mlp.down_proj.lora_A" in key:
                    parameter.register_hook(lambda gradient: factor * gradient)
        return trainers

    monkeypatch.setattr(step, "build", scaled)
    report, _ = run(policies=("base_dtype=int8", "base_dtype=float8"), dtypes=("bfloat16",))
    assert [row["status"] for row in report["rows"]] == ["ok", "ok", status, status]


def test_4_bits_are_not_held_to_the_exact_gradient() -> None:
    report, _ = run(policies=("exact_dtype=nvfp4",))
    assert [row["status"] for row in report["rows"]] == ["ok", "ok", "ok"]


def test_peft_is_left_out_where_it_would_take_too_long() -> None:
    report, printed = run(slow_limit=1e-12, policies=("apply",))
    assert [row["status"] for row in report["rows"]] == ["not run", "ok", "ok"]
    assert "over the limit" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "hidden must be a multiple"),
        ({"layers": 0}, "layers=0"),
        ({"policies": ("adam",)}, "--policy 'adam': 'adam' is unknown"),
        ({"policies": ("rank=0",)}, "--policy 'rank=0': rank=0"),
        ({"dtypes": ("int8",)}, "dtype='int8'"),
        ({"slow_limit": -1.0}, "slow_limit"),
        ({"checkpointing": "maybe"}, "checkpointing='maybe'"),
        ({"on_paper": "V100"}, "gpu='V100'"),
        ({"on_paper": "H100", "model": "GPT-2"}, "model='GPT-2'"),
        ({"on_paper": "H100", "policies": ("rank=16,residual=0.1",)}, "a step on paper has no residual="),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_on_paper(tmp_path: Path) -> None:
    asked = ["--policy", "peft", "--policy", "apply", "--policy", "rank=1/8,exact_layers=0.5", "--json"]
    arguments = ["step", "--on-paper", "H100", "--model", "llama-3-8b", *asked, str(tmp_path / "paper.json")]
    done = CliRunner().invoke(bench_app, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "Predicted, not measured" in done.output
    report = json.loads((tmp_path / "paper.json").read_text())
    assert (report["tokens"], report["sequences"]) == (8192, 2)
    rows = {row["policy"]["name"]: row for row in report["rows"]}
    assert rows.keys() == {"peft", "apply", "rank=1/8,exact_layers=0.5"}
    assert rows["apply"]["milliseconds"] == 1e3 * on_paper.step_seconds(parse("apply").on_paper(), "H100", "LLaMA-3-8B")
    assert rows["apply"]["speedup"] > 1.1
