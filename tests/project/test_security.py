"""What the package must never do with a file: unpickle it, run code from it, hand it to a shell, or believe it."""

from __future__ import annotations

import ast
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loge_kernels
from loge_kernels import bench, triton_kernels
from loge_kernels.backend import verified as verification
from loge_kernels.factors.cache import cached_factors
from loge_kernels.triton_kernels import tuning

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
    assert {"cache.py", "models.py", "baselines.py", "launch.py"} <= names
    assert len(names) > 100


# What lies in the cache may have been put there by anybody; hostile tables are in `test_triton_dispatch`


FACTORS = {"format": "loge_kernels factors 1", "energy": 0.5}
LEFT, RIGHT = torch.zeros(20, 4), torch.zeros(4, 30)


def write(path: Path, header: object, **tensors: torch.Tensor) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {"left": LEFT, "right": RIGHT}, path, metadata={"loge": text})


def overlapping(path: Path) -> None:
    """A tensor whose bytes lie beyond the end of the file."""
    header = {"left": {"dtype": "F32", "shape": [20, 4], "data_offsets": [0, 320]}}
    header["right"] = {"dtype": "F32", "shape": [4, 30], "data_offsets": [320, 10**12]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(800))


def factors_of(left: torch.Tensor, right: torch.Tensor, header: object = FACTORS) -> Callable[[Path], None]:
    return lambda path: write(path, header, left=left, right=right)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


HOSTILE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(3000)),
    "a directory": directory,
    "a pickle": lambda path: torch.save({"left": LEFT}, path),
    "a header of 2**60 bytes": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
    "bytes beyond the end": overlapping,
    "numbers that are none": factors_of(LEFT + torch.nan, RIGHT),
    "an energy that is none": lambda path: write(path, FACTORS | {"energy": math.nan}),
    "an endless energy": lambda path: write(path, '{"format": "loge_kernels factors 1", "energy": 1e999}'),
    "an energy above one": lambda path: write(path, FACTORS | {"energy": 1e30}),
    "an energy of many digits": lambda path: write(path, FACTORS | {"energy": 10**400}),
    "an energy that is a list": lambda path: write(path, FACTORS | {"energy": [0.5]}),
    "a list": lambda path: write(path, [1, 2]),
    "a deep nest": lambda path: write(path, "[" * 100_000),
    "no JSON": lambda path: write(path, "{"),
    "other tensors": lambda path: write(path, FACTORS, left=LEFT),
    "another dtype": factors_of(LEFT.half(), RIGHT.half()),
    "another dtype on the right": factors_of(LEFT, RIGHT.half()),
    "another shape": factors_of(LEFT, RIGHT[:3]),
    "another format": factors_of(LEFT, RIGHT, FACTORS | {"format": "loge_kernels factors 0"}),
    "no header": lambda path: save_file({"left": LEFT, "right": RIGHT}, path),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_hostile_factors_are_ignored(damage: Callable[[Path], None], tmp_path: Path, caplog: Any) -> None:
    weight = torch.randn(20, 30)
    good = cached_factors(weight, 4)
    (path,) = (tmp_path / "cache" / "factors").iterdir()
    damage(path)
    again = cached_factors(weight, 4)
    assert torch.equal(again.left, good.left)
    assert torch.equal(again.right, good.right)
    assert again.energy == good.energy
    assert caplog.text.count(f"ignoring the damaged cache file {path}") == 1
    if damage is not directory:  # which cannot be replaced by a file
        cached_factors(weight, 4)
        assert len(caplog.records) == 1, "it was written anew"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"verified": 7}',
        '{"verified": null}',
        '{"verified": {"reference": 1}}',
        '{"verified": "every backend"}',
        "[" * 100_000,
        b"\xff\xfe\x00",
        "1" * 10_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_hostile_record_verifies_nothing(text: str | bytes, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    (folder / "verified.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    verification.is_verified.cache_clear()
    assert not verification.is_verified("reference", torch.device("cpu"))
    assert "ignoring the damaged file" in caplog.text
    verification.record("reference", torch.device("cpu"))
    assert verification.is_verified("reference", torch.device("cpu"))
    verification.is_verified.cache_clear()


def test_a_link_in_the_cache_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    """What it points to, a file of the user's, keeps its content and its permissions."""
    weight = torch.randn(20, 30)
    cached_factors(weight, 4)
    (path,) = (tmp_path / "cache" / "factors").iterdir()
    records = tmp_path / "cache" / "verified.json"
    precious = tmp_path / "precious"
    precious.write_text("mine")
    precious.chmod(0o644)
    for link in (path, records):
        link.unlink(missing_ok=True)
        link.symlink_to(precious)
    cached_factors(weight, 4)
    verification.record("reference", torch.device("cpu"))
    verification.is_verified.cache_clear()
    assert precious.read_text() == "mine"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o644
    for written in (path, records):
        assert not written.is_symlink()
        assert stat.S_IMODE(written.stat().st_mode) == 0o600


@pytest.fixture
def shared_umask() -> Iterator[None]:
    """New files are everybody's, where nothing is done about it."""
    before = os.umask(0)
    yield
    os.umask(before)


WORK = {
    "factors": lambda: cached_factors(torch.randn(20, 30), 4),
    "record": lambda: verification.record("reference", torch.device("cpu")),
    "table": lambda: tuning.write_entries("a_card", (), "a test"),
}


@pytest.mark.parametrize("work", WORK)
def test_everything_in_the_cache_is_its_owners(work: str, tmp_path: Path, monkeypatch: Any, shared_umask: None) -> None:
    monkeypatch.setenv("LOGE_CACHE", str(tmp_path / "new" / "cache"))
    WORK[work]()
    verification.is_verified.cache_clear()
    found = [tmp_path / "new" / "cache", *(tmp_path / "new" / "cache").rglob("*")]
    assert len(found) > 1
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600) or path.suffix == ".lock", path


def test_the_lock_truncates_nothing(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    path = tuning.table_path("a_card")
    path.parent.mkdir(parents=True)
    path.with_suffix(".lock").symlink_to(precious)
    tuning.write_entries("a_card", (), "a test")
    assert precious.read_text() == "mine"
