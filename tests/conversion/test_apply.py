"""`apply` and `remove` on models without PEFT."""

from __future__ import annotations

import math
import types
from functools import partial
from typing import Any

import models
import pytest
import torch
from models import LINEARS, assert_close, gradients, llama, modules_of, stand_ins, tokens, use_surrogate
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import LoGELinear

RANK = 0.25


def frozen_llama(**options: Any) -> nn.Module:
    """Only embeddings and norms train: every linear layer is frozen, and gradients pass through all of them."""
    model = llama(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" not in name and "lm_head" not in name)
    return model


class Quantised(nn.Linear):
    """Stands for bitsandbytes' and others' subclasses of nn.Linear."""


def stack() -> nn.Sequential:
    """A trainable lower part under frozen layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 48, bias=False))
    model[2].requires_grad_(False)
    model[4].requires_grad_(False)
    return model


def stack_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(torch.ones(3, 40)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_trainable_lower_part_under_frozen_layers() -> None:
    model, other = stack(), stack()
    report = loge.apply(model, RANK)
    assert [(row.name, row.path) for row in report.layers] == [("0", "skipped"), ("2", "plain"), ("4", "plain")]
    assert "trainable" in report.layers[0].reason
    assert type(model[0]) is nn.Linear
    use_surrogate(other, stand_ins(other, ["2", "4"], RANK))
    got = stack_gradients(model)
    assert set(got) == {"0.weight", "0.bias"}
    assert_close(got, stack_gradients(other))


def test_llama_gradients_are_those_of_the_surrogate() -> None:
    model, other = frozen_llama(), frozen_llama()
    report = loge.apply(model, RANK)
    names = [row.name for row in report.layers if row.path == "plain"]
    assert len(names) == 14
    assert torch.equal(models.logits(model), models.logits(other))
    use_surrogate(other, stand_ins(other, names, RANK))
    assert_close(gradients(model), gradients(other))


def test_rows_of_the_report() -> None:
    model = frozen_llama()
    rows = {row.name: row for row in loge.apply(model, RANK).layers}
    assert len(rows) == 15
    q = rows["model.layers.0.self_attn.q_proj"]
    s = torch.linalg.svdvals(model.get_submodule(q.name).weight)
    assert (q.shape, q.rank, q.dx, q.path, q.reason) == ((64, 64), 16, "rank 16", "plain", "")
    assert q.energy == pytest.approx((s[:16].square().sum() / s.square().sum()).item(), rel=1e-4)
    assert q.flops_saved == pytest.approx(1 - 16 * 128 / 64**2)
    assert rows["model.layers.1.mlp.down_proj"].flops_saved == pytest.approx(1 - 16 * 160 / (64 * 96))
    # 16 (32 + 64) of 32 x 64
    assert rows["model.layers.0.self_attn.k_proj"].flops_saved == pytest.approx(0.25)
    head = rows["lm_head"]
    assert (head.path, head.dx, head.rank, head.energy, head.flops_saved) == ("skipped", "-", None, None, 0.0)
    assert "output head" in head.reason


def test_exact_is_the_default() -> None:
    model = frozen_llama()
    expected = gradients(model)
    report = loge.apply(model, exact_dtype=None)
    assert {(row.path, row.dx, row.rank) for row in report.converted} == {("plain", "float32", None)}
    assert (len(report.converted), report.flops_saved, report.exact_every) == (14, 0.0, None)
    assert_close(gradients(model), expected)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize(("int8", "dx"), [(True, "int8"), (False, "float32")])
def test_exact_products_run_in_8_bits_where_that_is_faster(
    int8: bool, dx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loge_kernels.conversion.exact_dtype.cpu_multiplies_int8", lambda: int8)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 64)).requires_grad_(False)
    rows = loge.apply(model).layers
    assert [row.dx for row in rows] == [dx, "float32"]
    words = ["faster", "small"] if int8 else ["no int8 products"] * 2
    assert all(word in row.reason for word, row in zip(words, rows, strict=True))
    # A layer whose dX is never exact has no use for a copy.
    loge.remove(model)
    loge.apply(model, 16)
    assert model[0].exact_dtype is None
    loge.remove(model)
    loge.apply(model, 16, exact_every=2)
    assert model[0].exact_dtype == ("int8" if int8 else None)


@pytest.mark.parametrize("rank", [1.0, 10_000, 0.75])
def test_dense_where_that_is_cheaper(rank: int | float) -> None:
    model = frozen_llama()
    expected = gradients(model)
    report = loge.apply(model, rank, exact_dtype=None)
    (row,) = [row for row in report.layers if row.name.endswith("0.mlp.up_proj")]
    assert "38" in row.reason  # 96 * 64 / 160: where both cost the same
    assert {(row.path, row.dx, row.rank) for row in report.converted} == {("plain", "float32", None)}
    assert_close(gradients(model), expected)


UPPER = "model.layers.1"


@pytest.mark.parametrize(
    ("share", "exact"),
    [
        (0, []),
        (0.3, [f"{UPPER}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]),
        (0.5, [f"{UPPER}.{'mlp' if name in LINEARS[4:] else 'self_attn'}.{name}" for name in LINEARS]),
        (1.0, None),
    ],
)
def test_layers_near_the_output_stay_exact(share: float, exact: list[str] | None) -> None:
    """The share is one of the weights' numbers: the upper MLP holds 0.3 of them, the upper layer one half."""
    model, other = frozen_llama(), frozen_llama()
    report = loge.apply(model, RANK, exact_layers=share, exact_dtype=None)
    found = [row.name for row in report.converted if row.dx == "float32"]
    below = [row.name for row in report.converted if row.dx == "rank 16"]
    assert len(found) + len(below) == 14
    assert found == exact or (exact is None and not below)
    kinds = [f"{len(names)} in {dx}" for dx, names in (("rank 16", below), ("float32", found)) if names]
    assert "; dX: " + ", ".join(kinds) in report.summary()
    use_surrogate(other, stand_ins(other, below, RANK))
    assert_close(gradients(model), gradients(other))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (("0.self_attn.v_proj",), ["model.layers.0.self_attn.v_proj"]),
        (r".*layers\.1\.self_attn\.[qk]_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        (["lm_head"], ["lm_head"]),
        ("all-linear", None),
    ],
)
def test_targets(targets: Any, expected: list[str] | None) -> None:
    model = frozen_llama()
    report = loge.apply(model, 16, targets=targets)
    names = [row.name for row in report.converted]
    assert names == expected or (expected is None and len(names) == 2 * len(LINEARS))
    assert modules_of(model, LoGELinear) == names


