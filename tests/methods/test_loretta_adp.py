"""LoRETTA_adp as a method of PEFT, alone and under `apply`; tensor-train classifiers."""

from __future__ import annotations

import pytest
import torch
from loretta_models import ENCODERS, FAMILIES, adapted, adapters, family, gradcheck, moved, output
from peft import get_peft_model
from torch import nn

import loge_kernels as loge
from loge_kernels.methods.loretta.adp_layer import AdpLinear
from loge_kernels.methods.loretta.bottleneck import ACTIVATIONS
from loge_kernels.methods.loretta.head import RepHead, TensorTrainHead
from loge_kernels.methods.loretta.tuner import without

ADP = loge.LorettaAdpConfig(identity_start=False, bottleneck=16)


def places(model: nn.Module) -> dict[str, str]:
    """The leaves that have an adapter, and the side."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, AdpLinear)}
    return {".".join(name.split(".")[-2:]): "before" if module.before else "after" for name, module in found.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"mlp.gate_proj": "before", "mlp.up_proj": "before", "mlp.down_proj": "after"}),
        ("qwen3", {"mlp.gate_proj": "before", "mlp.up_proj": "before", "mlp.down_proj": "after"}),
        ("vit", {"mlp.fc1": "before", "mlp.fc2": "after"}),
        ("opt", {"0.fc1": "before", "0.fc2": "after", "1.fc1": "before", "1.fc2": "after"}),
        *((name, {"output.dense": "after"}) for name in ENCODERS),
    ],
)
def test_places_of_the_families(name, expected):
    model = adapted(name, ADP)
    assert places(model) == expected
    assert len(adapters(model)) == (6 if name in ("llama", "qwen3") else 4)


def test_places_of_the_user():
    layers = lambda: nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 4))  # noqa: E731
    config = {"bottleneck": 4, "tensor_rank": 2}
    model = get_peft_model(layers(), loge.LorettaAdpConfig(target_modules=["0", "2"], where="before", **config))
    assert (model.base_model.model[0].before, model.base_model.model[2].before) == (True, True)
    model = get_peft_model(layers(), loge.LorettaAdpConfig(where={"0": "after", "2": "before"}, **config))
    assert (model.base_model.model[0].before, model.base_model.model[2].before) == (False, True)
    with pytest.raises(ValueError, match=r"where=\{\} says nothing of target '0'"):
        get_peft_model(layers(), loge.LorettaAdpConfig(identity_start=False, target_modules=["0"], **config))
    with pytest.raises(ValueError, match=r"LoRETTA_adp knows no place .*'custom'.* give target_modules= and where="):
        get_peft_model(layers(), loge.LorettaAdpConfig(**config))
    with pytest.raises(ValueError, match=r"LoRETTA_rep knows no place .*'custom'.* give target_modules="):
        get_peft_model(layers(), loge.LorettaRepConfig(**config))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_adapter_is_a_residual_bottleneck(before, activation):
    base = nn.Linear(12, 18).double()
    layer = AdpLinear(base, before)
    layer.update_layer("default", loge.LorettaAdpConfig(tensor_rank=3, bottleneck=6, non_linearity=activation))
    moved(layer, 0.3)
    down, up = layer.loretta_adp_down["default"], layer.loretta_adp_up["default"]
    function = getattr(torch, activation, None) or getattr(nn.functional, activation)

    def dense(h):
        inner = function(nn.functional.linear(h, down.matrix(), down.bias))
        return h + nn.functional.linear(inner, up.matrix(), up.bias)

    x = torch.randn(5, 12, dtype=torch.float64)
    expected = base(dense(x)) if before else dense(base(x))
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - base(x)).abs().max() > 0.01


def test_gradients_of_cores_biases_and_input():
    layer = AdpLinear(nn.Linear(12, 18).double(), before=True)
    layer.update_layer("default", loge.LorettaAdpConfig(tensor_rank=2, bottleneck=4, non_linearity="tanh"))
    layer.base_layer.requires_grad_(False)
    assert gradcheck(moved(layer, 0.3), torch.randn(3, 12, dtype=torch.float64))


@pytest.mark.parametrize("name", FAMILIES)
def test_without_zeros_training_starts_near_the_base_model(name):
    base = output(family(name), name)
    assert 0 < (output(adapted(name, ADP), name) - base).norm() / base.norm() < 0.75


def test_it_cannot_be_merged():
    model = moved(adapted("llama", ADP))
    before = output(model, "llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into weights: keep the PEFT model"):
            merge()
    assert torch.equal(output(model, "llama"), before)


def test_several_adapters_follow_one_another():
    layer = AdpLinear(nn.Linear(12, 18), before=True)
    config = loge.LorettaAdpConfig(identity_start=False, tensor_rank=3, bottleneck=6)
    layer.update_layer("first", config)
    layer.update_layer("second", config)
    moved(layer, 0.3)
    x, outputs = torch.randn(2, 12), {}
    for names in (["first"], ["second"], ["first", "second"], []):
        layer.set_adapter(names)
        outputs[" ".join(names)] = layer(x)
    assert torch.equal(outputs[""], layer.base_layer(x))
    assert len({tuple(y.flatten().tolist()) for y in outputs.values()}) == 4
    layer.delete_adapter("first")
    layer.set_adapter("second")
    assert torch.equal(layer(x), outputs["second"])


# Classifiers


@pytest.mark.parametrize(
    ("name", "head", "full"),
    [
        ("deberta", "pooler.dense", "classifier"),
        ("deberta-v2", "pooler.dense", "classifier"),
        ("roberta", "classifier.dense", "classifier.out_proj"),
        ("bert", None, "classifier"),
    ],
)
@pytest.mark.parametrize("kind", ["LorettaAdpConfig", "LorettaRepConfig"])
def test_classifiers_of_the_families(name, head, full, kind):
    model = adapted(name, getattr(loge, kind)(task_type="SEQ_CLS", bottleneck=16))
    heads = [n for n, module in model.named_modules() if isinstance(module, TensorTrainHead)]
    assert heads == ([] if head is None else [f"base_model.model.{head}"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert f"base_model.model.{full}.modules_to_save.default.weight" in trained
    assert not any("original_module" in n or "base_layer" in n for n in trained)


def test_what_is_saved_beside_a_head_inside_a_saved_module():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "top": nn.ModuleDict()})
    model["top"]["first"] = nn.ModuleDict({"dense": nn.Linear(4, 4), "out": nn.Linear(4, 2), "drop": nn.Dropout()})
    model["top"]["scale"] = nn.LayerNorm(4)
    assert without(["body", "top"], ["first.dense"], model) == ["body", "top.first.out", "top.scale"]
    assert without(["top.first", "top"], ["first.dense", "scale"], model) == ["top.first.out", "top.first.out"]
    assert without(["dense"], ["first.dense"], model) == []
    assert without(["body"], [], model) == ["body"]


def test_a_head_of_the_user_and_its_merge():
    config = loge.LorettaRepConfig(classifier_modules=["score"], target_modules=["0"], task_type=None)
    model = nn.Sequential()
    model.add_module("0", nn.Linear(12, 18))
    model.add_module("score", nn.Linear(18, 2))
    weight, bias = model.score.weight.clone(), model.score.bias.clone()
    x = torch.randn(4, 12)
    adapted = moved(get_peft_model(model, config)).eval()
    layer = adapted.base_model.model.score
    cores = layer.loretta_rep_head["default"]
    assert (cores.rank, cores.bias is not None) == (2, True)
    expected = adapted(x)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(layer.base_layer.weight.data, cores.matrix())
    adapted.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(layer.base_layer.bias, bias)
    layer.base_layer.weight.data = weight + 1.0
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight + 1.0)
    torch.testing.assert_close(adapted.merge_and_unload()(x), expected)


def test_a_head_that_cannot_be_merged_is_left_as_it_was():
    layer = _head()
    weight = layer.base_layer.weight.clone()
    layer.loretta_rep_head["default"].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="would make bias of Linear not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_one_classifier_at_a_time():
    layer = _head()
    layer.update_layer("second", loge.LorettaRepConfig())
    layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        layer(torch.randn(3, 12))


def _head() -> TensorTrainHead:
    layer = RepHead(nn.Linear(12, 18))
    layer.update_layer("default", loge.LorettaRepConfig())
    return layer


# Under `apply`


@pytest.mark.parametrize(("targets", "reason"), [(None, "between the layers and the head"), (r".*", "AdpHead")])
def test_a_classifier_is_left_alone(targets, reason):
    model = adapted("deberta", loge.LorettaAdpConfig(identity_start=False, bottleneck=16, task_type="SEQ_CLS"))
    report = loge.apply(model, rank=0.25, targets=targets)
    (row,) = (row for row in report.layers if row.name.endswith("pooler.dense"))
    assert row.path == "skipped"
    assert reason in row.reason
