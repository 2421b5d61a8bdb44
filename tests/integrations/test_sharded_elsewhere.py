"""Engines that take a weight apart by other rules: refused by name, before and after `apply`, or right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_close, gradients, lora, tokens
from ranks import error_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

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


LORA = [
    *((f"{name}.base_layer", ColwiseParallel()) for name in ("self_attn.[qkv]_proj", "mlp.gate_proj", "mlp.up_proj")),
    *((f"{name}.base_layer", RowwiseParallel()) for name in ("self_attn.o_proj", "mlp.down_proj")),
]
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def test_tensor_parallel_layers_are_left_alone() -> None:
    model = parallelize_module(mlp(), mesh(), PLAN)
    with pytest.raises(ValueError, match=r"nothing to convert.*up its weight is a DTensor with placements \(Shard"):
        loge.apply(model, RANK)


@pytest.mark.parametrize("policy", [{"rank": RANK}, {}, {"exact_dtype": "int8"}])
@pytest.mark.parametrize("name", ["up", "down"])
def test_tensor_parallel_after_apply(name: str, policy: dict[str, Any]) -> None:
    model = mlp()
    loge.apply(model, **policy)
    with pytest.raises(ValueError, match=f"layer '{name}', which .* cannot be split by a tensor-parallel plan: leave"):
        parallelize_module(model, mesh(), {name: PLAN[name]})


def test_tensor_parallel_over_lora_names_the_layer() -> None:
    said = []
    for name, style in (("q_proj", ColwiseParallel()), ("o_proj", RowwiseParallel())):
        model = lora()
        loge.apply(model)
        plan = {f"base_model.model.model.layers.1.self_attn.{name}.base_layer": style}
        said.append(error_of(lambda model=model, plan=plan: parallelize_module(model, mesh(), plan)))
    model = parallelize_module(
        lora(), mesh(), {f"base_model.model.model.layers.*.{name}": style for name, style in LORA}
    )
    said.append(error_of(lambda: loge.apply(model)))
    column, row, before = said
    assert "layer 'base_model.model.model.layers.1.self_attn.q_proj', which" in column
    assert "layer 'base_model.model.model.layers.1.self_attn.o_proj', which" in row
    assert "layers.0.self_attn.q_proj its weight is a DTensor with placements (Shard(dim=0),)" in before
    assert "tensor parallelism is not supported" in before


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
