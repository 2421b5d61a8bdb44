"""What the package must never do with a file: unpickle it, run code from it, or hand it to a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loge_kernels
from loge_kernels import bench, triton_kernels

_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_BUILTINS = {"eval", "exec", "compile", "__import__"}


def sources() -> list[Path]:
    """Every module of the package, where it is imported from."""
    folders = {Path(path) for package in (loge_kernels, bench, triton_kernels) for path in package.__path__}
    return sorted({path for folder in folders for path in folder.rglob("*.py")})


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from call_offences(node)


def call_offences(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in _BUILTINS or name in ("os.system", "os.popen"):
        yield name
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if given.get("trust_remote_code", "False") != "False":
        yield f"trust_remote_code={given['trust_remote_code']}"
    if given.get("shell", "False") != "False":
        yield f"{name} through a shell"


@pytest.mark.parametrize("path", sources(), ids=lambda path: "/".join(path.parts[-2:]))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ],
)
def test_the_search_finds(text: str) -> None:
    assert list(offences(ast.parse(text)))


def test_the_whole_package_is_searched() -> None:
    names = {path.name for path in sources()}
    assert {"cache.py", "models.py", "fidelity.py", "launch.py"} <= names
    assert len(names) > 100
