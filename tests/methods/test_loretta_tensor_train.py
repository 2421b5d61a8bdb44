"""Tensor trains: the matrix that they stand for, what an application costs, how sizes are cut into modes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loge_kernels.methods.loretta.modes import check_shapes, modes_of, near_equal
from loge_kernels.methods.loretta.tensor_train import TensorTrain

SIZES = [(12, 18), (7, 13), (8, 24), (30, 6), (64, 64), (5, 97), (8, 2304), (2304, 8)]


def train(in_features: int, out_features: int, rank: int = 4, dtype: torch.dtype = torch.float64, **options):
    return TensorTrain(*modes_of(in_features, out_features), rank, dtype=dtype, **options)


def contracted(cores: list[torch.Tensor]) -> torch.Tensor:
    """The matrix [in, out] flattened, by one contraction after the other from left to right."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.tensordot(product, core, dims=1)
    return product.flatten()


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_a_train_is_the_matrix_of_its_cores(size, out):
    layer = train(size, out, bias=True)
    torch.nn.init.normal_(layer.bias)
    dense = contracted(layer.cores).view(size, out)
    torch.testing.assert_close(layer.matrix(), dense.T)
    x = torch.randn(3, 2, size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ dense + layer.bias)


@pytest.mark.parametrize(("size", "out", "rank"), [(768, 64, 5), (4096, 64, 5), (8, 4096, 8), (101, 60, 3)])
def test_an_application_costs_two_thin_products(size, out, rank):
    """Counted: every multiply and add of the matrix products. 2 M r (in + out) are those with x; forming L and R does
    not depend on M."""
    layer = train(size, out, rank, torch.float32)

    def flops(M: int) -> int:
        x = torch.randn(M, size)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops()

    forming = flops(0)
    assert flops(1000) - forming == 2 * 1000 * rank * (size + out)
    # The last step of each half is 2 r² times its size, the steps before it a geometric series with ratio 1/2 or less.
    assert forming <= 4 * rank**2 * (size + out)


def test_autocast_leaves_the_forming_alone():
    layer = train(24, 8, dtype=torch.float32)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.matrix().dtype == torch.float32
        assert layer(layer.suited(x)).dtype == torch.bfloat16
    assert layer.suited(x.bfloat16()).dtype == torch.float32


def test_every_element_starts_with_the_variance_of_the_paper():
    layer = train(768, 64, rank=5)
    samples = []
    for _ in range(30):
        layer.reset_parameters()
        samples.append(layer.matrix().square().mean().item())
    assert sum(samples) / len(samples) == pytest.approx(1 / (768 + 64), rel=0.3)


def test_a_frozen_copy_has_the_same_matrix_and_no_parameters():
    layer = train(24, 8)
    twin = layer.frozen()
    assert torch.equal(twin.matrix(), layer.matrix())
    assert not list(twin.parameters())
    assert set(twin.state_dict()) == set(layer.state_dict())
    with torch.no_grad():
        layer.core_0.add_(1.0)
    assert not torch.equal(twin.matrix(), layer.matrix())


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_the_matrix_cannot_have(rank):
    with pytest.raises(ValueError, match=rf"tensor_rank={rank} for a 64 x 8 matrix; give 1 to 8"):
        TensorTrain((8, 8), (8,), rank)


@pytest.mark.parametrize(
    ("sizes", "modes"),
    [
        ((768, 64), ((8, 8, 12), (8, 8))),
        ((64, 768), ((8, 8), (12, 8, 8))),
        ((4096, 64), ((16, 16, 16), (4, 4, 4))),
        ((64, 4096), ((4, 4, 4), (16, 16, 16))),
        ((768, 8), ((8, 8, 12), (8,))),
        ((4096, 8), ((16, 16, 8, 2), (2, 4))),
        ((8, 2304), ((8,), (8, 8, 4, 9))),
    ],
)
def test_the_paper_s_sizes_have_the_paper_s_shapes(sizes, modes):
    assert modes_of(*sizes) == modes


@pytest.mark.parametrize("size", [1, 2, 7, 8, 16, 60, 64, 97, 576, 1024, 1536, 2304, 5120, 11008, 14336, 50257])
def test_any_size_has_modes(size):
    modes = near_equal(size)
    assert math.prod(modes) == size
    assert list(modes) == sorted(modes)
    of_in, of_out = modes_of(size, 10)
    assert (math.prod(of_in), math.prod(of_out)) == (size, 10)


@pytest.mark.parametrize(("size", "modes"), [(576, (8, 8, 9)), (97, (97,)), (14, (14,)), (32, (4, 8)), (194, (2, 97))])
def test_modes_are_near_equal(size, modes):
    assert near_equal(size) == modes


def test_shapes_of_the_user():
    shapes = {"768x64": [4, 192, 64], "12x6": [3, 4, 6]}
    check_shapes(shapes)
    assert modes_of(768, 64, shapes) == ((4, 192), (64,))
    assert modes_of(12, 6, shapes) == ((3, 4), (6,))
    assert modes_of(768, 8, shapes) == ((8, 8, 12), (8,))


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({"768x64": [8, 8, 12, 8, 4]}, ValueError, r"multiply to 24576, not to 768 x 64 = 49152"),
        ({"768x64": [8, 8, 8, 96]}, ValueError, r"no prefix .* multiplies to in_features=768 .*\[8, 64, 512, 49152\]"),
        ({"768x64": []}, ValueError, r"multiply to 1, not to"),
        ({"768x64": [-768, -64]}, ValueError, r"modes \[-768, -64\]"),
        ({"768": [768]}, ValueError, r"key '768'; write a size as 'INxOUT'"),
        ({"axb": [1]}, ValueError, r"key 'axb'"),
        ({(768, 64): [768, 64]}, ValueError, r"key \(768, 64\)"),
        ({"4x4": "44"}, TypeError, r"give a list of integers"),
        ({"4x4": [4.0, 4]}, TypeError, r"give a list of integers"),
        ([[8, 8]], TypeError, r"tensor_shapes=\[\[8, 8\]\] is a list"),
    ],
)
def test_shapes_that_do_not_fit(shapes, error, message):
    with pytest.raises(error, match=message):
        check_shapes(shapes)
