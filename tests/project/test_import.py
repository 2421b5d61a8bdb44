"""What `import loge_kernels` brings along: torch, and nothing that it can be used without."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

# What is imported on first use. Their import takes seconds, or they need not be installed.
_LATER = ("transformers", "peft", "accelerate", "typer", "matplotlib", "bitsandbytes", "torchao")


@cache
def imported() -> set[str]:
    code = "import sys, loge_kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", _LATER)
def test_left_for_later(name: str) -> None:
    assert "loge_kernels" in imported()
    assert name not in imported()


@pytest.mark.xfail(reason="the decorator torch.compiler.disable in quantized.py imports it", strict=True)
def test_the_compiler_and_triton_are_left_for_later() -> None:
    """torch._dynamo takes longer to import than all of torch, and imports Triton where that is installed."""
    assert not imported() & {"torch._dynamo", "triton"}
