"""A switch of SwitchLoRA: the function stays, the vectors go round, the schedule."""

import math

import pytest
import torch
from models import logits
from switching import batch, optimizer_of, switching, train

import loge_kernels as loge
from loge_kernels.methods.switchlora import schedule
from loge_kernels.methods.switchlora.edit import add_product_
from loge_kernels.methods.switchlora.pools import Pool
from loge_kernels.methods.switchlora.switcher import Switcher


def switch_until(switcher: Switcher, count: int) -> None:
    """Steps with no training in them, until so many vectors have been switched."""
    while switcher.switched < count:
        switcher.switch()
        switcher.step += 1


def dense(place) -> torch.Tensor:
    """The layer's whole matrix as the forward sees it, in float64."""
    A, B = (matrix.detach().double() for matrix in place.matrices)
    return place.layer.base_layer.weight.detach().double() + place.scaling * B @ A


def test_rows_and_columns_of_one_slot_may_switch_together_where_nothing_is_frozen():
    model = switching(r=1, interval=10, freeze_steps=0).eval()
    switcher = Switcher(model)
    before, matrices = logits(model), [[m.detach().clone() for m in place.matrices] for place in switcher.places]
    together = 0
    for _ in range(60):
        together += sum(bool(switch.rows and switch.columns) for switch in switcher.switch())
        switcher.step += 1
    assert together > 0
    for place, old in zip(switcher.places, matrices, strict=True):
        assert not any(torch.equal(m, o) for m, o in zip(place.matrices, old, strict=True))
    assert (logits(model) - before).abs().max() <= 5e-6 * before.abs().max()


@pytest.mark.parametrize(
    ("dtype", "drift", "rounding"),
    [(torch.float32, 3e-6, 3e-6), (torch.bfloat16, 300 * 2**-18, 1.5 * 2**-8)],
)
def test_hundreds_of_switches_leave_the_matrix_unchanged(dtype, drift, rounding):
    """`drift`: of the exact sum; `rounding`: of the matrix without the remainder of 16 bits."""

    def whole(place):
        return dense(place) if place.layer.remainder is None else dense(place) + place.layer.remainder.double()

    switcher = Switcher(switching(dtype, interval=10))
    before = [whole(place) for place in switcher.places]
    switch_until(switcher, 300 * len(switcher.places))
    for place, old in zip(switcher.places, before, strict=True):
        size = (old if dtype == torch.float32 else place.layer.base_layer.weight.double()).abs().max()
        assert (whole(place) - old).abs().max() < drift * size
        assert (dense(place) - old).abs().max() < rounding * size


def test_a_switch_in_bfloat16_costs_no_accuracy():
    exact = switching(torch.bfloat16).eval().double()
    with torch.no_grad():
        for place in Switcher(exact).places:
            place.layer.base_layer.weight += place.layer.remainder
    truth = logits(exact)
    model = switching(torch.bfloat16).eval()
    plain = (logits(model).double() - truth).norm()
    switch_until(Switcher(model), 200)
    assert (logits(model).double() - truth).norm() <= 2 * plain


def test_without_the_remainder_edits_of_16_bits_are_lost():
    weight, linear = torch.ones(8, 8, dtype=torch.bfloat16), torch.nn.Linear(8, 8, False, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    remainder = torch.zeros_like(weight)
    for _ in range(64):
        add_product_(linear, remainder, torch.full((8, 1), 2.0**-6), torch.full((1, 8), 2.0**-6))
    assert torch.equal(linear.weight, torch.full_like(weight, 1 + 64 * 2.0**-12))
    linear.weight.data.copy_(weight)
    for _ in range(64):
        add_product_(linear, None, torch.full((8, 1), 2.0**-6), torch.full((1, 8), 2.0**-6))
    assert torch.equal(linear.weight, weight)


def test_vectors_go_back_to_their_own_places_in_the_pool():
    r, size = 3, 7
    vectors = torch.randn(r, 5)
    original = vectors.clone()
    pool = Pool(vectors, size, 0, torch.device("cpu"), (1.0, 0, "test"))
    untouched = pool.candidates[r:].clone()
    other = Pool(torch.randn(r, 5), size, 1, torch.device("cpu"), (1.0, 0, "other"))
    vectors += 1.0  # trained
    for step in range(4):
        pool.exchange(vectors, pool.choose(1, step, other))
    # Slots 0, 1, 2 and 0 again took the candidates 3, 4, 5 and 6.
    assert pool.held == [6, 4, 5]
    assert torch.equal(pool.candidates[:r], original + 1.0)
    assert torch.equal(vectors, untouched[[3, 1, 2]])
    pool.exchange(vectors, pool.choose(3, 4, other))
    assert torch.equal(vectors[pool.held.index(0)], original[0] + 1.0)
    assert len(set(pool.held)) == r


def test_every_candidate_has_its_turn():
    pool = Pool(torch.zeros(4, 2), 9, 2, torch.device("cpu"), (1.0, 0, "test"))
    other = Pool(torch.zeros(4, 2), 9, 0, torch.device("cpu"), (1.0, 0, "other"))
    slots, candidates = zip(*[pool.choose(1, step, other)[0] for step in range(5)], strict=True)
    assert slots == (2, 3, 0, 1, 2)
    assert candidates == (4, 5, 6, 7, 8)


def test_no_candidate_is_taken_twice():
    pool = Pool(torch.zeros(6, 2), 8, 0, torch.device("cpu"), (1.0, 0, "test"))
    other = Pool(torch.zeros(6, 2), 8, 3, torch.device("cpu"), (1.0, 0, "other"))
    vectors = torch.arange(12.0).reshape(6, 2)
    everything = torch.cat([vectors, pool.candidates[6:]])
    for step in range(5):
        pool.exchange(vectors, pool.choose(5, step, other))
        assert len(set(pool.held)) == 6
    waiting = [candidate for candidate in range(8) if candidate not in pool.held]
    found = torch.cat([vectors, pool.candidates[waiting]])
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in everything.tolist()}


