"""Sphinx builds these pages: `make docs`. Pages are Markdown (MyST), the reference comes from the docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import loge_kernels

project = "loge_kernels"
author = "the authors of loge_kernels"
version = release = loge_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"loge_kernels {release}"
html_show_copyright = html_show_sphinx = False
pygments_style = "friendly"
smartquotes = False
if not Path(__file__).parents[1].joinpath("bench/results").exists():
    suppress_warnings = ["image.not_readable"]  # a source distribution has no measurements, nor pictures of them

napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures carry them, and Args say shapes and dtypes


def _markdown_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write code as Markdown does; reStructuredText wants it between double backticks, and a break that is
    not printed before a letter."""
    code = re.compile(r"`([^`]+)`(?=(\w?))")
    lines[:] = [code.sub(lambda m: f"``{m[1]}``" + ("\\ " if m[2] else ""), line) for line in lines]


def _plain_headings(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """napoleon's headings are of letters alone; bases are shown, so "Args, beside those of `X`" is Args."""
    lines[:] = [re.sub(r"^Args, .*:$", "Args:", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _plain_headings, priority=100)
    app.connect("autodoc-process-docstring", _markdown_code, priority=900)
