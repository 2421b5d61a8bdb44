"""Policies as they are typed in `bench step` and `bench fidelity`: how the backward of the frozen layers runs.

peft                       PEFT's exact LoRA, untouched: the measure of all others
apply                      `loge.apply(model)`
exact                      `loge.apply(model, exact_dtype=None)`: exact in the weight's own dtype
rank=1/8,exact_layers=0.5  arguments of `loge.apply`, calibrated unless subspace=svd
rank=1/8..3/8              a pair: ranks that grow towards the output
random:rank=1/8            a control: factors of random directions
dropped                    a control: no low-rank part at all
exact:steps=1.1            any of them for 1.1 times the steps of the others, its schedule stretched with them
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

import loge_kernels as loge

from .controls import CONTROLS, control
from .paper.run import PaperPolicy

PEFT = "peft"
NAMED: dict[str, dict[str, Any]] = {PEFT: {}, "apply": {}, "exact": {"exact_dtype": None}, "dropped": {"rank": 1}}
# What a calibration must hold for each subspace that needs one.
_CALIBRATIONS = {"gradient": "statistics", "salience": "scores"}
# The text that a seed draws from is so many times what its steps train on: no sequence comes twice.
LONGEST = 2
_FIXED = ("model", "targets", "backend", "calibration")
_ON_PAPER = ("rank", "exact_layers", "exact_every", "exact_dtype", "base_dtype")


@dataclass(frozen=True, slots=True)
class Policy:
    """One line of a comparison.

    text: as typed, without spaces; it identifies the policy in a file.   arguments: of `loge.apply`, calibration apart.
    control: of `CONTROLS`, or None.   stretch: its steps over those of the others.
    """

    text: str
    arguments: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    stretch: float = 1.0

    @property
    def peft(self) -> bool:
        """Whether it is PEFT's own, and `loge.apply` has no part in it."""
        return self.text.partition(":")[0] == PEFT

    @property
    def low_rank(self) -> bool:
        return self.arguments.get("rank") is not None

    @property
    def calibration(self) -> str | None:
        """What it is calibrated by: None, "statistics" or, with gradient scores, "scores"."""
        if not self.low_rank or self.control is not None:
            return None
        return _CALIBRATIONS.get(self.arguments.get("subspace", "gradient"))

    def steps(self, whole: int) -> int:
        """How many steps it takes where the others take `whole`."""
        return max(1, round(whole * self.stretch))

    def apply(self, model: nn.Module, calibration: Any = None, backend: str | None = None) -> loge.Report | None:
        """Change `model`; None for PEFT's own. Raises ValueError, naming the policy, for what `loge.apply` refuses."""
        if self.peft:
            return None
        try:
            if self.control is None:
                return loge.apply(model, **self.arguments, calibration=calibration, backend=backend)
            with control(self.control):
                return loge.apply(model, **self.arguments, backend=backend)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--policy {self.text!r}: {error}") from error

    def for_speed(self) -> Policy:
        """The same with random directions, which take no calibration and no decomposition."""
        if not self.low_rank or self.control is not None:
            return self
        rest = {name: value for name, value in self.arguments.items() if name not in ("subspace", "salience")}
        return Policy(self.text, rest, "random", self.stretch)

    def on_paper(self, layers: int | None = None) -> PaperPolicy:
        """The same for `paper.run.predict`; `layers`: how many the model has that freeze_below= counts in. Raises
        ValueError for an argument that changes the time and that a step on paper does not know."""
        if self.peft:
            return PaperPolicy(self.text, peft=True)
        arguments = dict(self.arguments)
        below = arguments.pop("freeze_below", 0) if layers else 0
        for name in arguments:
            if name not in (*_ON_PAPER, "subspace", "salience"):
                raise ValueError(f"--policy {self.text!r}: a step on paper has no {name}=; it knows {_list(_ON_PAPER)}")
        known = {name: arguments[name] for name in _ON_PAPER if name in arguments}
        if isinstance(known.get("rank"), tuple):
            known["rank"] = sum(known["rank"]) / 2  # what a rank costs is proportional to it
        if below:
            known["frozen"] = below / (layers or below)
        return PaperPolicy(self.text, **{"exact_dtype": "auto", **known})


def parse(text: str) -> Policy:
    """The policy that `text` names. Raises ValueError, naming what is wrong and what would work."""
    text = "".join(text.split())
    name, items = _split(text)
    values: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (equals and key and value):
            raise ValueError(f"--policy {text!r}: {item!r} is not of the form name=value")
        values[key] = argument(value)
    stretch = values.pop("steps", 1.0)
    if not (isinstance(stretch, (int, float)) and 0.0 < stretch <= LONGEST):
        raise ValueError(
            f"--policy {text!r}: steps={stretch!r}; give its steps over those of the others, in (0, {LONGEST}]"
        )
    if name not in ("", *NAMED, *CONTROLS) or not (name or values):
        raise ValueError(
            f"--policy {text!r}: {name!r} is unknown; start with one of {_list((*NAMED, 'random'))}, or give arguments "
            "of apply, such as rank=1/8,exact_layers=0.5"
        )
    if name == PEFT and values:
        raise ValueError(f"--policy {text!r}: PEFT's own backward takes steps=, and nothing else")
    allowed = [key for key in inspect.signature(loge.apply).parameters if key not in _FIXED]
    for key in values:
        if key not in allowed:
            raise ValueError(f"--policy {text!r}: {key!r} is no argument of apply; it takes {_list(allowed)}")
    policy = Policy(text, NAMED.get(name, {}) | values, name if name in CONTROLS else None, stretch)
    if policy.control is not None and not policy.low_rank:
        raise ValueError(f"--policy {text!r}: give rank= as well, such as random:rank=1/8")
    return policy


def parse_all(texts: Sequence[str]) -> list[Policy]:
    """All of `texts`, in order, each once."""
    return list({policy.text: policy for policy in map(parse, texts)}.values())


def argument(text: str) -> Any:
    """The value of an argument as it is typed: none, an int, a number or a fraction of two, two of these with two dots
    between them, or a word."""
    if text.lower() == "none":
        return None
    pair = text.split("..")
    if len(pair) == 2 and not any(isinstance(argument(part), str) for part in pair):
        return tuple(map(argument, pair))
    for number in (int, _fraction):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return number(text)
    return text


def _fraction(text: str) -> float:
    return float(Fraction(text))


def _split(text: str) -> tuple[str, list[str]]:
    """The name before the colon, "" where there is none, and the items."""
    name, colon, rest = text.partition(":")
    if not colon and "=" in name:
        name, rest = "", name
    return name, rest.split(",") if rest else []


def _list(names: Any) -> str:
    return ", ".join(names)
