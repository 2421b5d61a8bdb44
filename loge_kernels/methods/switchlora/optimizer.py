"""`SwitchAdamW`: AdamW that switches vectors before each step and counts its steps vector by vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from .switcher import Switcher


class SwitchAdamW(Optimizer):
    """`torch.optim.AdamW` for a SwitchLoRA model: `step` switches what is due, then steps.

    A switched vector's counterpart (column i of B for row i of A, and the reverse) loses Adam's moments and its count
    of steps, which is per vector for the adapters' matrices, and is held for `freeze_steps` steps: its gradient is
    zeroed, and weight decay spares it. Its count runs on. Other parameters are stepped as by `torch.optim.AdamW`.
    To be called after the gradients are clipped; a step that a `GradScaler` skips switches nothing.

    `state_dict` holds the pools and the schedule too: with the model's own state it is all that a checkpoint needs.

    Args:
        params: as in torch: parameters, or groups of them; every adapter of `model` must be among them.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        model: the model of a `SwitchLoraConfig`, or what wraps it.
        total_steps: optimizer steps of the whole training, where the config does not say.

    Raises:
        ValueError: an argument out of range, a model without SwitchLoRA layers, adapters missing in `params`; in
            `step`, total_steps that nobody gave.

    Source: Zhou, Wang and Xu, arXiv 2406.06564.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        model: nn.Module,
        total_steps: int | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}={value!r}; give a number of at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas!r}; give two numbers in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.switcher = Switcher(model, total_steps)
        matrices = {id(matrix) for place in self.switcher.places for matrix in place.matrices}
        given = {id(p) for group in self.param_groups for p in group["params"]}
        if not matrices <= given:
            raise ValueError(
                f"{len(matrices - given)} of {len(matrices)} adapter matrices are not in params; give them all, "
                "[p for p in model.parameters() if p.requires_grad]"
            )
        # Of the matrices whose vectors are switched, the dimension that counts them.
        self._vectors: dict[Tensor, int] = {
            matrix: dimension for place in self.switcher.places for dimension, matrix in enumerate(place.matrices)
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Switch, then one step of AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for switch in self.switcher.switch():
            A, B = switch.place.matrices
            self._reset(A, 0, switch.columns)
            self._reset(B, 1, switch.rows)
        frozen = {matrix: slots for matrix, _, slots in self.switcher.frozen()}
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            _step_whole(group, [(p, self._state_of(p)) for p in with_grad if p not in self._vectors])
            for p in with_grad:
                if p in self._vectors:
                    _step_vectors(group, p, self._state_of(p), self._vectors[p], frozen.get(p, []))
        self.switcher.step += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """torch's, and under "switcher" what `Switcher.state_dict` gives."""
        return super().state_dict() | {"switcher": self.switcher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's state is to be loaded too.

        Raises ValueError for a state of another optimizer or model.
        """
        if "switcher" not in state_dict:
            raise ValueError(f"state_dict is not of a SwitchAdamW: no 'switcher' in {sorted(state_dict)}")
        self.switcher.check_state(state_dict["switcher"])
        super().load_state_dict(state_dict)
        self.switcher.load_state_dict(state_dict["switcher"])
        for matrix in self._vectors:
            if matrix in self.state:  # torch leaves counts of steps where they were saved
                self.state[matrix]["step"] = self.state[matrix]["step"].to(matrix.device)

    def _state_of(self, p: nn.Parameter) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            dimension = self._vectors.get(p)
            # As torch.optim.AdamW has it: counts of whole parameters stay on the CPU.
            count = torch.tensor(0.0) if dimension is None else torch.zeros(p.shape[dimension], device=p.device)
            state["step"] = count
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _reset(self, matrix: nn.Parameter, dimension: int, slots: list[int]) -> None:
        """Forget Adam's moments and counts of these vectors."""
        state = self.state.get(matrix)
        if state and slots:
            index = torch.tensor(slots, device=matrix.device)
            state["step"].index_fill_(0, index, 0.0)
            state["exp_avg"].index_fill_(dimension, index, 0.0)
            state["exp_avg_sq"].index_fill_(dimension, index, 0.0)


def _step_whole(group: dict[str, Any], parameters: list[tuple[Any, dict[str, Any]]]) -> None:
    if not parameters:
        return
    beta1, beta2 = group["betas"]
    adamw(
        [p for p, _ in parameters],
        [p.grad for p, _ in parameters],
        [state["exp_avg"] for _, state in parameters],
        [state["exp_avg_sq"] for _, state in parameters],
        [],
        [state["step"] for _, state in parameters],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _step_vectors(group: dict[str, Any], p: Any, state: dict[str, Any], dimension: int, frozen: list[int]) -> None:
    """AdamW's formula, with the counts of steps a vector along `dimension`."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    shape = (-1, 1) if dimension == 0 else (1, -1)
    grad, step, mean, square = p.grad, state["step"], state["exp_avg"], state["exp_avg_sq"]
    decay: Any = 1.0 - lr * group["weight_decay"]
    if frozen:
        index = torch.tensor(frozen, device=p.device)
        grad.index_fill_(dimension, index, 0.0)
        decay = torch.full_like(step, decay).index_fill_(0, index, 1.0).view(shape)
    step += 1
    if group["weight_decay"] != 0.0:
        p.mul_(decay)
    mean.lerp_(grad, 1.0 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    count = step.double()
    size = lr / (1.0 - beta1**count)
    root = (1.0 - beta2**count).sqrt()
    denominator = square.sqrt().div_(root.to(p.dtype).view(shape)).add_(group["eps"])
    p.sub_((mean * size.to(p.dtype).view(shape)).div_(denominator))
