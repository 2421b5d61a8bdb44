"""The arguments of `apply` as one value, and everything that can be said of them before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..backend.choice import check_name
from ..batches import Batch
from ..factors.factors import PROJECTIONS, SUBSPACES, resolve_rank
from ..factors.statistics import Statistics
from ..factors.subspaces import READINGS
from ..freezing.plan import FreezePlan
from ..layers.linear import LoGELinear
from ..numerics.eight_bit import DTYPES
from ..numerics.exact_dtypes import EXACT_DTYPES
from ..op.arguments import share
from .exact_dtype import AUTO

# What is said of a low-rank backward, and its value where nothing is said.
_OF_LOW_RANK = {
    "subspace": None,
    "calibration": None,
    "exact_layers": 0.0,
    "exact_every": None,
    "low_rank_dtype": None,
    "exact_fraction": 0.0,
    "residual": 0.0,
    "salience": "taylor",
}

# Where libraries keep functions that compute adapter and frozen weight without calling the layers.
_RIVALS = ("unsloth.kernels.fast_lora", "axolotl.kernels.lora")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplyOptions:
    """As documented at `apply`. A bad value raises ValueError or TypeError with the argument, the value and what would
    work."""

    rank: int | float | tuple[float, float] | None
    subspace: str | None
    calibration: Statistics | Iterable[Batch] | None
    exact_layers: float
    exact_every: int | None
    exact_dtype: str | None
    base_dtype: str | None
    low_rank_dtype: str | None
    exact_fraction: float
    residual: float
    salience: str
    freeze_below: int | FreezePlan | None
    backend: str | None

    def __post_init__(self) -> None:
        self._check_types()
        if self.rank is None:
            given = [name for name, default in _OF_LOW_RANK.items() if getattr(self, name) != default]
            if given:
                value = "" if given[0] == "calibration" else repr(getattr(self, given[0]))
                raise ValueError(
                    f"{given[0]}={value} is for a low-rank backward, and rank is None: every layer would be exact; "
                    "give rank= too, an int or a share in (0, 1]"
                )
        elif isinstance(self.rank, tuple):
            if len(self.rank) != 2 or not all(isinstance(share, float) and 0.0 < share <= 1.0 for share in self.rank):
                raise ValueError(
                    f"rank={self.rank!r}; a pair is of two shares in (0, 1], that of the layer nearest the input and "
                    "that of the one nearest the output"
                )
        elif isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank < 1:
            raise ValueError(f"rank={self.rank!r}; give an int from 1 up, or a float in (0, 1]")
        else:
            resolve_rank(min(self.rank, 1) if isinstance(self.rank, int) else self.rank, 1, 1)
        self._check_base()
        self._check_subspace()
        self._check_ranges()
        if self.backend is not None:
            check_name(self.backend, "backend")

    @property
    def directions(self) -> str:
        """The subspace: what was asked for, or what goes with a calibration or none."""
        if self.subspace is not None:
            return self.subspace
        return "svd" if self.calibration is None else "gradient"

    def check_model(self, model: nn.Module) -> None:
        """Raise TypeError or ValueError for what is no module, or is converted already."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        for name, module in model.named_modules():
            if isinstance(module, LoGELinear) and module.converted:
                raise ValueError(f"model is converted already (layer {name!r}); call loge_kernels.remove(model) first")
            rival = _rival(module)
            if rival is not None:
                raise ValueError(
                    f"in {name!r} {rival}'s fused LoRA kernels run in the place of the layers, and this package would "
                    "change nothing: adapt the model by peft.get_peft_model, or turn those kernels off"
                )

    def _check_types(self) -> None:
        for name in ("exact_layers", "exact_fraction", "residual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
        for name in ("subspace", "exact_dtype", "base_dtype", "low_rank_dtype", "salience", "backend"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a string")
        if isinstance(self.rank, list):
            raise TypeError(f"rank={self.rank!r} is a list; give a pair of shares as a tuple, {tuple(self.rank)!r}")
        every = self.exact_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
            raise TypeError(f"exact_every={every!r} is a {type(every).__name__}; give an int: one forward in so many")
        if self.calibration is not None and not isinstance(self.calibration, (Statistics, Iterable)):
            raise TypeError(
                f"calibration={self.calibration!r} is a {type(self.calibration).__name__}; give batches, or what "
                "loge_kernels.calibrate(model, batches) returned"
            )

    def _check_base(self) -> None:
        if self.base_dtype is None:
            return
        if self.base_dtype not in DTYPES:
            known = ", ".join(map(repr, DTYPES))
            raise ValueError(f"base_dtype={self.base_dtype!r} is unknown; choose one of {known}, or None")
        if self.exact_dtype != AUTO:
            raise ValueError(
                f"exact_dtype={self.exact_dtype!r} with base_dtype={self.base_dtype!r}: exact products are taken from "
                "the one 8-bit copy of the weight; leave exact_dtype at 'auto'"
            )

    def _check_subspace(self) -> None:
        chosen = self.directions
        if chosen not in SUBSPACES:
            raise ValueError(f"subspace={chosen!r} is unknown; choose one of {', '.join(map(repr, SUBSPACES))}")
        if chosen in PROJECTIONS and self.calibration is None:
            raise ValueError(
                f"subspace={chosen!r} needs gradients of your task: give calibration=, batches or what "
                "loge_kernels.calibrate(model, batches) returned"
            )
        if chosen not in PROJECTIONS and self.calibration is not None:
            raise ValueError(f"calibration goes with subspace='gradient' or 'salience', not with {chosen!r}")
        if self.salience not in READINGS:
            raise ValueError(f"salience={self.salience!r} is unknown; choose one of {', '.join(map(repr, READINGS))}")

    def _check_ranges(self) -> None:
        shares = {"exact_layers": "frozen weights", "exact_fraction": "rows", "residual": "rows of a weight"}
        for name, what in shares.items():
            share(name, getattr(self, name), what)
        if self.exact_every is not None and self.exact_every < 1:
            raise ValueError(
                f"exact_every={self.exact_every!r}: one forward in so many is exact; give an int from 1 up"
            )
        known = {"exact_dtype": (AUTO, *EXACT_DTYPES), "low_rank_dtype": tuple(DTYPES)}
        for name, choices in known.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}, or None")


def _rival(module: nn.Module) -> str | None:
    """The library one of whose functions stands on this module in the place of its own, or None."""
    for value in vars(module).values():
        function = getattr(value, "__func__", value)  # of a bound method
        home = getattr(getattr(function, "func", function), "__module__", None)  # of a functools.partial
        if home in _RIVALS:
            return home.partition(".")[0]
    return None
