"""Tests that need a package which is not installed are skipped, and say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
WITHOUT_PEFT = "import sys, pytest; sys.modules['peft'] = None; sys.exit(pytest.main(sys.argv[1:]))"


def test_a_file_that_needs_peft_is_skipped_without_it() -> None:
    files = [str(TESTS / "layers" / "test_peft.py"), str(TESTS / "backend" / "test_naive.py")]
    command = [sys.executable, "-c", WITHOUT_PEFT, "-q", "-rs", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs peft" in done.stdout
    assert "8 passed, 1 skipped" in done.stdout
