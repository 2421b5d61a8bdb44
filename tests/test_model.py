"""`apply` and `remove` on models without PEFT."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from models import LINEARS, assert_close, gradients, llama, modules_of, stand_ins, use_surrogate
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
    assert (q.shape, q.rank, q.path, q.reason) == ((64, 64), 16, "plain", "")
    assert q.energy == pytest.approx((s[:16].square().sum() / s.square().sum()).item(), rel=1e-4)
    assert q.flops_saved == pytest.approx(1 - 16 * 128 / 64**2)
    assert rows["model.layers.1.mlp.down_proj"].flops_saved == pytest.approx(1 - 16 * 160 / (64 * 96))
    # 16 (32 + 64) of 32 x 64
    assert rows["model.layers.0.self_attn.k_proj"].flops_saved == pytest.approx(0.25)
    head = rows["lm_head"]
    assert (head.path, head.rank, head.energy, head.flops_saved) == ("skipped", None, None, 0.0)
    assert "output head" in head.reason


@pytest.mark.parametrize("rank", [1.0, 10_000, 0.75])
def test_dense_where_that_is_cheaper(rank: int | float) -> None:
    model = frozen_llama()
    expected = gradients(model)
    report = loge.apply(model, rank)
    assert {row.path for row in report.layers} == {"exact", "skipped"}
    (row,) = [row for row in report.layers if row.name.endswith("0.mlp.up_proj")]
    assert "38" in row.reason  # 96 * 64 / 160: where both cost the same
    assert_close(gradients(model), expected)
    assert not modules_of(model, loge.Factors)


def test_an_int_rank_is_cut_to_each_layer() -> None:
    model = nn.Sequential(nn.Linear(200, 8), nn.Linear(8, 200)).requires_grad_(False)
    rows = loge.apply(model, 7).layers
    assert [row.rank for row in rows] == [7, 7]
    (row,) = loge.apply(nn.Sequential(nn.Linear(200, 8)).requires_grad_(False), 30).layers
    assert row.path == "exact", "cut to 8, which costs more than the dense product"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (("0.self_attn.v_proj",), ["model.layers.0.self_attn.v_proj"]),
        (r".*layers\.1\.self_attn\.[qk]_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    model = frozen_llama()
    report = loge.apply(model, 16, targets=targets)
    assert [row.name for row in report.layers] == expected
    assert modules_of(model, LoGELinear) == expected


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_all_linear_is_the_default(targets: str | None) -> None:
    model = frozen_llama()
    loge.apply(model, RANK, targets=targets)
    assert len(modules_of(model, LoGELinear)) == 2 * len(LINEARS)


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
    model.requires_grad_(False)
    rows = {row.name: row for row in loge.apply(model, RANK).layers}
    assert {name: row.path for name, row in rows.items()} == {
        **dict.fromkeys("024", "plain"),
        **dict.fromkeys("5678", "skipped"),
    }
    for name, part in (("5", "Quantised"), ("6", "LoGELinear of its own"), ("7", "meta"), ("8", "int8")):
        assert part in rows[name].reason
    assert type(model[5]) is Quantised
    loge.remove(model)
    assert type(model[6]) is LoGELinear


def test_a_replaced_forward_is_not_claimed_to_be_low_rank() -> None:
    model = stack()
    model[2].forward = model[2].forward  # as offloading hooks do: the instance's own forward wins over the class's
    rows = {row.name: row for row in loge.apply(model, RANK).layers}
    assert rows["2"].path == "skipped"
    assert "forward" in rows["2"].reason


def test_options_reach_every_layer() -> None:
    model = frozen_llama()
    expected = gradients(model)
    loge.apply(model, RANK, subspace="random", exact_fraction=1.0, backend="reference")
    layers = [model.get_submodule(name) for name in modules_of(model, LoGELinear)]
    assert {(layer.factors.method, layer.exact_fraction, layer.backend) for layer in layers} == {
        ("random", 1.0, "reference")
    }
    assert_close(gradients(model), expected)


def test_names_state_and_hooks_stay() -> None:
    model = frozen_llama()
    seen: list[str] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    loge.apply(model, RANK)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert not [name for name, _ in model.named_buffers() if "factors" in name]
    gradients(model)
    assert seen == ["hook"]
    model.load_state_dict(before, strict=True)


def test_remove_gives_back_what_was_there() -> None:
    model = frozen_llama()
    types = {name: type(module) for name, module in model.named_modules()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    before = gradients(model)
    loge.apply(model, RANK)
    models.assert_differ(gradients(model), before)
    loge.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    after = gradients(model)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    loge.remove(model)
    loge.apply(model, RANK)


def test_a_copied_model_is_its_own() -> None:
    model = frozen_llama()
    loge.apply(model, RANK)
    twin = copy.deepcopy(model)
    assert_close(gradients(twin), gradients(model), 0.0)
    loge.remove(model)
    assert len(modules_of(twin, LoGELinear)) == 14
    loge.remove(twin)
    assert_close(gradients(twin), gradients(model), 0.0)


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = frozen_llama()
    loge.apply(model, RANK)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_close(gradients(model), expected, 0.0)


def test_a_second_model_starts_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = loge.apply(frozen_llama(), RANK)
    monkeypatch.setattr("loge_kernels.cache.factorize", lambda *_: pytest.fail("factorised again"))
    assert loge.apply(frozen_llama(), RANK) == first


# What cannot be done


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"rank": 0}, ValueError, ["rank=0", "int from 1", "(0, 1]"]),
        ({"rank": -3}, ValueError, ["rank=-3"]),
        ({"rank": 1.5}, ValueError, ["rank=1.5", "(0, 1]"]),
        ({"rank": True}, TypeError, ["rank=True"]),
        ({"rank": "1/8"}, TypeError, ["rank='1/8'", "str"]),
        ({"subspace": "pca"}, ValueError, ["subspace='pca'", "'svd'", "'random'"]),
        ({"subspace": "gradient"}, ValueError, ["subspace='gradient'"]),
        ({"exact_fraction": -0.5}, ValueError, ["exact_fraction=-0.5", "[0, 1]"]),
        ({"backend": "nope"}, ValueError, ["backend='nope'", "'reference'"]),
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
    ],
)
def test_errors_name_the_argument_and_change_nothing(
    options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    model = options.get("model") or frozen_llama()
    with pytest.raises(error) as caught:
        loge.apply(**{"model": model, **options})
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not isinstance(model, nn.Module) or not modules_of(model, LoGELinear)


def test_a_failed_apply_leaves_the_model_as_it_was() -> None:
    model = frozen_llama()
    before, types = gradients(model), {name: type(module) for name, module in model.named_modules()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight[5, 5].item()
    weight.data[5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj.*NaN.*unchanged"):
        loge.apply(model, RANK)
    weight.data[5, 5] = kept
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert_close(gradients(model), before, 0.0)
    loge.apply(model, RANK)


def test_twice_raises() -> None:
    model = frozen_llama()
    loge.apply(model, RANK)
    expected = gradients(model)
    with pytest.raises(ValueError, match=r"converted already.*remove"):
        loge.apply(model, RANK)
    assert_close(gradients(model), expected, 0.0)
