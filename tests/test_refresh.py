"""Subspaces that follow the gradient: towards the optimal one, at the right step, resumed, and alike on every rank."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import lora, tokens
from ranks import on_two_ranks
from test_calibration import QUERY, batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import loge_kernels as loge
from loge_kernels import refresher


def other_batch() -> dict[str, Tensor]:
    ids = torch.randint(50, (4, 40), generator=torch.Generator().manual_seed(8))
    return {"input_ids": ids, "labels": ids}


def layers(model: nn.Module) -> dict[str, loge.LoGELinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, loge.LoGELinear)}


def steps(model: Any, count: int, lr: float = 0.0, batch: dict[str, Tensor] | None = None) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        model(**(batch or other_batch())).loss.backward()
        optimizer.step()


def directions(model: nn.Module) -> list[Tensor]:
    found = []
    for layer in layers(model).values():
        assert layer.factors is not None
        found.append(layer.factors.right.detach().clone())
    return found


def captured(model: Any, name: str) -> float:
    """The share of the energy of dX on the other batch that the layer's subspace keeps, under the model's own flow."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, inputs, y: y.register_hook(seen.append) and None)
    model(**other_batch()).loss.backward()
    handle.remove()
    model.zero_grad()
    base = layer.base_layer
    dx = seen[0].flatten(0, 1) @ base.weight.detach()
    return ((dx @ base.factors.right.t()).square().sum() / dx.square().sum()).item()


def test_refreshes_turn_the_subspace_towards_the_gradient_at_hand() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    name = QUERY.replace("layers.0", "layers.1")
    before = captured(model, name)
    steps(model, 8)
    after = captured(model, name)
    optimal = lora()
    loge.apply(optimal, 16, calibration=[other_batch()])
    best = captured(optimal, name)
    assert before < 0.9 * best
    assert after > 0.97 * best
    for layer in layers(model).values():
        assert layer.factors is not None
        R = layer.factors.rank
        torch.testing.assert_close(layer.factors.right @ layer.factors.right.t(), torch.eye(R), rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.factors.left, layer.weight @ layer.factors.right.t(), rtol=1e-4, atol=1e-5)
        assert 0.0 < layer.factors.energy <= 1.0


def test_it_happens_at_the_step_asked_for() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=3)
    start = directions(model)
    steps(model, 2)
    assert all(map(torch.equal, directions(model), start))
    steps(model, 1)
    refreshed = directions(model)
    assert not any(map(torch.equal, refreshed, start))
    steps(model, 2)
    assert all(map(torch.equal, directions(model), refreshed))
    loge.refresh(model)
    steps(model, 1)
    assert not any(map(torch.equal, directions(model), refreshed))
    assert not any(module._forward_hooks for module in model.modules())


def test_with_exact_steps_the_exact_flow_is_watched_once() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1, exact_every=2)
    schedule = loge.schedule_of(model)
    assert schedule is not None
    assert schedule.refresher is not None
    kept = []
    original = schedule.refresher._refresh
    schedule.refresher._refresh = lambda layer, rows: (kept.append(rows), original(layer, rows))  # type: ignore
    steps(model, 2)
    assert len(kept) == 2 * 14
    assert all(len(rows) == 1 and len(rows[0]) == 160 for rows in kept)


def test_rows_stay_bounded_under_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loge_kernels.refresher.ROWS", 20)
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    schedule = loge.schedule_of(model)
    assert schedule is not None
    assert schedule.refresher is not None
    for _ in range(7):
        model(**other_batch()).loss.backward()
        assert all(sum(map(len, rows)) <= 40 for rows in schedule.refresher._rows.values())


def test_a_broken_gradient_changes_no_subspace() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    start = directions(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    (model(**other_batch()).loss * torch.nan).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, directions(model), start))


def test_inside_autocast_directions_stay_orthonormal() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    with torch.autocast("cpu", torch.bfloat16):
        steps(model, 1)
    for layer in layers(model).values():
        assert layer.factors is not None
        right = layer.factors.right.double()
        torch.testing.assert_close(right @ right.t(), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.factors.left, layer.weight @ layer.factors.right.t(), rtol=1e-4, atol=1e-5)


def test_a_refresh_that_sees_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad]).step()
    assert "a refresh saw no gradient" in caplog.text