def test_a_named_trainable_layer_is_converted() -> None:
    model = stack()
    report = loge.apply(model, RANK, targets=["0"])
    assert [(row.name, row.path) for row in report.layers] == [("0", "plain")]
    assert set(stack_gradients(model)) == {"0.weight", "0.bias"}


def test_a_tied_head_stays_exact() -> None:
    model = llama(tied=True)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    report = loge.apply(model, RANK)
    (row,) = [row for row in report.layers if row.name == "lm_head"]
    assert row.path == "skipped"
    assert "output head" in row.reason
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_layers_that_cannot_be_converted_are_left_alone() -> None:
    model = stack()
    model.append(Quantised(48, 64)).append(LoGELinear(64, 64)).append(nn.Linear(64, 64, device="meta"))
    model.append(nn.Linear(64, 64))
    model[8].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    model[2].forward = model[2].forward  # as offloading hooks do: the instance's own forward wins over the class's
    model.requires_grad_(False)
    rows = {row.name: row for row in loge.apply(model, RANK).layers}
    assert {name: row.path for name, row in rows.items()} == {
        **dict.fromkeys("04", "plain"),
        **dict.fromkeys("25678", "skipped"),
    }
    reasons = {"2": "forward", "5": "Quantised", "6": "LoGELinear of its own", "7": "meta", "8": "int8"}
    assert all(part in rows[name].reason for name, part in reasons.items())
    assert type(model[5]) is Quantised
    loge.remove(model)
    assert type(model[6]) is LoGELinear


def test_options_reach_every_layer() -> None:
    model = frozen_llama()
    expected = gradients(model)
    options = {"residual": 0.1, "low_rank_dtype": "int8", "exact_dtype": None}
    loge.apply(model, RANK, subspace="svd", exact_fraction=1.0, backend="reference", **options)
    layers = [model.get_submodule(name) for name in modules_of(model, LoGELinear)]
    assert {(layer.exact_fraction, layer.backend, layer.factors.low_rank_dtype) for layer in layers} == {
        (1.0, "reference", "int8")
    }
    assert all(layer.factors.rows.numel() == math.ceil(0.1 * layer.out_features) for layer in layers)
    assert_close(gradients(model), expected)


def test_names_state_and_hooks_stay() -> None:
    model = frozen_llama()
    seen: list[str] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, trainable = ([*dict(model.named_modules())], [(n, p.requires_grad) for n, p in model.named_parameters()])
    loge.apply(model, RANK, exact_every=2)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert [*dict(model.named_modules())] == modules  # factors are no modules, parameters or buffers
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == trainable
    gradients(model)
    assert seen == ["hook"]
    model.load_state_dict(before, strict=True)


