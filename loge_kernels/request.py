"""The arguments of `apply` as one value, and everything that can be said of them before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .allocation import ALLOCATIONS
from .backends import check_name
from .batches import Batch
from .eight_bit import EightBitWeight
from .factors import METHODS, resolve_rank
from .freezing.plan import FreezePlan
from .linear import LoGELinear
from .statistics import Statistics
from .subspaces import FROM_CALIBRATION, READINGS

SUBSPACES = (*dict.fromkeys((*METHODS, *FROM_CALIBRATION)),)


@dataclass(frozen=True, slots=True)
class Request:
    """As documented at `apply`; `rank` and `subspace` have their defaults filled in by `with_defaults`."""

    rank: int | float
    subspace: str
    calibration: Statistics | Iterable[Batch] | None
    budget: float | None
    allocation: str | None
    exact_every: float | None
    exact_dtype: str | None
    low_rank_dtype: str | None
    exact_fraction: float
    residual: float
    correction: float | None
    salience: str
    refresh_every: int | None
    freeze_below: int | FreezePlan | None
    backend: str | None

    @staticmethod
    def with_defaults(rank: int | float | None, subspace: str | None, **rest: Any) -> Request:
        if subspace is None and rest["calibration"] is not None:
            subspace = "gradient"
        if subspace is None:
            by_steps = rest["budget"] is not None and rest["allocation"] is None and rank is None
            subspace = "dropped" if by_steps else "svd"
        return Request(1 / 8 if rank is None else rank, subspace, **rest)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError or TypeError, naming the argument, its value and what would work."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        self._check_subspace()
        self._check_numbers()
        self._check_exact_steps(model)
        self._check_allocation()
        if self.backend is not None:
            check_name(self.backend, "backend")
        for name, module in model.named_modules():
            if isinstance(module, LoGELinear) and module.converted:
                raise ValueError(f"model is converted already (layer {name!r}); call loge_kernels.remove(model) first")

    def _check_subspace(self) -> None:
        rank, subspace = self.rank, self.subspace
        if isinstance(rank, int) and rank < 1:
            raise ValueError(f"rank={rank!r}; give an int from 1 up, or a float in (0, 1]")
        resolve_rank(min(rank, 1) if isinstance(rank, int) else rank, 1, 1)
        if subspace not in SUBSPACES:
            raise ValueError(f"subspace={subspace!r} is unknown; choose one of {', '.join(map(repr, SUBSPACES))}")
        if self.low_rank_dtype is not None:
            EightBitWeight(self.low_rank_dtype, "low_rank_dtype")  # its message
            if subspace == "dropped":
                raise ValueError(
                    f"low_rank_dtype={self.low_rank_dtype!r} is for products with factors, and subspace='dropped' has "
                    "none: give a rank, or a subspace that has"
                )
        if subspace in FROM_CALIBRATION and self.calibration is None:
            raise ValueError(
                f"subspace={subspace!r} needs gradients of your task: give calibration=, batches or what "
                "loge_kernels.calibrate(model, batches) returned"
            )
        if subspace not in FROM_CALIBRATION and self.calibration is not None:
            raise ValueError(f"calibration goes with subspace='gradient' or 'salience', not with {subspace!r}")
        if self.salience not in READINGS:
            raise ValueError(f"salience={self.salience!r} is unknown; choose one of {', '.join(map(repr, READINGS))}")
        if self.refresh_every is None:
            return
        if isinstance(self.refresh_every, bool) or not isinstance(self.refresh_every, int) or self.refresh_every < 1:
            raise ValueError(f"refresh_every={self.refresh_every!r}; give a number of optimizer steps from 1 up")
        if subspace != "gradient":
            raise ValueError(f"refresh_every follows the gradient: it goes with subspace='gradient', not {subspace!r}")

    def _check_numbers(self) -> None:
        names = ("budget", "exact_every", "exact_fraction", "residual", "correction")
        for name in names:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
        if not 0.0 <= self.exact_fraction <= 1.0:
            raise ValueError(f"exact_fraction={self.exact_fraction!r} is not a share of the rows in [0, 1]")
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise ValueError(f"budget={self.budget!r} is not a share of the dense flops in (0, 1]")
        if not 0.0 <= self.residual <= 1.0:
            raise ValueError(f"residual={self.residual!r} is not a share of a weight's rows in [0, 1]")

    def _check_exact_steps(self, model: nn.Module) -> None:
        if self.exact_dtype is not None:
            EightBitWeight(self.exact_dtype)  # its message
        every, budget, correction = self.exact_every, self.budget, self.correction
        if every is not None and not 1.0 <= every < math.inf:
            raise ValueError(f"exact_every={every!r}: one step in so many is exact; give a number from 1 up")
        if budget is not None and every is not None and self.allocation is None:
            raise ValueError(
                f"budget={budget!r} decides how often a step is exact; give it or exact_every={every!r}, or with "
                "allocation= both"
            )
        if correction is None:
            return
        if not 0.0 <= correction < 1.0:
            raise ValueError(f"correction={correction!r} is the decay of a running mean; give one in [0, 1), or None")
        if every is not None or (budget is not None and self.allocation is None):
            for name, p in model.named_parameters():
                if p.requires_grad and hasattr(p, "placements"):
                    raise ValueError(f"correction={correction!r}: {name} is sharded (FSDP); give correction=None")

    def _check_allocation(self) -> None:
        if self.allocation is None:
            return
        if self.allocation not in ALLOCATIONS:
            known = ", ".join(map(repr, ALLOCATIONS))
            raise ValueError(f"allocation={self.allocation!r} is unknown; choose one of {known}, or None")
        if self.budget is None:
            raise ValueError(f"allocation={self.allocation!r} spends a budget among the layers: give budget= too")
        if self.subspace == "dropped":
            raise ValueError(f"allocation={self.allocation!r} gives out ranks, and subspace='dropped' has none")
        if isinstance(self.rank, int):
            raise ValueError(
                f"rank={self.rank} with allocation={self.allocation!r}, which gives out the ranks: leave it, or for "
                "'depth' give a share in (0, 1]"
            )
        if self.allocation == "energy" and self.subspace not in FROM_CALIBRATION:
            raise ValueError(f"allocation='energy' needs calibration=: subspace={self.subspace!r} measures no energies")
        if self.residual or self.exact_fraction:
            raise ValueError(f"allocation={self.allocation!r} counts neither residual= nor exact_fraction=: leave them")
