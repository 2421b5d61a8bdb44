"""Policies as they are typed, the controls among them, and options that are the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from models import gradients, lora, modules_of
from typer.testing import CliRunner

import loge_kernels as loge
from loge_kernels.bench import scale
from loge_kernels.bench.classify import run as classify
from loge_kernels.bench.commands import bench_app
from loge_kernels.bench.fidelity import run as fidelity
from loge_kernels.bench.paper import run as on_paper
from loge_kernels.bench.policies import argument, parse, parse_all
from loge_kernels.bench.pretrain import run as pretrain
from loge_kernels.bench.pretrain import scratch
from loge_kernels.bench.step import run as step
from loge_kernels.command_line import WHOLE, add_command
from loge_kernels.conversion import plan as planning


def test_what_is_typed() -> None:
    policy = parse("rank = 1/8, exact_layers=0.5, exact_dtype=none")
    assert policy.text == "rank=1/8,exact_layers=0.5,exact_dtype=none"
    assert policy.arguments == {"rank": 0.125, "exact_layers": 0.5, "exact_dtype": None}
    assert (policy.calibration, policy.control, policy.peft) == ("statistics", None, False)
    assert parse("rank=64,subspace=salience").calibration == "scores"
    assert parse("rank=64,subspace=svd").calibration is None
    assert parse("exact").arguments == parse("exact_dtype=None").arguments == {"exact_dtype": None}
    assert (parse("apply").arguments, parse("apply").calibration) == ({}, None)
    assert parse("peft").peft
    assert parse("rank=1/8..3/8").arguments == {"rank": (0.125, 0.375)}
    assert parse("rank=1/8..3/8").on_paper().rank == 0.25
    assert parse("peft:steps=0.7").steps(50) == 35
    assert parse("random:rank=1/8,exact_layers=0.5").arguments == {"rank": 0.125, "exact_layers": 0.5}
    assert [each.text for each in parse_all(("peft", "apply", " peft"))] == ["peft", "apply"]
    assert [argument(text) for text in ("...", "1/8..x", "..")] == ["...", "1/8..x", ".."]
    assert [argument(text) for text in ("None", "3", "1/4", "2e-1", "svd", "1/0")] == [None, 3, 0.25, 0.2, "svd", "1/0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("svg:rank=1/8", ["'svg' is unknown", "peft", "random"]),
        ("", ["unknown"]),
        ("apply:rank", ["'rank' is not of the form name=value"]),
        ("ranks=1/8", ["'ranks' is no argument of apply", "rank"]),
        ("budget=0.35", ["'budget' is no argument of apply"]),
        ("peft:rank=1/8", ["PEFT's own backward takes steps="]),
        ("rank=1/8,steps=3", ["steps=3", "(0, 2]"]),
        ("rank=1/8,steps=0", ["steps=0"]),
        ("random", ["random:rank=1/8"]),
    ],
)
def test_what_cannot_be(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="--policy") as refused:
        parse(text)
    assert all(word in str(refused.value) for word in words)


def test_on_paper_it_is_the_same_policy() -> None:
    known = parse("rank=1/8,exact_every=2,subspace=svd").on_paper()
    assert known == on_paper.PaperPolicy(known.name, exact_dtype="auto", rank=0.125, exact_every=2)
    assert parse("exact").on_paper() == on_paper.PaperPolicy("exact")
    assert parse("peft").on_paper() == on_paper.PaperPolicy("peft", peft=True)
    with pytest.raises(ValueError, match="a step on paper has no low_rank_dtype="):
        parse("rank=16,low_rank_dtype=int8").on_paper()
    half = parse("freeze_below=15").on_paper(layers=30)
    assert half == on_paper.PaperPolicy("freeze_below=15", exact_dtype="auto", frozen=0.5)
    with pytest.raises(ValueError, match="a step on paper has no freeze_below="):
        parse("freeze_below=15").on_paper()


def layers(model: Any) -> list[loge.LoGELinear]:
    return [model.get_submodule(name) for name in modules_of(model, lambda m: isinstance(m, loge.LoGELinear))]


def test_controls() -> None:
    decomposed = planning.cached_factors
    exact = gradients(lora())
    model = lora()
    report = parse("dropped").apply(model)
    assert {layer.dx for layer in report.converted} == {"rank 0"}
    assert all(layer.factors.rank == 0 for layer in layers(model))
    dropped = gradients(model)
    top = [name for name in exact if "layers.1.mlp.down_proj" in name]
    assert all(torch.allclose(dropped[name], exact[name], rtol=1e-4, atol=1e-7) for name in top)
    below = next(name for name in exact if "layers.0.mlp.up_proj.lora_B" in name)
    assert not torch.allclose(dropped[below], exact[below], rtol=0.1)
    loge.remove(model)
    torch.manual_seed(3)
    report = parse("random:rank=16,exact_layers=0.5").apply(model)
    assert {layer.dx for layer in report.converted} == {"rank 16", "float32"}
    factors = next(layer.factors for layer in layers(model) if layer.factors is not None)
    assert torch.allclose(factors.right @ factors.right.t(), torch.eye(16), atol=1e-5)
    gradients(model)
    assert planning.cached_factors is decomposed
    with pytest.raises(ValueError, match=r"--policy 'random:rank=0': rank=0"):
        parse("random:rank=0").apply(lora())
    assert planning.cached_factors is decomposed


def test_speed_takes_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(planning, "cached_factors", refuse)
    fast = parse("rank=16,subspace=salience,exact_every=2").for_speed()
    report = fast.apply(lora())
    assert report.exact_every == 2
    assert (fast.arguments, fast.calibration) == ({"rank": 16, "exact_every": 2}, None)
    assert parse("apply").for_speed() == parse("apply")


# Options


@dataclass(frozen=True, kw_only=True)
class Options:
    where: Annotated[Path, typer.Argument()]
    rank: Annotated[int | float, typer.Option("--rank", "-R", help="a rank")] = 1 / 8
    counts: Annotated[Sequence[int], typer.Option("--count", help="counts")] = (1, 2)
    words: Annotated[Sequence[str], typer.Option("--word", help="words"), WHOLE] = ()
    names: Annotated[Sequence[str], typer.Option(help="names")] = ("a",)
    files: Annotated[Sequence[Path], typer.Option(help="files")] = ()
    rates: Annotated[Mapping[str, str], typer.Option("--lr", help="rates"), dict.fromkeys] = field(default_factory=dict)
    maybe: Annotated[int | None, typer.Option(help="maybe")] = None
    flag: Annotated[bool, typer.Option("--yes/--no", help="flag")] = True
    hidden: int = 5


def command(*arguments: str, passed: bool = True) -> tuple[Any, list[Options]]:
    seen: list[Options] = []
    app = typer.Typer()
    app.callback()(lambda: None)
    add_command(app, "go", Options, lambda options: (seen.append(options), {"passed": passed})[1], "Goes.")
    return CliRunner().invoke(app, ["go", *arguments], env={"COLUMNS": "150"}), seen


def test_options_are_the_fields_of_a_dataclass() -> None:
    done, seen = command("here")
    assert (done.exit_code, seen) == (0, [Options(where=Path("here"))])
    given = "here -R 16 --count 3,4 --count 5 --word a=1,b=2 --word c --names x,y --files f --files g --lr p --maybe 3"
    _, seen = command(*given.split(), "--no")
    assert seen == [
        Options(
            where=Path("here"),
            rank=16,
            counts=(3, 4, 5),
            words=("a=1,b=2", "c"),
            names=("x", "y"),
            files=(Path("f"), Path("g")),
            rates={"p": None},  # type: ignore[dict-item]
            maybe=3,
            flag=False,
        )
    ]
    assert command("here", passed=False)[0].exit_code == 1
    for arguments, words in ((["--count", "1.5"], "--count 1.5 is not an integer"), (["-R", "x"], "--rank 'x'")):
        done, seen = command("here", *arguments)
        assert (done.exit_code, seen) == (1, [])
        assert words in done.output
    shown = command("--help")[0].output
    assert all(text in shown for text in ("Goes.", "--rank", "0.125", "1, 2", "a rank"))
    assert "hidden" not in shown


@pytest.mark.parametrize(
    ("words", "module", "options"),
    [
        (["step", "-P", "8", "--dtype", "float32"], step, step.StepOptions(lora_rank=8, dtypes=("float32",))),
        (
            ["fidelity", "--apart", "--seed", "3", "--policy", "rank=1/8,exact_every=2", "--gpu", "A100"],
            fidelity,
            fidelity.FidelityOptions(together=False, seeds=(3,), policies=("rank=1/8,exact_every=2",), gpu="A100"),
        ),
        (["scratch", "there"], scratch, scratch.ScratchOptions(out=Path("there"))),
        (
            ["scale", "LLaMA-3-8B", "--policy", "rank=64"],
            scale,
            scale.ScaleOptions(models=("LLaMA-3-8B",), policies=("rank=64",)),
        ),
        (
            ["classify", "--policy", "rank=16,exact_layers=0.5", "--policy", "freeze_below=1", "--seed", "4,5"],
            classify,
            classify.ClassifyOptions(policies=("rank=16,exact_layers=0.5", "freeze_below=1"), seeds=(4, 5)),
        ),
        (["pretrain", "--lr", "full=1e-3,2e-3"], pretrain, pretrain.PretrainOptions(rates={"full": (1e-3, 2e-3)})),
    ],
)
def test_every_command_gives_its_options(
    words: list[str], module: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    checked = module.StepOptions if module is step else type(options)
    monkeypatch.setattr(checked, "check", lambda self: seen.append(self) or (_ for _ in ()).throw(ValueError("stop")))
    done = CliRunner().invoke(bench_app, words)
    assert (done.exit_code, seen) == (1, [options]), done.output
