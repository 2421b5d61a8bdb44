"""The Hopper kernel's index maths, compiled for the host with sanitizers and compared with brute force; no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

from toolchain import HOST_SOURCES, WARNINGS, build, cute_options, needs_compiler

pytestmark = needs_compiler


def passes(program: Path) -> bool:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout == "ok\n"


def test_schedule_fragments_exchange_and_plan(tmp_path: Path) -> None:
    assert passes(build(tmp_path / "maths", [HOST_SOURCES / "sm90_index_maths.cpp"], *WARNINGS))


def test_descriptors_read_what_tma_writes(tmp_path: Path) -> None:
    options = cute_options()
    # UBSan would double the compiler's time.
    assert passes(
        build(tmp_path / "descriptors", [HOST_SOURCES / "sm90_descriptors.cpp"], *options, sanitize="address")
    )
