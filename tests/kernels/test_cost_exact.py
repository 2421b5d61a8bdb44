"""The cost model of exact backward passes, by PyTorch and by the kernels around an exact dX."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loge_kernels import triton_kernels as tk
from loge_kernels.triton_kernels import cost_exact
from loge_kernels.triton_kernels.cost_exact import estimate_exact
from loge_kernels.triton_kernels.cost_model import Flags
from loge_kernels.triton_kernels.rates import DEFAULT, KNOWN

H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
P = 16
LINEARS = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]


class TestExact:
    def us(self, form: str, precision: str | None, gpu: str = H100) -> float:
        device = KNOWN[gpu]
        return sum(estimate_exact(form, precision, 8192, N, K, P, Flags(), device).predicted_us for N, K in LINEARS)

    def test_float8_is_1_45_times_as_fast_as_todays_bfloat16(self) -> None:
        """All linears of a block of LLaMA-3-8B, 8192 tokens, fast accumulation, scales by row."""
        now = self.us("torch", None)
        assert now / self.us("prepared", cost_exact.FAST) >= 1.45
        assert now / self.us("torch", cost_exact.FAST) < 1.25  # which the passes around dY hold
        assert now / self.us("prepared", "float8") == pytest.approx(1.33, abs=0.05)
        assert now / self.us("prepared", None) > 1.05

    @pytest.mark.parametrize(
        ("N", "K", "M", "form", "precision", "estimated"),
        [
            (4096, 4096, 8192, "torch", None, 520),
            (4096, 4096, 8192, "torch", "float8", 469),
            (4096, 4096, 8192, "torch", "float8 fast", 430),
            (4096, 4096, 8192, "prepared", "float8 fast", 342),
            (14336, 4096, 8192, "torch", None, 1601),
            (14336, 4096, 8192, "torch", "float8", 1401),
            (4096, 14336, 8192, "torch", "float8 fast", 1138),
            (1024, 4096, 8192, "torch", None, 212),
        ],
    )
    def test_an_exact_backward_is_within_its_15_percent(
        self, N: int, K: int, M: int, form: str, precision: str | None, estimated: float
    ) -> None:
        found = estimate_exact(form, precision, M, N, K, P, Flags(), KNOWN[H200]).predicted_us
        assert found == pytest.approx(estimated, rel=0.15)

    def test_reads_of_dy(self) -> None:
        """Of 16 bits: three and the quantisation's two by PyTorch, two by our kernels."""
        M, N, K = 8192, 14336, 4096

        def reads(form: str, precision: str | None, *names: str) -> float:
            found = estimate_exact(form, precision, M, N, K, P, Flags(), DEFAULT)
            return sum(phase.hbm_bytes for phase in found.phases if phase.name in names) / (2 * M * N)

        around = ("T", "dB", "prepare", "quantise")
        assert reads("torch", None, *around) == pytest.approx(2, abs=0.02)
        assert reads("torch", "float8", *around) == pytest.approx(4.5, abs=0.02)  # and q, half as wide, written
        assert reads("prepared", "float8", *around) == pytest.approx(2.5, abs=0.02)
        assert reads("prepared", None, *around) == pytest.approx(1, abs=0.02)

    def test_only_the_fused_product_writes_dx_once_and_reads_no_more_for_dA(self) -> None:
        M, N, K = 8192, 1024, 14336

        def after(form: str) -> float:
            found = estimate_exact(form, "float8", M, N, K, P, Flags(), DEFAULT)
            names = ("product", "adapter", "dA")
            return sum(phase.hbm_bytes for phase in found.phases if phase.name in names) / (2 * M * K)

        assert after("prepared") == pytest.approx(1 + 2 + 1, abs=0.15)
        assert after("fused") == pytest.approx(1 + 1, abs=0.15)

    def test_sums_of_int8_are_written_read_and_done(self) -> None:
        """By cuBLAS, then by one pass, where PyTorch takes two more, and one for the adapter."""
        M, N, K = 8192, 4096, 14336
        found = estimate_exact("summed", "int8", M, N, K, P, Flags(), DEFAULT)
        nbytes = [phase.hbm_bytes for phase in found.phases if phase.name == "product"]
        assert nbytes == [M * N + N * K + 4 * M * K, (4 + 2 + 2) * M * K]
        alone = estimate_exact("summed", "int8", M, N, K, P, Flags(need_dA=False), DEFAULT)
        assert [phase.hbm_bytes for phase in alone.phases if phase.name == "product"][1] == (4 + 2) * M * K
        for gpu in (H100, A100):
            times = {form: self.us(form, "int8", gpu) for form in (*cost_exact.FORMS, "summed")}
            assert min(times, key=lambda form: times[form]) == "summed"

    @pytest.mark.parametrize(
        ("N", "K", "name", "form"),
        [
            (4096, 4096, "float8", "prepared"),
            (1024, 4096, "float8", "fused"),
            (4096, 4096, None, "prepared"),
            (4096, 4096, "int8", "summed"),
        ],
    )
    def test_the_choice(self, N: int, K: int, name: str | None, form: str) -> None:
        device = KNOWN[H100]
        assert tk.choose_exact(8192, N, K, P, torch.bfloat16, name, device, Flags()) == form
        times = {
            one: estimate_exact(one, name, 8192, N, K, P, Flags(), device).predicted_us
            for one in (*cost_exact.FORMS, *(["summed"] if name == "int8" else []))
        }
        assert min(times, key=lambda one: times[one]) == form

    def test_what_the_kernels_cannot_take_stays_with_torch(self) -> None:
        def choose(**changes: Any) -> str:
            arguments = {
                "N": 4096,
                "K": 4096,
                "P": P,
                "dtype": torch.bfloat16,
                "eight_bits": "float8",
                "device": KNOWN[H100],
            }
            return tk.choose_exact(M=8192, flags=Flags(), **(arguments | changes))

        assert choose() == "prepared"
        assert choose(P=72) == choose(dtype=torch.float64) == choose(dtype=torch.float32) == "torch"
        assert choose(N=4100) == choose(device=KNOWN[A100]) == "torch"
        without_dx = tk.choose_exact(8192, 1024, 4096, P, torch.bfloat16, "float8", KNOWN[H100], Flags(need_dx=False))
        assert without_dx in ("torch", "prepared")
        fast = [choose(N=1024, fast_accumulation=fast) for fast in (False, True)]
        assert fast == ["fused", "fused"]


def test_an_unknown_hopper_has_its_8_bit_rates() -> None:
    from loge_kernels.triton_kernels.devices import from_properties

    ada = from_properties(SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58))
    assert (ada.float8 > 0, KNOWN[A100].float8 > 0) == (True, False)
    assert 0.0 < ada.tflops_16_sustained <= ada.tflops_16