def test_a_frozen_slot_is_passed_over():
    A = Pool(torch.zeros(4, 2), 9, 0, torch.device("cpu"), (1.0, 0, "A"))
    B = Pool(torch.zeros(4, 2), 9, 2, torch.device("cpu"), (1.0, 0, "B"))
    A.freeze([1], until=7)
    B.freeze([0], until=6)
    assert [slot for slot, _ in A.choose(2, 5, B)] == [2, 3]
    assert A.frozen(6) == [1]
    assert B.frozen(6) == []
    assert [slot for slot, _ in A.choose(9, 6, B)] == [0, 2, 3]


def test_no_slot_is_switched_while_it_is_frozen():
    model = switching(r=4, interval=10, freeze_steps=5)
    switcher = Switcher(model)
    last: dict[tuple[str, int], int] = {}
    for step in range(200):
        for switch in switcher.switch():
            for slot in switch.rows + switch.columns:
                key = switch.place.name, slot
                assert step - last.get(key, -9) >= 5
                last[key] = step
        switcher.step += 1
    assert switcher.switched > 50


def test_A_begins_at_slot_0_and_B_in_the_middle():
    place = Switcher(switching(r=8)).places[0]
    assert (place.A.slot, place.B.slot) == (0, 4)
    assert (place.A.candidate, place.B.candidate) == (8, 8)


def test_the_interval_grows_exponentially():
    assert math.isclose(schedule.interval(99, 40, 0.1, 1000), 40 / 0.3)
    assert math.isclose(schedule.interval(199, 40, 0.1, 1000), 40 / 0.09)
    assert schedule.interval(10**9, 40, 0.1, 1000) == math.inf


def test_counts_are_rounded_without_bias():
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for expected in (0.0, 0.1, 0.75, 2.4):
        counts = [schedule.count(expected, draw) for draw in draws]
        assert set(counts) <= {math.floor(expected), math.ceil(expected)}
        assert abs(sum(counts) / len(counts) - expected) < 0.02


def test_as_many_are_switched_as_the_schedule_says():
    model = switching(r=4, interval=10, ratio=0.5, total_steps=400)
    switcher = Switcher(model)
    for _ in range(400):
        switcher.switch()
        switcher.step += 1
    expected = sum(2 * 4 / schedule.interval(t, 10, 0.5, 400) for t in range(400)) * len(switcher.places)
    assert abs(switcher.switched / expected - 1) < 0.1


def test_a_model_without_total_steps_says_so():
    model = switching(total_steps=None)
    with pytest.raises(ValueError, match="total_steps is missing"):
        train(model, optimizer_of(model), stop=1)
    train(model, optimizer_of(model, total_steps=10), stop=1)
    with pytest.raises(ValueError, match="total_steps=0"):
        Switcher(model, 0)


def test_a_model_that_is_no_switchlora_model():
    with pytest.raises(ValueError, match="no SwitchLoRA layers"):
        Switcher(torch.nn.Linear(3, 3))


def test_layers_that_are_frozen_are_not_switched():
    model = switching(interval=10)
    loge.freeze(model, 1)
    below = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".layers.0." in name}
    assert len(below) > 21
    optimizer = optimizer_of(model)
    train(model, optimizer)
    assert {place.name.split(".layers.")[1][0] for place in optimizer.switcher.places} == {"1"}
    assert optimizer.switcher.switched > 20
    for name, tensor in below.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 14 SwitchLoRA layers trains"):
        Switcher(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_pool_on_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="pool_device='cuda'"):
        Switcher(switching(pool_device="cuda"))


def test_the_loss_of_a_trained_model_does_not_jump_at_a_switch():
    model = switching(interval=10)
    optimizer = optimizer_of(model)
    train(model, optimizer, stop=8)
    ids = batch(0)
    before = model(input_ids=ids, labels=ids).loss.item()
    switch_until(optimizer.switcher, optimizer.switcher.switched + 40)
    assert abs(model(input_ids=ids, labels=ids).loss.item() - before) < 1e-5