def test_a_resumed_run_goes_on_with_the_refreshed_subspaces() -> None:
    whole, first, second = lora(), lora(), lora()
    statistics = loge.calibrate(lora(), batches())
    for model in (whole, first, second):
        loge.apply(model, 16, calibration=statistics, refresh_every=2)
    steps(whole, 4, 0.05)
    steps(first, 2, 0.05)
    schedules = [loge.schedule_of(model) for model in (first, second)]
    assert schedules[0] is not None
    assert schedules[1] is not None
    state = schedules[0].state_dict()
    broken = {name: tensor for name, tensor in state.items() if not name.endswith("down_proj|right")}
    with pytest.raises(ValueError, match=r"state has nothing of layer .*down_proj"):
        schedules[1].load_state_dict(broken)
    assert schedules[1].step == 0
    schedules[1].load_state_dict(state)
    second.load_state_dict(first.state_dict())
    steps(second, 2, 0.05)
    for found, expected in zip(directions(second), directions(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_gradient_subspaces_are_refreshed_and_removing_stops_it() -> None:
    model = lora()
    with pytest.raises(ValueError, match="no subspaces to refresh"):
        loge.refresh(model)
    loge.apply(model, 16, "svd")
    with pytest.raises(ValueError, match="no subspaces to refresh"):
        loge.refresh(model)
    loge.remove(model)
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    loge.remove(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_copy_made_in_a_watched_step_watches_nothing() -> None:
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.watcher is None for layer in layers(twin).values())
    assert all(layer.watcher is not None for layer in layers(model).values())


@pytest.mark.parametrize("residual", [0.0, 0.25])
def test_a_refresh_reads_nothing_on_the_host(residual: float) -> None:
    """On the meta device any host read raises."""
    model = lora()
    loge.apply(model, 16, calibration=batches(), refresh_every=1, residual=residual)
    layer = layers(model)[f"{QUERY}.base_layer"].to("meta")
    factors = layer.factors
    assert factors is not None
    V = factors.right.detach()
    rows = [torch.empty(40, 64, device="meta")]
    turned = refresher._turned(layer.weight, V, torch.empty(16, device="meta"), rows, None)
    refresher.Refresher._take(layer, layer.weight, *turned)
    assert factors.left.is_meta
    with pytest.raises(RuntimeError, match="item"):
        print(factors.energy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_every": 0}, "refresh_every=0; give a number of optimizer steps"),
        ({"refresh_every": 1.5}, r"refresh_every=1\.5; give a number of optimizer steps"),
        ({"refresh_every": 5, "subspace": "svd"}, "refresh_every follows the gradient.*not 'svd'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loge.apply(lora(), 16, **{"calibration": None if "subspace" in options else batches(), **options})


def work(rank: int) -> tuple[int, list[Tensor], list[Tensor]]:
    model = lora()
    statistics = loge.calibrate(DistributedDataParallel(model), batches()[rank : rank + 1])
    loge.apply(model, 16, calibration=statistics, refresh_every=2)
    parallel = DistributedDataParallel(model)
    mine = tokens()[rank : rank + 1]
    calibrated = directions(model)
    steps(parallel, 2, 0.05, {"input_ids": mine, "labels": mine})
    return statistics.batches, calibrated, directions(model)


def empty_handed(rank: int) -> None:
    with pytest.raises(ValueError, match="batches is empty" if rank else "calibration failed on another rank"):
        loge.calibrate(lora(), [] if rank else batches())
    assert loge.calibrate(lora(), batches()[rank : rank + 1]).batches == 2


def test_an_empty_loader_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    on_two_ranks(empty_handed, tmp_path)


def test_every_rank_calibrates_and_refreshes_alike(tmp_path: Path) -> None:
    first, second = on_two_ranks(work, tmp_path)
    assert first[0] == second[0] == 2
    model = lora()
    loge.apply(model, 16, calibration=loge.calibrate(model, batches()[:2]))
    for found, other, expected in zip(first[1], second[1], directions(model), strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=0)
        torch.testing.assert_close(found.t() @ found, expected.t() @ expected, rtol=0, atol=1e-3)
    for found, other in zip(first[2], second[2], strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-6)
