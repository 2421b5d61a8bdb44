"""This package's fine-tuning methods in PEFT's own registry, beside LoRA and its kin."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

# Modules that register a method each when they are imported.
METHODS: tuple[str, ...] = (".loretta", ".switchlora")


def register_peft_methods() -> None:
    """Make every method of this package known to PEFT, so that `PeftModel.from_pretrained` and `get_peft_model` find
    it. Again is fine."""
    for module in METHODS:
        import_module(module, __package__)


def register(name: str, config: type, model: Any) -> Any:
    """Register a method under the lower-case `name`, and return its member of `PeftType`.

    `model` is PEFT's tuner, whose `prefix` marks the method's parameters. PEFT takes methods whose name its enumeration
    holds and gives no way to add one, so the member is made here; where another package made it, it stays theirs.
    """
    member = PeftType.__members__.get(name.upper()) or _add_member(name.upper())
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)
    return member


def _add_member(name: str) -> Any:
    """`name` in `PeftType`, as if the class had been written with it."""
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    if sys.version_info >= (3, 11):
        member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if name not in vars(PeftType):
        type.__setattr__(PeftType, name, member)
    return member
