"""SwitchAdamW: AdamW where nothing switches; reset and freeze where something does."""

import pytest
import torch
from switching import STEPS, assert_identical, optimizer_of, state_of, switching, train

import loge_kernels as loge


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_adamw_where_nothing_switches(weight_decay):
    rare = {"interval": 1e9}
    model, other = switching(**rare), switching(**rare)
    optimizer = optimizer_of(model, weight_decay=weight_decay)
    train(model, optimizer)
    assert optimizer.switcher.switched == 0
    trained = [p for p in other.parameters() if p.requires_grad]
    train(other, torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay))
    for name, tensor in state_of(other).items():
        got = state_of(model)[name]
        assert (got - tensor).abs().max() <= 2e-6 * tensor.abs().max(), name


def test_whole_parameters_are_stepped_bit_for_bit_as_by_torch():
    model, other = switching(interval=1e9), switching(interval=1e9)
    gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    optimizers = optimizer_of(model), torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    for one, optimizer in zip((model, other), optimizers, strict=True):
        for _ in range(3):
            for name, p in one.named_parameters():
                p.grad = gradients[name].clone() if name in gradients else None
            optimizer.step()
    whole = {name: tensor for name, tensor in state_of(other).items() if "lora_" not in name}
    assert_identical({name: state_of(model)[name] for name in whole}, whole)


def trained_until_a_switch():
    """A model a few steps on, its optimizer, and what the first step after that switched."""
    model = switching(r=8, interval=10)
    optimizer = optimizer_of(model, weight_decay=0.1)
    seen = []
    switch = optimizer.switcher.switch
    optimizer.switcher.switch = lambda: seen.append(switch()) or seen[-1]
    train(model, optimizer, stop=4)  # by then Adam has something to forget
    while not any(found.rows and found.columns for found in seen[-1]):
        train(model, optimizer, optimizer.switcher.step, optimizer.switcher.step + 1)
    optimizer.switcher.switch = switch
    return model, optimizer, next(found for found in seen[-1] if found.rows and found.columns)


def test_the_counterpart_forgets_and_is_frozen_for_five_steps():
    model, optimizer, found = trained_until_a_switch()
    A, B = found.place.matrices
    step = optimizer.switcher.step
    rest = [slot for slot in range(8) if found.place.B.frozen_until[slot] <= step]
    held = B[:, found.rows].clone()
    for passed in range(1, 6):
        state = optimizer.state[B]
        assert torch.equal(B[:, found.rows], held), passed
        assert not state["exp_avg"][:, found.rows].any()
        assert not state["exp_avg_sq"][:, found.rows].any()
        assert state["step"][found.rows].tolist() == [passed] * len(found.rows)
        assert optimizer.state[A]["step"][found.columns].tolist() == [passed] * len(found.columns)
        if rest:
            assert state["exp_avg"][:, rest].any()
        if passed < 5:
            optimizer.switcher.switch = list  # nothing more is switched
            train(model, optimizer, step + passed - 1, step + passed)
    train(model, optimizer, step + 4, step + 5)
    assert not torch.isclose(B[:, found.rows], held, rtol=0, atol=0).all(0).any()


def test_the_switched_vector_itself_keeps_its_moments():
    model = switching(r=8, interval=10)
    optimizer = optimizer_of(model)
    train(model, optimizer, stop=3)
    place = optimizer.switcher.places[0]
    A, B = place.matrices
    before = optimizer.state[A]["exp_avg"].clone(), optimizer.state[A]["step"].clone()
    found = []
    while not found:
        found = [s for s in optimizer.switcher.switch() if s.place is place and s.rows and not s.columns]
        optimizer.switcher.step += 1
    optimizer._reset(B, 1, found[0].rows)
    assert torch.equal(optimizer.state[A]["exp_avg"], before[0])
    assert torch.equal(optimizer.state[A]["step"], before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -1}, "-1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(switching(), **options)


def test_adapters_that_the_optimizer_does_not_know():
    model = switching()
    some = [p for name, p in model.named_parameters() if p.requires_grad and "q_proj" not in name]
    with pytest.raises(ValueError, match="4 of 28 adapter matrices are not in params"):
        loge.SwitchAdamW(some, model=model)


def test_a_closure_is_called_once():
    model = switching()
    calls = []
    assert optimizer_of(model).step(lambda: calls.append(1) or 3.0) == 3.0
    assert calls == [1]


def test_steps_without_gradients_switch_and_leave_parameters():
    model = switching()
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        optimizer.step()
    assert optimizer.switcher.step == STEPS
    assert optimizer.switcher.switched > 0
