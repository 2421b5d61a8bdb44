"""`bench host`: the Python of a call, with kernels that do nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loge_kernels as loge
from loge_kernels.backend import reference
from loge_kernels.bench.linear import host
from loge_kernels.bench.linear.operands import make_operands
from loge_kernels.op import linear as op


def test_rows_and_file(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    report = host.run(host.HostOptions(device="cpu", rounds=1, json=file))
    assert json.loads(file.read_text())["rows"] == report["rows"]
    first = report["rows"][0]
    assert (first["backend"], first["kernels"]) == ("the op alone", "null")
    times = first["microseconds"]
    for part in ("forward", "backward"):
        assert first[f"{part}_us"] == times[part] - times[f"empty {part}"]
    assert all(row["kernels"] == "null" for row in report["rows"])  # launched ones need a GPU
    whole = {row["layer"]: row["forward_us"] + row["backward_us"] for row in report["layers"]}
    assert list(whole) == ["PEFT", "exact, the op", "exact, small"]
    assert min(whole.values()) > 0.0
    assert "the op alone" not in [row.name for row in loge.backends()]


def test_no_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the forward's products nor the backward's are in the figure."""
    for name in ("matmul", "add_matmul"):
        monkeypatch.setattr(reference, name, lambda *given: pytest.fail("a product was taken"))
    operands = make_operands(8, 16, 24, (4,), 2, torch.float32, torch.device("cpu"))
    assert host.measure(operands, 1)


def test_each_layer_runs_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    small, function = op._small, op.Linear.apply
    monkeypatch.setattr(op, "_small", lambda *given: taken.append("small") or small(*given))
    monkeypatch.setattr(op.Linear, "apply", lambda *given: taken.append("function") or function(*given))
    host.layers(torch.device("cpu"), 1)
    assert set(taken) == {"small", "function"}
    assert taken.count("small") == taken.count("function")
    assert op.waits_for_host(torch.zeros(1, 1), torch.zeros(1, 1), "auto") is False, "it is back"


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        host.run(host.HostOptions(device="cpu", rounds=0))
