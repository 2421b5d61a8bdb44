"""The cost model of exact backward passes, by PyTorch and by the kernels around an exact dX."""

from __future__ import annotations

import json
from pathlib import Path
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
RESULTS = Path(__file__).parents[2] / "bench/results/h200"
LINEARS = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]


class TestExact:
    def us(self, form: str, precision: str | None, gpu: str = H100) -> float:
        device = KNOWN[gpu]
        return sum(estimate_exact(form, precision, 8192, N, K, P, Flags(), device).predicted_us for N, K in LINEARS)

    def test_float8_is_1_45_times_as_fast_as_todays_bfloat16(self) -> None:
        """All linears of a block of LLaMA-3-8B, 8192 tokens, fast accumulation, scales by row."""
        now = self.us("torch", None)
        assert now / self.us("prepared", cost_exact.FAST) >= 1.45
        assert now / self.us("torch", cost_exact.FAST) < 1.1  # which the passes around dY hold
        assert now / self.us("prepared", "float8") == pytest.approx(1.44, abs=0.05)
        assert now / self.us("prepared", None) > 1.05

    def test_the_model_and_what_an_h200_measured(self) -> None:
        """Fused products were measured with every wgmma waited for, as Triton 3.6 compiled them then, and int8's with
        dA, which is PyTorch's now."""
        ratios: dict[str, list[float]] = {}
        for row in json.loads((RESULTS / "exact-forms.json").read_text())["backward"]:
            if row["form"] in ("torch", "prepared"):
                precision = {"bf16": None, "float8": cost_exact.FAST}.get(row["bits"], row["bits"])
                found = estimate_exact(row["form"], precision, 8192, row["N"], row["K"], P, Flags(), KNOWN[H200])
                ratios.setdefault(row["form"], []).append(found.predicted_us / row["us"])
        for form, least, most in (("torch", 0.9, 1.13), ("prepared", 0.93, 1.08)):
            assert min(ratios[form]) == pytest.approx(least, abs=0.02)
            assert max(ratios[form]) == pytest.approx(most, abs=0.02)

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

    @pytest.mark.parametrize(
        ("N", "K", "name", "form"),
        [(4096, 4096, "float8", "fused"), (14336, 4096, "float8", "prepared"), (4096, 4096, None, "prepared")],
    )
    def test_the_choice(self, N: int, K: int, name: str | None, form: str) -> None:
        device = KNOWN[H100]
        assert tk.choose_exact(8192, N, K, P, torch.bfloat16, name, device, Flags()) == form
        times = {
            one: estimate_exact(one, name, 8192, N, K, P, Flags(), device).predicted_us for one in cost_exact.FORMS
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

        assert choose() == "fused"
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
