"""What happens at which optimizer step (exact steps, refreshed subspaces), without a call from the training loop.

`apply(exact_every=n)`, and `apply` with subspaces that follow the gradient, attach a `Schedule` to the model. It
follows the optimizer that holds the model's trained parameters through torch's own step hooks, so it works in any loop
(Trainer, Accelerate, TRL, a handwritten one), under gradient accumulation, where a step is one optimizer step, and
under DDP, where every rank counts alike. A step that a `GradScaler` skips is not counted. Of several optimizers with
trained parameters of the model the one that steps first is followed, until another steps twice while it does not.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .correction import BiasCorrection
from .linear import LoGELinear
from .refresher import Refresher

# Not an attribute of the model: a copy of the model has no schedule, and its state dict and pickle know nothing of it.
_schedules: weakref.WeakKeyDictionary[nn.Module, Schedule] = weakref.WeakKeyDictionary()


class Schedule:
    """How far a model's training is, as far as its backward depends on it.

    step: optimizer steps taken so far.   exact_every: one step in so many is exact, the first among them; any number
    from 1 up, 1.5 for two steps in three, or None.   correction: the `BiasCorrection` that the exact steps feed, or
    None.   refresher: the `Refresher` of the "gradient" subspaces, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[LoGELinear],
        exact_every: float | None,
        correction: BiasCorrection | None = None,
        refresher: Refresher | None = None,
    ) -> None:
        self.step = 0
        self.exact_every = exact_every
        self.correction = correction
        self.refresher = refresher
        self._model = weakref.ref(model)
        # Weak, or the schedule would keep alive the model that it is kept by.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._followed: weakref.ref[Tensor] | None = None  # whose optimizer's steps are counted
        self._passed_over: weakref.ref[torch.optim.Optimizer] | None = None  # another one that has stepped since
        on_step = weakref.WeakMethod(self._on_optimizer_step)

        def follow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            method = on_step()
            if method is not None and not _inside_another_step(optimizer, sys._getframe(1)):
                method(optimizer)

        self._handle = register_optimizer_step_post_hook(follow)
        weakref.finalize(self, self._handle.remove)
        self._prepare()

    @property
    def exact(self) -> bool:
        """Whether the step under way takes the exact gradient."""
        if self.exact_every is None:
            return False
        return self._exact_steps_before(self.step + 1) > self.exact_steps

    @property
    def exact_steps(self) -> int:
        """How many of the steps so far were exact."""
        return self._exact_steps_before(self.step)

    def _exact_steps_before(self, step: int) -> int:
        if self.exact_every is None or step == 0:
            return 0
        # The steps ceil(j n), j = 0, 1, …; the small number takes the rounding of 1 / (1 / n) out.
        return math.floor((step - 1) / self.exact_every + 1e-9) + 1

    def advance(self) -> None:
        """Count an optimizer step: for loops whose optimizer is not a `torch.optim.Optimizer`; others are followed."""
        if self.correction is not None:
            self.correction.finish_step()
        if self.refresher is not None:
            self.refresher.finish_step()
        self.step += 1
        self._prepare()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the step, the correction's means and the refreshed subspaces, as flat tensors
        (safetensors takes them)."""
        state = {"step": torch.tensor(self.step)}
        if self.correction is not None:
            state |= {f"correction.{name}": mean for name, mean in self.correction.state_dict().items()}
        if self.refresher is not None:
            state |= {f"refresher.{name}": tensor for name, tensor in self.refresher.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises ValueError for a state without a step, or with means or subspaces that do not fit; nothing is changed
        then.
        """
        if "step" not in state:
            raise ValueError(f"state has no 'step'; expected what Schedule.state_dict() gave, got {sorted(state)[:3]}")
        means, subspaces = _below(state, "correction."), _below(state, "refresher.")
        if means and self.correction is None:
            raise ValueError("state holds the means of a bias correction, and this model was applied without one")
        if subspaces and self.refresher is None:
            raise ValueError("state holds subspaces that follow the gradient, and this model was applied without them")
        if self.refresher is not None:
            self.refresher.check_state(subspaces)
        if self.correction is not None:
            self.correction.load_state_dict(means)
        if self.refresher is not None:
            self.refresher.load_state_dict(subspaces)
        self.step = int(state["step"])
        self._prepare()

    def detach(self) -> None:
        """Stop following, and give every layer its own exact_fraction back."""
        self._handle.remove()
        for reference in self._layers:
            layer = reference()
            if layer is not None:
                layer.schedule_exact(False)
        if self.correction is not None:
            self.correction.detach()
        if self.refresher is not None:
            self.refresher.detach()

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        followed = None if self._followed is None else self._followed()
        if followed is None or not followed.requires_grad or id(followed) not in held:
            model = self._model()
            parameters = () if model is None else model.parameters()
            own = next((p for p in parameters if p.requires_grad and id(p) in held), None)
            if own is None:
                return  # somebody else's optimizer
            again = self._passed_over is not None and self._passed_over() is optimizer
            if followed is not None and followed.requires_grad and not again:
                self._passed_over = weakref.ref(optimizer)
                return
            self._followed = weakref.ref(own)
        self._passed_over = None
        self.advance()

    def _prepare(self) -> None:
        """Set every layer up for the coming step."""
        exact = self.exact
        for reference in self._layers:
            layer = reference()
            if layer is not None:
                layer.schedule_exact(exact)
        if self.correction is not None:
            self.correction.exact = exact
        if self.refresher is not None:
            self.refresher.prepare(self.step)


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _inside_another_step(optimizer: torch.optim.Optimizer, hooks: FrameType) -> bool:
    """Whether the step whose hooks run in frame `hooks` was called by another step of `optimizer`, as a subclass calls
    its base's: torch runs the hooks after each of the two."""
    frame = hooks.f_back
    while frame is not None:
        if frame.f_code is hooks.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def attach(model: nn.Module, schedule: Schedule) -> None:
    """Make `schedule` the one of `model`."""
    _schedules[model] = schedule


def schedule_of(model: nn.Module) -> Schedule | None:
    """The `Schedule` that `apply` attached to `model`, to one of its submodules or to what it wraps (DDP); None when
    every step is alike. Its `state_dict` belongs in a checkpoint."""
    return next((_schedules[module] for module in model.modules() if module in _schedules), None)


def detach(model: nn.Module) -> None:
    """Take the schedule of `model`, if any, away."""
    for module in model.modules():
        schedule = _schedules.pop(module, None)
        if schedule is not None:
            schedule.detach()


def refresh(model: nn.Module) -> None:
    """Bring the "gradient" subspaces of `model` up to date after the optimizer step under way, from its gradients.

    For loops that choose the moment themselves; `apply(refresh_every=n)` does it every n steps. To be called before the
    step's forward. Raises ValueError for a model without such subspaces.
    """
    schedule = schedule_of(model)
    if schedule is None or schedule.refresher is None:
        raise ValueError(
            f"this {type(model).__name__} has no subspaces to refresh: apply(subspace='gradient') makes them"
        )
    schedule.refresher.watch()
