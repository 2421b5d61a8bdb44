"""Commands whose options are the fields of a dataclass: each option is written once, where it is used.

    rank: Annotated[int | float, typer.Option("--rank", "-R", help="R: an int, or a share of min(N, K).")] = 1 / 16

is the option and its default. A field without an annotation of typer's is none. A field that holds several values is
given by repeating its option, or by values with commas between; one marked `WHOLE` only by repeating it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from loge_kernels.command_line import leave, number, numbers, split

WHOLE = object()  # of a field whose values may hold commas
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Text = Annotated[Sequence[Path], typer.Option(help="Files to train on; default: Python's standard library.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]
Resumed = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file after every run, and skip what it holds already."),
]


def add_command(app: typer.Typer, name: str, options: type, run: Callable[[Any], dict[str, Any]], help: str) -> None:
    """`app NAME`: the fields of the dataclass `options` as options, and `run(options)`. Its exit status is 1 where the
    report that `run` returns says that it has not "passed"."""
    parameters, readers = [], {}
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        info = next((copy.copy(extra) for extra in extras if isinstance(extra, ParameterInfo)), None)
        if info is None:
            continue
        given, readers[field.name] = _read(get_args(hint)[0], extras, _flag(info, field.name))
        default = field.default
        if default is dataclasses.MISSING:
            default = None if field.default_factory is not dataclasses.MISSING else inspect.Parameter.empty
        elif given == list[str] | None or given == list[Path] | None:
            info.show_default = ", ".join(map(str, default)) or False
            default = None
        elif given is str and default is not None:
            default = str(default)
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[given, info]
            )
        )

    def work(given: dict[str, Any]) -> bool:
        values = {name: readers[name](value) for name, value in given.items() if value is not None}
        return bool(run(options(**values)).get("passed", True))

    def command(**given: Any) -> None:
        leave(partial(work, given))

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
    if get_origin(kind) is Mapping:
        return list[str] | None, own[0]
    if get_origin(kind) is Sequence:
        item = get_args(kind)[0]
        if item is Path:
            return list[Path] | None, tuple
        if item is not str:
            return list[str] | None, partial(_numbers, flag, item)
        return list[str] | None, tuple if WHOLE in extras else lambda values: tuple(split(values))
    if float in get_args(kind) and int in get_args(kind):
        return str, partial(number, flag)
    return kind, lambda value: value


def _numbers(flag: str, item: Any, values: Sequence[str]) -> tuple[int | float, ...]:
    found = numbers(flag, values)
    for value in found:
        if item is int and not isinstance(value, int):
            raise ValueError(f"--{flag} {value!r} is not an integer")
    return tuple(found)
