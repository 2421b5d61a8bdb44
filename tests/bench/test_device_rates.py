"""The rates of the cost model as `bench linear --tune` measures them, on a clock that knows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loge_kernels.bench.linear import device_rates
from loge_kernels.bench.linear.device_rates import measure_rates
from loge_kernels.triton_kernels import tuning
from loge_kernels.triton_kernels.rates import KERNEL_US, MEASURED

HBM, FLOPS, SKINNY, GAP = 2e12, 400e12, 0.5, 3e-6


class Clock:
    """Takes 2 TB/s for copies, half of it for skinny products, 400 TFLOP/s for the square one and half of it for the
    others, and 3 us and its start for each small kernel."""

    def record(self, call: Any) -> tuple[float, None]:
        if call.func is device_rates._in_turn:
            return 1e-3 + call.args[2] * (GAP + 1e-6 * KERNEL_US), None
        if call.func is not torch.matmul:
            return 2 * call.args[0].nbytes / HBM, None
        a, b = call.args
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if a.shape[0] == 16:
            return b.nbytes / (SKINNY * HBM), None
        return flops / FLOPS * (1 if b.shape[0] == b.shape[1] else 2), None

    def settle(self, tickets: Sequence[float]) -> list[float]:
        return list(tickets)


def measured() -> dict[str, Any]:
    return measure_rates(torch.device("cpu"), 64, 512, torch.float32, Clock(), hold=lambda: None, budget=0.01)


def test_every_rate_is_found() -> None:
    found = measured()
    assert set(found) == set(MEASURED)
    assert found["hbm_gbs"] == pytest.approx(HBM / 1e9)
    assert found["tflops_16"] == pytest.approx(FLOPS / 1e12)
    assert found["skinny"] == pytest.approx(SKINNY)
    assert found["gap_us"] == pytest.approx(3.0)
    assert found["narrow"] == [[80, 0.5], [144, 0.5], [272, 0.5], [512, 1.0]]


def test_they_are_what_the_users_table_takes() -> None:
    tuning.write_rates("here", measured(), "test")
    assert tuning.read_rates("here")["narrow"][-1] == (512, 1.0)


def test_a_rate_that_cannot_be_measured_is_named() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="rate of 'one' cannot be measured: RuntimeError: out of memory"):
        measure_rates(torch.device("cpu"), 64, 512, torch.float32, hold=fails, budget=0.01)


def test_they_are_kept_where_the_cost_model_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rates, "measure_rates", lambda device: measured())
    monkeypatch.setenv("LOGE_CACHE", str(tmp_path))
    environment = {"date": "today", "versions": {"torch": "2.13", "cuda": None}}
    rates, path = device_rates.keep(torch.device("cpu"), environment)
    assert path is not None
    assert '"bench linear, today: torch 2.13"' in Path(path).read_text()
    assert tuning.read_rates(Path(path).stem)["hbm_gbs"] == rates["hbm_gbs"]
    monkeypatch.setenv("LOGE_CACHE", "off")
    assert device_rates.keep(torch.device("cpu"), environment)[1] is None
