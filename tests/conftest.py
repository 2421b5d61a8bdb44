"""What every test starts from: one thread, a fixed seed, a cache of its own and no backend chosen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from finetuning import base, finished, kept_factors, tiny, whole  # noqa: F401 (fixtures)

# The package exports a function of the same name, so `from loge_kernels import backends` is not the module.
backends = import_module("loge_kernels.backends")


@pytest.fixture(autouse=True)
def clean_slate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOGE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_announced", set())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
