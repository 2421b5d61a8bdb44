"""`ExactEvery`: how many forwards are exact, and where it counts. Larger loops, and forwards that do not count:
`test_kinds`; copies: `test_copies`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loge_kernels as loge


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.projection = nn.ModuleDict({"out": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.projection["out"](self.backbone(x))


def applied(every: int = 2, **options: Any) -> Any:
    model = Model().requires_grad_(False)
    loge.apply(model, 2, exact_every=every, exact_dtype=None, **options)
    return model


def kinds(model: Any, count: int) -> str:
    """Of so many training forwards, by their gradients: "e" exact, "l" low-rank."""
    weights = [layer.weight for layer in (*model.backbone.layers, model.projection["out"])]
    found = ""
    for _ in range(count):
        x, dy = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
        model(x).backward(dy)
        found += "e" if torch.allclose(x.grad, dy @ weights[2] @ weights[1] @ weights[0], atol=1e-5) else "l"
    return found


@pytest.mark.parametrize(("every", "expected"), [(2, "elelele"), (3, "ellelle"), (1, "eee")])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_one_forward_in_so_many(every: int, expected: str, reentrant: bool | None) -> None:
    """What a checkpoint computes again in backward is no forward, and has the kind of its own."""
    model = applied(every)
    model.backbone.reentrant = reentrant
    assert kinds(model, len(expected)) == expected


@pytest.mark.parametrize(
    ("targets", "place"),
    [
        (None, ""),
        (["layers.0", "layers.1"], "backbone"),
        (["layers.1"], "backbone"),  # not the layer, which lies in a list
        (["out"], ""),
    ],
)
def test_the_hook_lies_on_the_innermost_module_above_any_list(targets: list[str] | None, place: str) -> None:
    model = applied(targets=targets)
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert hooked == [place]
    counters = {id(module.exact_every) for module in model.modules() if isinstance(module, loge.LoGELinear)}
    assert counters == {id(hook) for hook in model.get_submodule(place)._forward_pre_hooks.values()}
    inner: Any = nn.Sequential(nn.Sequential(nn.Linear(8, 8))).requires_grad_(False)
    loge.apply(inner, 2, exact_every=2)
    assert [name for name, module in inner.named_modules() if module._forward_pre_hooks] == ["0.0"]


def test_remove_takes_it_away_and_no_hook_of_the_users() -> None:
    model = applied()
    model.register_forward_pre_hook(lambda module, args: None)
    loge.remove(model)
    assert len(model._forward_pre_hooks) == 1
    assert kinds(model, 3) == "eee"
    loge.apply(model, 2, exact_every=3, exact_dtype=None)
    assert kinds(model, 4) == "elle"
