"""What "auto" may choose: only what has passed on this device, with these versions. Damaged: `test_security`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from loge_kernels.backend import verified as verification

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    verification.is_verified.cache_clear()


def test_recorded_and_read_back(tmp_path: Path) -> None:
    assert not verification.is_verified("triton", CPU)
    verification.record("triton", CPU)
    assert verification.is_verified("triton", CPU)
    assert not verification.is_verified("cuda", CPU)
    verification.record("cuda", CPU)
    assert len(json.loads((tmp_path / "cache" / "verified.json").read_text())["verified"]) == 2


def test_another_version_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    verification.record("triton", CPU)
    verification.is_verified.cache_clear()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert not verification.is_verified("triton", CPU)


def test_without_a_cache_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LOGE_CACHE", "off")
    with caplog.at_level(logging.WARNING, "loge_kernels"):
        verification.record("triton", CPU)
    assert "LOGE_CACHE=off" in caplog.text
    assert not verification.is_verified("triton", CPU)