def kept(model: nn.Module) -> Any:
    """What `apply` may change, and a failed one or `remove` must give back."""
    found = {name: (type(m), set(vars(m)), [*m._forward_pre_hooks]) for name, m in model.named_modules()}
    return found, [(name, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("options", [{}, {"rank": RANK, "exact_every": 2, "exact_layers": 0.5}], ids=str)
def test_remove_gives_back_what_was_there(options: dict[str, Any]) -> None:
    model = frozen_llama()
    before, expected = kept(model), gradients(model)
    loge.apply(model, **options)
    for _ in range(3):
        gradients(model)
    assert kept(model) != before
    loge.remove(model)
    assert kept(model) == before
    assert_close(gradients(model), expected, 0.0)
    loge.remove(model)
    loge.apply(model, RANK)
    models.assert_differ(gradients(model), expected)


def test_a_ddp_wrapper_is_looked_through() -> None:
    model = llama()
    model.requires_grad_(False)
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)  # without processes
    nn.Module.__init__(wrapper)
    wrapper.module, wrapper.process_group = model, None
    rows = {row.name: row.path for row in loge.apply(wrapper, 16).layers}
    assert rows["lm_head"] == "skipped"
    assert rows["model.layers.0.self_attn.q_proj"] == "plain"
    loge.remove(wrapper)
    assert not any(isinstance(module, loge.LoGELinear) for module in model.modules())


def test_a_second_model_starts_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = loge.apply(frozen_llama(), RANK)
    monkeypatch.setattr("loge_kernels.factors.cache.factorize", lambda *_: pytest.fail("factorised again"))
    assert loge.apply(frozen_llama(), RANK) == first


# What cannot be done

BATCHES = [{"input_ids": tokens(), "labels": tokens()}]
LOW = {"rank": 16}


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"rank": 0}, ValueError, ["rank=0", "int from 1", "(0, 1]"]),
        ({"rank": -3}, ValueError, ["rank=-3", "int from 1"]),
        ({"rank": 1.5}, ValueError, ["rank=1.5", "(0, 1]"]),
        ({"rank": math.nan}, ValueError, ["rank=nan", "(0, 1]"]),
        ({"rank": True}, TypeError, ["rank=True", "int, or a float"]),
        ({"rank": "1/8"}, TypeError, ["rank='1/8'", "str", "int, or a float"]),
        ({**LOW, "subspace": "pca"}, ValueError, ["subspace='pca'", "'svd', 'gradient', 'salience'"]),
        ({**LOW, "subspace": "gradient"}, ValueError, ["subspace='gradient'", "calibration=", "calibrate("]),
        ({**LOW, "subspace": "svd", "calibration": BATCHES}, ValueError, ["calibration", "'gradient'", "'svd'"]),
        ({**LOW, "calibration": 3}, TypeError, ["calibration=3", "int", "batches"]),
        ({**LOW, "calibration": []}, ValueError, ["batches is empty", "calibrate"]),
        ({**LOW, "salience": "size"}, ValueError, ["salience='size'", "'taylor'"]),
        ({**LOW, "exact_layers": 1.5}, ValueError, ["exact_layers=1.5", "[0, 1]"]),
        ({**LOW, "exact_layers": math.nan}, ValueError, ["exact_layers=nan", "[0, 1]"]),
        ({**LOW, "exact_layers": "half"}, TypeError, ["exact_layers='half'", "str", "a number"]),
        ({**LOW, "exact_every": 0}, ValueError, ["exact_every=0", "int from 1"]),
        ({**LOW, "exact_every": 2.0}, TypeError, ["exact_every=2.0", "float", "an int"]),
        ({**LOW, "exact_every": True}, TypeError, ["exact_every=True", "bool", "an int"]),
        ({**LOW, "exact_fraction": -0.5}, ValueError, ["exact_fraction=-0.5", "[0, 1]"]),
        ({**LOW, "exact_fraction": None}, TypeError, ["exact_fraction=None", "a number"]),
        ({**LOW, "residual": 2}, ValueError, ["residual=2", "[0, 1]"]),
        ({**LOW, "residual": True}, TypeError, ["residual=True", "a number"]),
        ({**LOW, "low_rank_dtype": "auto"}, ValueError, ["low_rank_dtype='auto'", "'float8', 'int8', or None"]),
        (
            {"exact_dtype": "fp8"},
            ValueError,
            ["exact_dtype='fp8'", "'auto', 'float8', 'int8', 'nvfp4', 'mxfp4', or None"],
        ),
        ({"exact_dtype": ["int8"]}, TypeError, ["exact_dtype=['int8']", "give a string"]),
        ({"freeze_below": 0.5}, TypeError, ["freeze_below=0.5", "number of layers or a FreezePlan"]),
        ({"backend": "nope"}, ValueError, ["backend='nope'", "'reference'"]),
        # rank is None
        ({"subspace": "svd"}, ValueError, ["subspace='svd'", "rank is None", "give rank="]),
        ({"calibration": BATCHES}, ValueError, ["calibration=", "rank is None", "give rank="]),
        ({"exact_layers": 0.5}, ValueError, ["exact_layers=0.5", "rank is None", "give rank="]),
        ({"exact_every": 2}, ValueError, ["exact_every=2", "rank is None", "give rank="]),
        ({"low_rank_dtype": "int8"}, ValueError, ["low_rank_dtype='int8'", "rank is None", "give rank="]),
        ({"exact_fraction": 0.5}, ValueError, ["exact_fraction=0.5", "rank is None", "give rank="]),
        ({"residual": 0.1}, ValueError, ["residual=0.1", "rank is None", "give rank="]),
        # the model and its layers
        ({"targets": ["qproj"]}, ValueError, ["targets=['qproj']", "no linear layer", "layers.0.self_attn.q_proj'"]),
        ({"targets": ["proj"]}, ValueError, ["targets=['proj']", "no linear layer"]),
        ({"targets": []}, ValueError, ["targets=[]"]),
        ({"targets": "q_proj"}, ValueError, ["targets='q_proj'", "no linear layer"]),
        ({"targets": "(q"}, ValueError, ["targets='(q'", "regular expression"]),
        ({"targets": [3]}, TypeError, ["targets=[3]"]),
        ({"targets": 3}, TypeError, ["targets=", "3", "module names"]),
        ({"model": "llama"}, TypeError, ["model", "str", "torch.nn.Module"]),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, ["nothing to convert", "Sequential", "torch.nn.Linear"]),
        ({"model": nn.Sequential(nn.Linear(64, 64))}, ValueError, ["nothing to convert", "trainable", "targets"]),
        ({"model": frozen_llama().double(), "exact_dtype": "int8"}, TypeError, ["exact_dtype='int8'", "float64"]),
        (
            {"model": frozen_llama().double(), **LOW, "low_rank_dtype": "int8"},
            TypeError,
            ["low_rank_dtype='int8'", "float64", "q_proj", "None"],
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else "",
)
def test_errors_name_the_argument_and_change_nothing(
    options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    model = options.get("model") or frozen_llama()
    before = kept(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        loge.apply(**{"model": model, **options})
    assert all(part in str(caught.value) for part in parts), caught.value
    assert before is None or kept(model) == before


@pytest.mark.parametrize("options", [{}, {"rank": RANK, "exact_every": 2, "freeze_below": 1}], ids=str)
def test_a_failed_apply_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = frozen_llama()
    before, expected = kept(model), gradients(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    value = weight[5, 5].item()
    weight.data[5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj.*NaN.*unchanged"):
        loge.apply(model, **options)
    weight.data[5, 5] = value
    assert kept(model) == before
    assert_close(gradients(model), expected, 0.0)


def test_twice_raises() -> None:
    model = frozen_llama()
    loge.apply(model, RANK)
    expected = gradients(model)
    with pytest.raises(ValueError, match=r"converted already.*remove"):
        loge.apply(model, RANK)
    assert_close(gradients(model), expected, 0.0)


@pytest.mark.parametrize("home", ["unsloth.kernels.fast_lora", "axolotl.kernels.lora"])
@pytest.mark.parametrize("wrap", [lambda f, module: f, types.MethodType, lambda f, m: types.MethodType(partial(f), m)])
def test_kernels_in_the_place_of_the_layers(home: str, wrap: Any) -> None:
    """As unsloth and axolotl put them on attention and MLP modules."""

    def fused(module: nn.Module, x: Tensor) -> Tensor:
        return x

    fused.__module__ = home
    model = frozen_llama()
    attention = model.model.layers[1].self_attn
    attention.apply_qkv = wrap(fused, attention)
    with pytest.raises(ValueError, match=rf"'model.layers.1.self_attn' {home.partition('.')[0]}'s fused LoRA kernels"):
        loge.apply(model)
    assert not modules_of(model, LoGELinear)
    fused.__module__ = "unsloth.models.llama"  # what stands there calls the layers
    loge.apply(model)
