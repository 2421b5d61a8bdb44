"""`exact_dtype="auto"`: 8 bits where they are faster on this device, and the explicit choices as they were made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import loge_kernels as loge
from loge_kernels.conversion import exact_dtype
from loge_kernels.conversion.exact_dtype import choose
from loge_kernels.triton_kernels.dense import dense_us, faster_dtype
from loge_kernels.triton_kernels.devices import KNOWN

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
BFLOAT16 = torch.bfloat16


def outline(N: int, K: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A weight of which nothing is read but this."""
    return SimpleNamespace(shape=(N, K), dtype=dtype, device=torch.device(device), numel=lambda: N * K)


@pytest.mark.parametrize(
    ("N", "K", "dtype", "vnni", "expected", "word"),
    [
        (576, 576, torch.float32, True, "int8", "faster than float32"),
        (576, 576, torch.float32, False, None, "no int8 products"),
        (576, 576, BFLOAT16, True, None, "too small"),
        (2048, 2048, BFLOAT16, True, "int8", "faster than bfloat16"),
        (2048, 2048, torch.float16, True, "int8", "faster than float16"),
        (2048, 2048, BFLOAT16, False, None, "no int8 products"),
        (64, 64, torch.float32, True, None, "too small"),
        (2048, 2048, torch.float64, True, None, "float64 stays"),
    ],
)
def test_on_a_cpu(
    N: int, K: int, dtype: torch.dtype, vnni: bool, expected: str | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_dtype, "cpu_multiplies_int8", lambda: vnni)
    name, reason = choose(outline(N, K, dtype), "auto")
    assert name == expected
    assert word in reason
    for asked in ("float8", "int8", None):
        assert choose(outline(N, K, dtype), asked) == (asked, ""), "as it was asked for"


@pytest.mark.parametrize(
    ("capability", "shape", "dtype", "asked"),
    [
        ((9, 0), (4096, 4096), BFLOAT16, "float8"),
        ((8, 9), (4096, 4096), torch.float16, "float8"),
        ((8, 0), (4096, 4096), BFLOAT16, "int8"),
        ((9, 0), (4096, 4100), BFLOAT16, None),
        ((9, 0), (4096, 4096), torch.float64, None),
    ],
)
@pytest.mark.parametrize("wins", [True, False])
def test_on_a_gpu_the_cost_model_decides(
    capability: tuple[int, int],
    shape: tuple[int, int],
    dtype: torch.dtype,
    asked: str | None,
    wins: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what the GPU can run at all."""
    seen: list[str] = []

    def predicted(
        N: int, K: int, name: str, dtype: torch.dtype, device: torch.device, kernels: bool
    ) -> tuple[str | None, str]:
        assert not kernels
        seen.append(name)
        return (name if wins else None), "predicted"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(exact_dtype, "faster_dtype", predicted)
    name, reason = choose(outline(*shape, dtype, "cuda"), "auto")
    assert seen == ([] if asked is None else [asked])
    assert name == (asked if wins else None)
    assert reason


def test_a_dtype_that_cannot_run_is_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    name, reason = choose(outline(64, 64, BFLOAT16, "cuda"), "float8")
    assert name == "float8"
    assert "cannot run" in reason
    assert reason.endswith(": bfloat16")
    name, reason = choose(outline(64, 64, device="mps"), "auto")
    assert (name, reason) == (None, "no 8-bit products on mps")


@pytest.mark.parametrize(
    ("device", "name", "shape", "expected"),
    [
        (H100, "float8", (4096, 4096), None),
        (H100, "float8", (14336, 4096), None),
        (H100, "float8", (4096, 14336), "float8"),
        (H100, "float8", (1024, 1024), None),
        (H100, "int8", (1024, 4096), None),
        (A100, "int8", (256, 4096), None),
        (A100, "int8", (1024, 4096), None),
        (A100, "int8", (1024, 14336), None),
    ],
)
def test_what_is_predicted(device: str, name: str, shape: tuple[int, int], expected: str | None) -> None:
    found, reason = faster_dtype(*shape, name, BFLOAT16, device)
    assert found == expected
    own, eight = (dense_us(8192, *shape, BFLOAT16, KNOWN[device], which) for which in (None, name))
    assert reason == f"{name} predicted {own / eight:.2f}x bfloat16 on {device}"
    assert (eight < own) is (found is not None)


@pytest.mark.parametrize(
    ("device", "name", "shape", "expected"),
    [
        (H100, "float8", (4096, 4096), "float8"),
        (H100, "float8", (14336, 4096), "float8"),
        (A100, "int8", (14336, 4096), "int8"),
        (A100, "int8", (64, 4096), None),
    ],
)
def test_with_kernels_their_times_decide(device: str, name: str, shape: tuple[int, int], expected: str | None) -> None:
    assert faster_dtype(*shape, name, BFLOAT16, device, kernels=True)[0] == expected


@pytest.mark.parametrize(
    ("dtype", "verified", "kernels"),
    [(BFLOAT16, True, True), (BFLOAT16, False, False), (torch.float32, True, False)],
)
def test_kernels_count_where_auto_takes_them(
    dtype: torch.dtype, verified: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(exact_dtype, "is_verified", lambda name, device: verified and name == "triton")
    monkeypatch.setattr(exact_dtype, "faster_dtype", lambda *given: (seen.append(given[-1]), (None, ""))[1])
    choose(outline(4096, 4096, dtype, "cuda"), "auto")
    assert seen == [kernels]


def test_float16_is_scaled_outside_the_product() -> None:
    """cuBLAS gives row-wise scaled products in bfloat16 alone."""
    times = [dense_us(8192, 4096, 4096, dtype, KNOWN[H100], "float8") for dtype in (BFLOAT16, torch.float16)]
    assert times[1] > 1.2 * times[0]


def test_copies_are_there_before_a_graph_is_compiled() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    loge.apply(model, exact_dtype="int8")
    assert model[0].eight_bit.tensor is not None
    loge.remove(model)
    loge.apply(model, rank=16, exact_dtype="int8", exact_every=2)
    assert model[0].eight_bit.tensor is None  # not before the first exact forward
