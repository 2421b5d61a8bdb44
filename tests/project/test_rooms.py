"""The plan of the house: which room may import which. docs/architecture.md draws it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import loge_kernels as loge

PACKAGE = Path(loge.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[2]
# What each room may import, lazily or not. A room is a folder, or a file that stands at the root.
MAY_IMPORT: dict[str, str] = {
    "numerics": "",
    "files": "",
    "collectives": "",
    "batches": "",
    "command_line": "",
    "machine": "",
    "terminal": "",
    "triton_kernels": "",
    "_C": "",
    "factors": "numerics files collectives",
    "freezing": "numerics collectives batches terminal",
    "backend": "numerics files machine triton_kernels _C",
    "op": "numerics factors backend",
    "layers": "numerics factors backend op",
    "check": "numerics factors backend op machine",
    "methods": "numerics layers",
    "conversion": "numerics factors backend op layers freezing collectives batches terminal triton_kernels",
    "integrations": "factors layers freezing numerics conversion",
    "finetune": "numerics factors layers freezing conversion methods files command_line machine",
    "bench": "numerics factors backend op check conversion finetune command_line machine triton_kernels __init__",
    "__main__": "__init__ backend bench check command_line finetune machine files triton_kernels",
    "__init__": "numerics factors backend op layers freezing conversion integrations methods triton_kernels",
}
FOLDERS = {"loge_kernels": PACKAGE, "bench": REPOSITORY / "bench", "triton_kernels": REPOSITORY / "triton_kernels"}


def sources() -> Iterator[tuple[str, str, Path]]:
    """Every module: its room, its dotted name below loge_kernels, its file."""
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            if name != "loge_kernels":
                parts = [name, *parts]
            yield parts[0], ".".join(parts), path


def imports() -> Iterator[tuple[str, str]]:
    """(room, room that it imports), for every import in every function."""
    rooms = set(MAY_IMPORT)
    for room, module, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            for target in _targets(node, module):
                top, _, rest = target.partition(".")
                if top != "loge_kernels":
                    continue
                found = rest.split(".")[0] if rest.split(".")[0] in rooms else "__init__"
                if found != room:
                    yield room, found


def _targets(node: ast.AST, module: str) -> Iterator[str]:
    """Absolute names of what an import statement, or a call of import_module, brings."""
    here = ["loge_kernels", *module.split(".")]
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = here[: -node.level] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{stem}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
        yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def test_every_room_is_on_the_plan() -> None:
    assert {room for room, _, _ in sources()} | {"_C"} == set(MAY_IMPORT)


def test_imports_go_where_the_plan_says_and_the_plan_has_none_too_many() -> None:
    assert set(imports()) == {(room, found) for room, all_found in MAY_IMPORT.items() for found in all_found.split()}


def test_there_is_no_circle_and_there_are_at_most_nine_floors() -> None:
    floors: dict[str, int] = {}
    for room in TopologicalSorter({room: found.split() for room, found in MAY_IMPORT.items()}).static_order():
        floors[room] = 1 + max((floors[below] for below in MAY_IMPORT[room].split()), default=0)
    assert max(floors.values()) <= 9


def test_no_module_at_the_root_bears_a_public_functions_name() -> None:
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    public = {name for name in (*loge.__all__, *loge._LAZY) if not isinstance(getattr(loge, name), type)}
    assert not modules & public


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_a_rooms_init_is_a_docstring(room: str) -> None:
    """No re-export, so that no function hides a module; `check.run` and what `finetune` documents are exceptions."""
    body = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
    docstring = ast.get_docstring(ast.Module(body, []))
    assert docstring is not None
    if room != "finetune":
        assert len([line for line in docstring.splitlines() if line]) == 3
        assert len(body) == 1 or (room == "check" and len(body) == 2)


def test_files_and_functions_are_short() -> None:
    """A Triton kernel's arguments count for nothing, and a docstring is not length."""
    long = []
    for path in [path for _, _, path in sources()] + list((REPOSITORY / "tests").rglob("*.py")):
        text = path.read_text()
        if text.count("\n") >= 420:
            long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0].lineno
                if node.end_lineno - first >= 100:
                    long.append(f"{path}: {node.name}")
    assert not long
