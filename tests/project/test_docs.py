"""The documentation is true: its code runs, its commands and messages exist, its links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pages
import pytest
import typer
from pages import PAGES, ROOT, blocks

import loge_kernels as loge
from loge_kernels.backend import choice as registry

pytest.importorskip("transformers")
peft_layers = pytest.importorskip("loge_kernels.layers.peft", exc_type=ImportError)

DOCS = ROOT / "docs"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
with_code = pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
_TOOLS = ("python", "make", "pip", "torchrun")
_ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=")


@with_code
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(peft_layers, "_FUSED", dict(peft_layers._FUSED))
    names = pages.namespace(tmp_path, monkeypatch)
    if "torchrun" in page.read_text():
        pages.as_torchrun(monkeypatch)
    for block in blocks(page, "python"):
        if block.missing is not None:
            warnings.warn(f"{page.name}, line {block.line}: not run, needs {block.missing}", stacklevel=1)
            continue
        pages.run(block, names)


@every_page
def test_commands_exist(page: Path) -> None:
    inline = re.findall(r"(?<!`)`((?:python -m loge_kernels|make) [^`]+)`", page.read_text())
    shell = "\n".join(block.text for block in blocks(page, "sh"))
    for line in [*shell.splitlines(), *inline]:
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if not words:
            continue
        assert words[0] in _TOOLS, line
        if words[:3] == ["python", "-m", "loge_kernels"]:
            check_command(words[3:], line)
        elif words[0] == "make":
            check_make(words[1:], line)


def check_command(words: list[str], line: str) -> None:
    """Its name, and that it has every option that the line gives it."""
    command: Any = typer.main.get_command(import_module("loge_kernels.__main__").app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and command.name == "bench":
        command = command.commands["linear"]  # what `bench` alone means
    known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
    given = [word for word in words if word.startswith("-")]
    assert set(given) <= known, f"{line}: {sorted(set(given) - known)} is no option"
    takes_words = any(parameter.param_type_name == "argument" for parameter in command.params)
    assert given or takes_words or set(words) <= {"…", "..."}, f"{line}: no such command"


def check_make(words: list[str], line: str) -> None:
    """Its targets, and that the Makefile reads the variables."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, assigned, _ = word.partition("=")
        known = rf"\$\((?:{name})\b|\(if \$\({name}\)" if assigned else rf"^{name}:"
        assert re.search(known, makefile, re.MULTILINE) or word == "...", f"{line}: {word}"


@every_page
def test_extras_and_variables_exist(page: Path) -> None:
    text = page.read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"(?:loge_kernels|\.)\[([a-z,]+)\]", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    for name in set(re.findall(r"\bLOGE_[A-Z_]+", text)):
        assert any(name in path.read_text() for path in sources()), f"nothing reads {name}"


@every_page
def test_public_names_exist(page: Path) -> None:
    for name in set(re.findall(r"\bloge\.([A-Za-z_]+)", page.read_text())):
        assert hasattr(loge, name), name


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text()
    listed = set(re.findall(r"auto\w+:: (?:[\w.]+\.)?(\w+)$", reference, re.MULTILINE))
    assert {*loge.__all__, *loge._LAZY} - listed == set()


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or (target.startswith("bench/results/") and not (ROOT / "bench" / "results").exists()):
            continue  # a source distribution has no measurements
        path, _, anchor = target.partition("#")
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_in_the_index(page: Path) -> None:
    if page.name != "index.md":
        assert re.search(rf"^{page.stem}$", (DOCS / "index.md").read_text(), re.MULTILINE)


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    assert sum(line.startswith("|") for line in lines) <= 25


@every_page
def test_a_page_holds_its_own_text(page: Path) -> None:
    assert not re.search(r"\{(?:literal)?include\}|\.\. (?:literal)?include::", page.read_text())


@every_page
def test_code_uses_no_private_name(page: Path) -> None:
    assert private_names(page.read_text()) == []


def private_names(text: str) -> list[str]:
    """Names with a leading underscore in a page's blocks and between its backticks."""
    fence = re.compile(r"^```(.*?)^```$", re.MULTILINE | re.DOTALL)
    code = [*fence.findall(text), *re.findall(r"`([^`]+)`", fence.sub("", text))]
    return [name for part in code for name in re.findall(r"(?<!\w)_[a-z]\w*", part)]


def test_what_is_private() -> None:
    page = "`a._hidden`, `requires_grad_()`, _emphasis_\n```python\nfrom a import _b, c_d\n__version__\n```\n"
    assert private_names(page) == ["_b", "_hidden"]


def test_messages_exist() -> None:
    table = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(table) > 40
    for message in table:
        # Where the source puts the argument's name in, too.
        forms = (message, re.sub(r"^\w+=", "…=", message))
        pattern = "|".join(".*".join(map(re.escape, form.split("…"))) for form in forms)
        assert any(re.search(pattern, text, re.DOTALL) for text in messages()), message


@cache
def messages() -> list[str]:
    """Every string of the package, with … where a value is put in."""
    return [text for path in sources() if path.suffix == ".py" for text in _strings(ast.parse(path.read_text()))]


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[srd]", "…", node.value)


@cache
def sources() -> list[Path]:
    folders = ("loge_kernels", "triton_kernels", "bench")
    return [*(path for name in folders for path in (ROOT / name).rglob("*.py")), ROOT / "setup.py"]
