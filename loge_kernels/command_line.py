"""Commands whose options are the fields of a dataclass: each option is written once, where it is used.

    rank: Annotated[int | float, typer.Option("--rank", "-R", help="R: an int, or a share of min(N, K).")] = 1 / 16

is the option and its default. A field without an annotation of typer's is none. A field that holds several values is
given by repeating its option, or by values with commas between; one marked `WHOLE` only by repeating it. A function
among the annotations makes the value of the text, or a mapping of the list of texts.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

SETTINGS = {"help_option_names": ["-h", "--help"]}
WHOLE = object()  # of a field whose values may hold commas
JSON = typer.Option("--json", help="Also write the result to this file, as JSON.")
Json = Annotated[Path | None, JSON]
Resumed = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file after every run, and skip what it holds already."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Text = Annotated[Sequence[str | Path], typer.Option(help="Files to train on; default: Python's standard library.")]


def add_command(app: typer.Typer, name: str, options: type, run: Callable[[Any], Any], help: str) -> None:
    """`app NAME`: the fields of the dataclass `options` as options, and `run(options)`. Its exit status is 1 where the
    report that `run` returns says that it has not "passed"."""
    parameters, readers = [], {}
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind, *extras = get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else (None,)
        info = next((copy.copy(extra) for extra in extras if isinstance(extra, ParameterInfo)), None)
        if info is None:
            continue
        given, readers[field.name] = _read(kind, extras, _flag(info, field.name))
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(field, given, info),
                annotation=Annotated[given, info],
            )
        )

    def work(given: dict[str, Any]) -> bool:
        values = {name: readers[name](value) for name, value in given.items() if value is not None}
        report = run(options(**values))
        return report is None or bool(report.get("passed", True))

    def command(**given: Any) -> None:
        exit_with(partial(work, given))

    made: Any = command
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=help)(command)


def _flag(info: ParameterInfo, field: str) -> str:
    names = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    return next((each for each in names if each.startswith("--")), field).removeprefix("--").replace("_", "-")


def _read(kind: Any, extras: Sequence[Any], flag: str) -> tuple[Any, Callable[[Any], Any]]:
    """What the command line takes for a field of type `kind`, and what makes the field's value of it."""
    own = [extra for extra in extras if callable(extra) and not isinstance(extra, (ParameterInfo, type))]
    kinds = [each for each in _members(kind) if each is not NoneType]
    optional = NoneType in _members(kind)
    if get_origin(kinds[0]) is Mapping:
        return list[str] | None, own[0]
    if get_origin(kinds[0]) is Sequence:
        item = get_args(kinds[0])[0]
        if Path in _members(item):
            return list[Path] | None, tuple
        if item is not str:
            return list[str] | None, partial(_numbers, flag, item)
        if WHOLE in extras:
            return list[str] | None, tuple
        return list[str] | None, lambda values: tuple(split(values)) or (None if optional else ())
    if own or (float in kinds and int in kinds):
        return str | None if optional else str, own[0] if own else partial(number, flag)
    if Path in kinds:
        return Path | None if optional else Path, lambda value: value
    return kind, lambda value: value


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _default(field: dataclasses.Field[Any], given: Any, info: ParameterInfo) -> Any:
    """The default on the command line; None leaves the field's own, which a list shows in its help."""
    if field.default is dataclasses.MISSING:
        return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else None
    if given in (list[str] | None, list[Path] | None):
        info.show_default = ", ".join(map(str, field.default or ())) or False
        return None
    return str(field.default) if given is str or (field.default and given == str | None) else field.default


def exit_with(work: Callable[[], bool]) -> None:
    """Run a command's work; exit with its status. What the user can put right is one line on standard error."""
    try:
        passed = work()
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if passed else 1)


def split(values: Sequence[str] | None) -> list[str]:
    """An option given several times, or once with commas, or both."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def numbers(option: str, values: Sequence[str] | None) -> list[int | float]:
    return [number(option, value) for value in split(values)]


def number(option: str, text: str) -> int | float:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--{option} {text!r} is not a number") from None


def _numbers(flag: str, item: Any, values: Sequence[str]) -> tuple[int | float, ...]:
    found = numbers(flag, values)
    for value in found:
        if item is int and not isinstance(value, int):
            raise ValueError(f"--{flag} {value!r} is not an integer")
    return tuple(found)


def check_counts(options: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields of `options` that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: give an integer of at least 1")


def write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n")
