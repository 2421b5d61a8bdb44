"""`WeightVersion`: what it takes for a changed weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from loge_kernels.numerics.version import WeightVersion


def stepped(layer: nn.Linear) -> None:
    layer(torch.ones(2, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def same_values(layer: nn.Linear) -> None:
    """As `torch.func.functional_call` puts a clone in a parameter's place."""
    layer.register_parameter("weight", nn.Parameter(layer.weight.detach().clone()))


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda layer: layer(torch.ones(2, 4)).sum().backward(), False),
        (same_values, False),
        (lambda layer: layer.requires_grad_(False), False),
        (stepped, True),
        (lambda layer: nn.init.zeros_(layer.weight), True),
        (lambda layer: layer.load_state_dict(nn.Linear(4, 3).state_dict()), True),
        (lambda layer: layer.load_state_dict(nn.Linear(4, 3).state_dict(), assign=True), True),
    ],
)
def test_changes(change: Callable[[Any], Any], changed: bool) -> None:
    layer = nn.Linear(4, 3)
    first, version = layer.weight, WeightVersion()
    assert not version.bound
    assert not version.changed(first), "nothing is known"
    version.bind(first)
    assert version.bound
    for _ in range(2):
        change(layer)
        assert version.changed(layer.weight) is changed
        assert version.is_other(layer.weight) is (layer.weight is not first)
    version.bind(layer.weight)
    assert not version.changed(layer.weight)


def test_another_tensor_of_other_values() -> None:
    version, weight = WeightVersion(), torch.randn(3, 4)
    version.bind(weight)
    twin, other = weight.clone(), weight + 1
    assert (version.changed(twin), version.changed(other)) == (False, True)
    twin += 1
    assert version.changed(twin)
    for unlike in (weight.double(), weight[:2], weight.to("meta")):
        assert version.changed(unlike)
    weight += 0
    assert version.changed(weight.clone()), "what it was of is gone"
    version.bind(weight)
    del weight
    assert version.changed(other - 1), "the weight is not kept alive"


def test_declared_changed() -> None:
    version, weight = WeightVersion(), torch.randn(3, 4)
    version.bind(weight)
    version.invalidate()
    assert version.changed(weight)
    version.bind(weight)
    assert not version.changed(weight)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("stale", [False, True])
def test_copies_are_not_bound_and_stay_stale(way: Callable[[Any], Any], stale: bool) -> None:
    version, weight = WeightVersion(), torch.randn(3, 4)
    version.bind(weight)
    if stale:
        weight += 1
    other = way(way(version))
    assert not other.bound
    assert other.changed(torch.zeros(1)) is stale
    assert version.changed(weight) is stale
