"""What `apply(base_dtype=)` leaves in 16 bits with a reason, and what it refuses, with nothing half applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import loge_kernels as loge

NAMED = pytest.mark.parametrize("name", ["float8", "int8"])


class ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias)


@NAMED
def test_a_weight_that_the_model_reads_itself_stays(name: str) -> None:
    model: Any = nn.Sequential(ReadsItsWeight()).requires_grad_(False)
    expected, x = model(torch.ones(2, 32)), torch.ones(2, 32)
    report = loge.apply(model, base_dtype=name)
    assert {row.name: row.path for row in report.layers} == {"0.read": "skipped", "0.called": "plain"}
    assert "reads its weight itself" in str(report)
    assert (model(x) - expected).norm() < (0.1 if name == "float8" else 0.02) * expected.norm()


def test_what_has_no_weight_of_its_own_is_refused_by_name() -> None:
    pruned = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    prune.identity(pruned[1], "weight")
    empty = nn.Sequential(nn.Linear(32, 32), nn.Linear(0, 32))
    for model, words in ((pruned, "layer '1' is no parameter, but computed"), (empty, "layer '1' cannot be .* empty")):
        model.requires_grad_(False)
        with pytest.raises(ValueError, match=words):
            loge.apply(model, targets=["0", "1"], base_dtype="int8")
        assert {type(layer) for layer in model} == {nn.Linear}, "nothing is half applied"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"base_dtype": ["int8"]}, TypeError, r"base_dtype=\['int8'\] is a list; give a string"),
        ({"exact_dtype": ["int8"]}, TypeError, r"exact_dtype=\['int8'\] is a list; give a string"),
        ({"rank": 8, "salience": ["taylor"]}, TypeError, r"salience=\['taylor'\] is a list; give a string"),
        ({"backend": ["reference"]}, TypeError, r"backend=\['reference'\] is a list; give a string"),
        ({"salience": "signed"}, ValueError, "salience='signed' is for a low-rank backward, and rank is None"),
        (
            {"rank": [0.1, 0.2]},
            TypeError,
            r"rank=\[0\.1, 0\.2\] is a list; give a pair of shares as a tuple, \(0\.1, 0",
        ),
    ],
    ids=str,
)
def test_arguments_of_another_kind(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    with pytest.raises(error, match=words):
        loge.apply(model, targets=["0"], **arguments)
    assert type(model[0]) is nn.Linear


def test_weights_in_8_bits_of_others_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    model[1].weight.data = model[1].weight.data.to(torch.float8_e4m3fn)
    report = loge.apply(model, targets=["0", "1"])
    assert "its weight is torch.float8_e4m3fn" in str(report)
    assert type(model[1]) is nn.Linear
