"""The switching itself: which vectors, when, and the edit that leaves the function as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import schedule
from .config import check_pool_device
from .edit import add_product_
from .layer import SwitchLoraLinear
from .pools import Pool


@dataclass(frozen=True)
class Place:
    """A layer that is switched, and the pools of its two matrices."""

    name: str
    layer: SwitchLoraLinear
    A: Pool
    B: Pool

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, K] and B [N, r]."""
        return _matrices(self.layer)

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.layer.adapter])


@dataclass(frozen=True)
class Switch:
    """What was switched in a layer at one step: rows of A and columns of B."""

    place: Place
    rows: list[int]
    columns: list[int]


class Switcher:
    """Counts the steps of a SwitchLoRA model and switches its vectors; `SwitchAdamW` has one.

    Every choice follows from the config's seed and the count of steps, so that all ranks of a run switch alike.

    Args:
        model: holds layers of a `SwitchLoraConfig`; those of rank min(N, K) have nothing to switch, and those whose
            adapters do not train (`loge_kernels.freeze`) are left as they are.
        total_steps: optimizer steps of the whole training; None: the config's, or set later as an attribute.

    Raises:
        ValueError: a model without such layers that train, a weight that is sharded, a pool device that is not there.
    """

    def __init__(self, model: nn.Module, total_steps: int | None = None) -> None:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SwitchLoraLinear)]
        if not layers:
            raise ValueError(
                f"this {type(model).__name__} has no SwitchLoRA layers: get_peft_model(model, SwitchLoraConfig(...)) "
                "makes them"
            )
        trained = [(name, layer) for name, layer in layers if all(m.requires_grad for m in _matrices(layer))]
        if not trained:
            raise ValueError(
                f"none of the {len(layers)} SwitchLoRA layers trains: load the adapter with is_trainable=True, and "
                "freeze fewer layers"
            )
        self.config = layers[0][1].config
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps}; give an integer of at least 1")
        self.total_steps = self.config.total_steps if total_steps is None else total_steps
        self.step = 0
        self.switched = 0  # vectors, so far
        self.places = [_place(name, layer) for name, layer in trained if layer.r[layer.adapter] < _pool_size(layer)]
        self._generator = torch.Generator().manual_seed(self.config.seed)

    @torch.no_grad()
    def switch(self) -> list[Switch]:
        """Switch what is due before the coming optimizer step; the counterparts are frozen from now on."""
        total = self._check_total()
        config = self.config
        every = schedule.interval(self.step, config.interval, config.ratio, total)
        draws = torch.rand(len(self.places), 2, dtype=torch.float64, generator=self._generator).tolist()
        done = []
        for place, (first, second) in zip(self.places, draws, strict=True):
            expected = len(place.A.held) / every
            rows = place.A.choose(schedule.count(expected, first), self.step, place.B)
            # At once: a slot whose row is switched keeps its column, which Adam has just forgotten.
            place.B.freeze([slot for slot, _ in rows], self.step + config.freeze_steps)
            columns = place.B.choose(schedule.count(expected, second), self.step, place.A)
            place.A.freeze([slot for slot, _ in columns], self.step + config.freeze_steps)
            if rows or columns:
                _exchange(place, rows, columns)
                switch = Switch(place, [slot for slot, _ in rows], [slot for slot, _ in columns])
                done.append(switch)
                self.switched += len(rows) + len(columns)
        return done

    def frozen(self) -> Iterable[tuple[nn.Parameter, int, list[int]]]:
        """Parameter, dimension of its vectors and the slots that get no gradient at this step, where there are any."""
        for place in self.places:
            for dimension, (matrix, pool) in enumerate(zip(place.matrices, (place.A, place.B), strict=True)):
                slots = pool.frozen(self.step)
                if slots:
                    yield matrix, dimension, slots

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's own state, in which the weights are."""
        return {
            "seed": self.config.seed,
            "step": self.step,
            "switched": self.switched,
            "total_steps": self.total_steps,
            "generator": self._generator.get_state(),
            "layers": {p.name: {"A": p.A.state_dict(), "B": p.B.state_dict()} for p in self.places},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `state` is not of such a model."""
        if state["seed"] != self.config.seed:
            raise ValueError(
                f"the state was made with seed={state['seed']}, and this model with seed={self.config.seed}: "
                "candidates that nobody has used follow from it"
            )
        mine = {place.name for place in self.places}
        if set(state["layers"]) != mine:
            odd = sorted(mine.symmetric_difference(state["layers"]))
            raise ValueError(f"the state is of other layers: {odd[:3]} are not in both ({len(odd)} in all)")
        for place in self.places:
            for part, pool in (("A", place.A), ("B", place.B)):
                reason = pool.why_not(state["layers"][place.name][part])
                if reason is not None:
                    raise ValueError(f"the state does not fit {place.name}, {part}: {reason}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError, changing nothing, where it does not fit."""
        self.check_state(state)
        self.step, self.switched = state["step"], state["switched"]
        if self.total_steps is None:
            self.total_steps = state["total_steps"]
        self._generator.set_state(state["generator"].cpu())
        for place in self.places:
            place.A.load_state_dict(state["layers"][place.name]["A"])
            place.B.load_state_dict(state["layers"][place.name]["B"])

    def _check_total(self) -> int:
        if self.total_steps is None:
            raise ValueError(
                "total_steps is missing, and the switching depends on it: give SwitchLoraConfig(total_steps=...) or "
                "SwitchAdamW(total_steps=...), or a Trainer a SwitchLoraCallback"
            )
        return int(self.total_steps)


def _matrices(layer: SwitchLoraLinear) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[layer.adapter].weight, layer.lora_B[layer.adapter].weight


def _pool_size(layer: SwitchLoraLinear) -> int:
    return min(layer.out_features, layer.in_features)


def _place(name: str, layer: SwitchLoraLinear) -> Place:
    config, weight, r = layer.config, layer.base_layer.weight, layer.r[layer.adapter]
    if weight.shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"the weight of {name} has shape {tuple(weight.shape)}; expected "
            f"{(layer.out_features, layer.in_features)}: a sharded weight cannot be edited"
        )
    layer.keep_remainder()
    device = check_pool_device(config.pool_device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"pool_device={config.pool_device!r}, and there is no CUDA device; give 'cpu'")
    size = _pool_size(layer)
    A, B = layer.lora_A[layer.adapter].weight.detach(), layer.lora_B[layer.adapter].weight.detach().t()
    pools = []
    for part, vectors, slot, deviation in zip("AB", (A, B), (0, r // 2), layer.deviations, strict=True):
        start = deviation, config.seed, f"{layer.path}/candidates/{part}"
        pools.append(Pool(vectors, size, slot, device, start))
    return Place(name, layer, *pools)


def _exchange(place: Place, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> None:
    """Switch rows of A, then columns of B, and W with them: B A changes by B·ΔA and then by ΔB·(A + ΔA), both of low
    rank, and W takes the opposite in one product."""
    A, B = (matrix.detach() for matrix in place.matrices)
    left: list[Tensor] = []  # [N, q]
    right: list[Tensor] = []  # [q, K]
    if rows:
        left.append(B[:, [slot for slot, _ in rows]])
        old, new = place.A.exchange(A, rows)
        right.append(old.double() - new.double())
    if columns:
        old, new = place.B.exchange(B.t(), columns)
        left.append((old.double() - new.double()).t())
        right.append(A[[slot for slot, _ in columns]])
    add_product_(
        place.layer.base_layer,
        place.layer.remainder,
        torch.cat([part.double() for part in left], 1) * place.scaling,
        torch.cat([part.double() for part in right]),
    )
