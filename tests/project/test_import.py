"""What `import loge_kernels` brings along: torch, and nothing that it can be used without."""

from __future__ import annotations

import subprocess
import sys

# Imported on first use: it takes seconds, or need not be installed. torch._dynamo brings Triton with it.
_LATER = {"transformers", "peft", "typer", "matplotlib", "bitsandbytes", "torchao", "triton", "torch._dynamo"}


def test_left_for_later() -> None:
    code = "import sys, loge_kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    found = set(done.stdout.split())
    assert "loge_kernels" in found
    assert not found & _LATER
