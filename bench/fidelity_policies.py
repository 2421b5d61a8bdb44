"""Policies as they are typed: what `bench fidelity` may give to `loge.apply`, and the controls beside it.

exact                       PEFT's exact LoRA, untouched: the measure of all others
exact:cost=0.35             the same with fewer steps, as many as cost what a policy of that cost does in all
gradient:rank=1/8           a subspace, then arguments of `loge.apply`
dropped:exact_fraction=1/4  no low-rank part, the heaviest quarter of the tokens exact
float8, int8                every step exact, its dense products in 8 bits
budget=0.45,steps=1.1       any of them for 1.1 times the steps of the others, its schedule stretched with them
budget=0.35                 arguments of `loge.apply` alone
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import loge_kernels as loge
from loge_kernels.eight_bit import DTYPES
from loge_kernels.request import SUBSPACES

DEFAULTS = (
    "exact",
    "dropped",
    "random:rank=1/8",
    "svd:rank=1/16",
    "svd:rank=1/8",
    "svd:rank=1/4",
    "gradient:rank=1/16",
    "gradient:rank=1/8",
    "gradient:rank=1/4",
    "salience:rank=1/8",
    "float8",
    "int8",
    "dropped:exact_fraction=1/4",
    "budget=0.15",
    "budget=0.25",
    "budget=0.35",
    "budget=0.45",
    "exact:cost=0.15",
    "exact:cost=0.25",
    "exact:cost=0.35",
    "exact:cost=0.45",
)
EXACT = "exact"
# What a calibration must hold for each subspace that needs one; `calibration=` names it for other policies.
CALIBRATIONS = {"gradient": "statistics", "salience": "scores"}
# The text that a seed draws from is so many times what its steps train on: no sequence comes twice.
LONGEST = 2
_FIXED = ("model", "targets", "backend")


@dataclass(frozen=True, slots=True)
class FidelityPolicy:
    """One line of the comparison.

    text: as typed, without spaces; it identifies the policy in a file.   arguments: of `loge.apply`, calibration apart.
    calibration: None, "statistics" or, with gradient scores, "scores".   same_cost: for exact LoRA with fewer steps,
    the cost of the policies that it stands beside, else None.   stretch: its steps over those of the others.
    """

    text: str
    arguments: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    same_cost: float | None = None
    stretch: float = 1.0

    @property
    def applied(self) -> bool:
        """Whether `loge.apply` has a part in it."""
        return _split(self.text)[0] != EXACT

    @property
    def family(self) -> str:
        """What the plot joins by a line: the policies that differ in rank, budget or cost alone."""
        if self.same_cost is not None:
            return "exact, fewer steps"
        name, items = _split(self.text)
        rest = [item for item in items if item.partition("=")[0] not in ("rank", "budget")]
        first = name or ("budget" if "budget" in self.arguments else "")
        return ":".join(part for part in (first, ",".join(rest)) if part) or self.text

    def steps(self, whole: int) -> int:
        """How many steps it takes where the others take `whole`."""
        share = self.stretch if self.same_cost is None else total_time(self.same_cost)
        return max(1, round(whole * share))


def total_time(cost: float) -> float:
    """Of a step, against exact LoRA's: the forward costs as much as the exact backward of the frozen products."""
    return (1.0 + cost) / 2.0


def parse(text: str) -> FidelityPolicy:
    """The policy that `text` names. Raises ValueError, naming what is wrong and what would work."""
    text = "".join(text.split())
    name, items = _split(text)
    values: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (equals and key and value):
            raise ValueError(f"--policy {text!r}: {item!r} is not of the form name=value")
        values[key] = _value(value)
    stretch = values.pop("steps", 1.0)
    if not (isinstance(stretch, (int, float)) and 0.0 < stretch <= LONGEST):
        raise ValueError(f"--policy {text!r}: steps={stretch!r}; give its steps over those of the others, in (0, 2]")
    if name == EXACT:
        cost = values.pop("cost", None)
        if values or (cost is not None and stretch != 1.0):
            raise ValueError(
                f"--policy {text!r}: exact LoRA takes cost=, of the policies beside it, or steps=, and nothing else"
            )
        if cost is not None and not (isinstance(cost, (int, float)) and 0.0 <= cost < 1.0):
            raise ValueError(f"--policy {text!r}: cost={cost!r} is not a share of the dense backward in [0, 1)")
        return FidelityPolicy(text, same_cost=cost, stretch=stretch)
    if name in DTYPES:
        values = {"exact_every": 1, "exact_dtype": name, **values}
    elif name in SUBSPACES:
        values = {"subspace": name, **values}
    elif name or not values:
        known = ", ".join((EXACT, *SUBSPACES, *DTYPES))
        raise ValueError(f"--policy {text!r}: {name!r} is unknown; start with one of {known}, or give budget=0.35")
    calibration = values.pop("calibration", CALIBRATIONS.get(str(values.get("subspace"))))
    if calibration not in (None, *CALIBRATIONS.values()):
        raise ValueError(f"--policy {text!r}: calibration={calibration!r}; give statistics or scores")
    allowed = [key for key in inspect.signature(loge.apply).parameters if key not in _FIXED]
    for key in values:
        if key not in allowed:
            raise ValueError(f"--policy {text!r}: {key!r} is no argument of apply; it takes {', '.join(allowed)}")
    return FidelityPolicy(text, values, calibration, stretch=stretch)


def _split(text: str) -> tuple[str, list[str]]:
    """The name before the colon, "" where there is none, and the items."""
    name, colon, rest = text.partition(":")
    if not colon and "=" in name:
        name, rest = "", name
    return name, rest.split(",") if rest else []


def _value(text: str) -> Any:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return text
