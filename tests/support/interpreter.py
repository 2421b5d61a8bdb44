"""Triton's interpreter, which must be chosen before Triton is first imported: tests in it run in a pytest of their own.

With TRITON_INTERPRET=1 in the environment they run directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from loge_kernels.triton_kernels.availability import interpreter_broken

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WHY_NOT = "Triton is not installed" if find_spec("triton") is None else interpreter_broken()
needs_triton = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What Python does with these arguments, in the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=500)


def assert_passes_interpreted(file: str) -> None:
    if INTERPRETED:
        pytest.skip("already in the interpreter")
    done = interpreted("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
