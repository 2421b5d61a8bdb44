"""Engines that take a weight apart by other rules: refused by name, before and after `apply`, or right; tensor
parallelism is in a file of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_close, gradients, lora, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import loge_kernels as loge

RANK = 16
pytestmark = pytest.mark.usefixtures("one_rank")


def mesh() -> Any:
    return init_device_mesh("cpu", (1,))


def layers_of(model: Any) -> Any:
    return model.base_model.model.model.layers


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}).requires_grad_(False)


def test_a_layer_called_beside_fsdps_forward() -> None:
    model = lora()
    loge.apply(model, RANK)
    loge.fully_shard(model, mesh=mesh())
    layer = layers_of(model)[0].mlp.up_proj.base_layer
    with pytest.raises(ValueError, match=r"DTensor with placements \(Shard\(dim=0\),\): FSDP gathers weights in the"):
        layer(torch.randn(3, 64, requires_grad=True))


def test_fsdp2_before_apply() -> None:
    model = lora()
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh())
    with pytest.raises(ValueError, match=r"is a DTensor with placements \(Shard\(dim=0\),\): apply before"):
        loge.apply(model, RANK)
    with pytest.raises(ValueError, match="in the place of torch's"):
        loge.fully_shard(model)


def test_fsdp1_before_apply() -> None:
    model: Any = FullyShardedDataParallel(lora(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"inside a sharded module \(FSDP\): apply first"):
        loge.apply(model, RANK)


def test_zero3() -> None:
    before, after = lora(), lora()
    loge.apply(after, RANK)
    for index, p in enumerate([*before.parameters(), *after.parameters()]):
        p.ds_id = index
    for p in before.parameters():  # as between forwards
        p.data = torch.empty(0, dtype=p.dtype)
    with pytest.raises(ValueError, match=r"q_proj its weight is partitioned by DeepSpeed ZeRO-3: use stage 1 or 2"):
        loge.apply(before, RANK)
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed ZeRO-3, whose backward gathers whole weights"):
        after(input_ids=tokens(), labels=tokens())


def test_one_rank_is_enough_and_remove_gives_a_sharded_peft_model() -> None:
    model, expected = lora(), lora()
    for one in (model, expected):
        loge.apply(one, RANK)
    loge.fully_shard(model, mesh=mesh())
    for _ in range(2):
        got = {name: grad.full_tensor() for name, grad in gradients(model).items()}
        assert_close(got, gradients(expected))
        for one in (model, expected):
            loge.remove(one)


def test_named_blocks() -> None:
    def stack() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        for layer in model[1:]:
            layer.requires_grad_(False)
        loge.apply(model, RANK, targets="1|2")
        return model

    model, expected = stack(), stack()
    loge.fully_shard(model, mesh=mesh(), blocks=[model[1], model[2]])
    x = torch.randn(5, 64)
    for one in (model, expected):
        one(x).square().mean().backward()
    assert_close({"w": model[0].weight.grad.full_tensor()}, {"w": expected[0].weight.grad})


@pytest.mark.parametrize("method", ["svd", "gradient"])
def test_factors_come_back_from_the_meta_device_where_the_weight_is_enough(method: str) -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"up": nn.Linear(64, 96)}).requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    loge.apply(layer, RANK)
    expected, up = layer.up.factors, layer.up
    left, right = expected.left, expected.right
    expected.method = method
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        up(x)  # an evaluation needs none
    if method == "gradient":
        with pytest.raises(ValueError, match=r"subspace='gradient' lost their values.*loading to false, or apply with"):
            up(x)
        return
    up(x).sum().backward()
    torch.testing.assert_close(x.grad, (torch.ones(3, 96) @ left) @ right)


def test_meta_weights_need_no_calibration() -> None:
    model = mlp().to("meta")
    with pytest.raises(ValueError, match=r"layer 'up' on the meta device, where .* apply without calibration"):
        loge.apply(model, RANK, calibration=[torch.ones(1)])
    loge.apply(model, RANK)
    with pytest.raises(ValueError, match="on the meta device: load the model on every rank"):
        loge.fully_shard(model)
