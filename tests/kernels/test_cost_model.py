"""The cost model against what was measured, and what must follow from its counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loge_kernels import triton_kernels as tk
from loge_kernels.triton_kernels import cost_cuda, cost_sm90
from loge_kernels.triton_kernels.configs import best_entry, padded, shipped
from loge_kernels.triton_kernels.cost_model import Flags, _tile, _Tiles, estimate_one_launch
from loge_kernels.triton_kernels.explanation import Explanation
from loge_kernels.triton_kernels.library import dense_product, estimate_torch, narrow_product
from loge_kernels.triton_kernels.phases import BOUNDS, Estimate, Phase, l2_traffic
from loge_kernels.triton_kernels.rates import DEFAULT, KERNEL_US, KNOWN, OVERLAP, narrow_share

H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
P = 16

MEASURED = json.loads((Path(__file__).parents[2] / "bench/results/h200/linear.json").read_text())["rows"]
# What `bench linear` calls it, what the model calls it, and what the prediction may be of the measured time. Triton's
# kernels were measured with every wgmma waited for, as Triton 3.6 compiled them then.
CANDIDATES = {
    "loge cuda": ("cuda sm90", 0.74, 0.96),
    "loge reference": ("torch", 1.02, 1.26),
    "exact": ("torch 16-bit", 1.12, 1.16),
    "exact float8": ("torch float8 fast", 1.03, 1.05),
    "exact int8": ("torch int8", 0.9, 0.97),
}


def config(kernel: str, R: int) -> Any:
    entry = best_entry((shipped("sm_90"),), kernel, 16, padded(R), padded(P), True)
    assert entry is not None
    return entry.config


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_model_and_what_an_h200_measured(name: str) -> None:
    """The whole range of its errors: a change of a rate or a count is seen here."""
    form, least, most = CANDIDATES[name]
    ratios = []
    for row in MEASURED:
        if row["mode"] == "graph" and row["candidate"].rsplit(" R=", 1)[0] == name:
            found = explained(row["rank"], H200, row["M"], row["N"], row["K"]).candidates
            ratios += [c.predicted_us / row["seconds"] / 1e6 for c in found if form in (c.name, c.form)]
    assert len(ratios) == (9 if "loge" in name else 3)
    assert (min(ratios), max(ratios)) == (pytest.approx(least, abs=0.02), pytest.approx(most, abs=0.02))


@pytest.mark.parametrize("gpu", [H200, H100])
@pytest.mark.parametrize("M", [4096, 8192, 16384])
def test_the_cuda_kernels_are_1_3_times_as_fast_as_pytorch(M: int, gpu: str) -> None:
    for N, K in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)):
        for R in (64, 128, 256, 512):
            cuda = cost_cuda.estimate_cuda(M, N, K, R, P, Flags(), KNOWN[gpu])
            assert estimate_torch(M, N, K, R, P, Flags(), KNOWN[gpu]).predicted_us > 1.3 * cuda.predicted_us, (N, K, R)


def explained(R: int | None = 256, gpu: str = H200, M: int = 8192, N: int = 4096, K: int = 4096) -> Explanation:
    return tk.explain(M, N, K, R, P, torch.bfloat16, gpu)


class TestPhases:
    def test_a_phase_takes_its_longest_bound_and_its_launch(self) -> None:
        phase = Phase("walk", hbm_us=10.0, l2_us=2.0, launch_us=3.0)
        assert phase.us == pytest.approx(13.0, rel=1e-3)
        assert phase.limit == "hbm"
        assert replace(phase, l2_us=10.0).us == pytest.approx(3.0 + 10.0 * 2 ** (1 / OVERLAP))
        assert replace(phase, launch_us=20.0).limit == "launches"
        assert Phase("nothing").us == 0.0

    def test_phases_add_up(self) -> None:
        walks = (Phase("walk N", l2_us=7.0), Phase("walk K", hbm_us=5.0, kernels=3))
        estimate = Estimate("form", walks)
        assert estimate.predicted_us == pytest.approx(12.0)
        assert (estimate.bound_us("l2"), estimate.bound_us("hbm")) == (7.0, 5.0)
        assert estimate.kernels == 3
        assert estimate.host_us > replace(estimate, phases=walks[:1]).host_us > 0.0

    def test_the_walks_of_one_kernel_have_limits_of_their_own(self) -> None:
        """R = 128: L2 holds the walk over N, HBM that over K, which reads x and writes dX."""
        cuda = cost_cuda.estimate_cuda(8192, 4096, 4096, 128, P, Flags(), DEFAULT)
        limits = {phase.name: phase.limit for phase in cuda.phases}
        assert (limits["walk N"], limits["walk K"], limits["exchange"]) == ("l2", "hbm", "latency")

    def test_atomics_count_as_two_stores_and_stores_half(self) -> None:
        assert l2_traffic(100, 0, 0) == l2_traffic(0, 200, 0) == l2_traffic(0, 0, 100) == 100

    def test_a_step_of_the_hopper_kernel_by_hand(self) -> None:
        """Cycles of the matrix units, and KiB of shared memory, of 64 columns of 128 rows at R = 256."""
        problem = cost_sm90.Problem(8192, 4096, 4096, 256, 16, Flags(), DEFAULT, 2, 2)
        over_n, over_k = problem.step_n(), problem.step_k()
        assert (over_n.tensor, over_k.tensor) == (2 * 4 * (128 + 20) + 8 * 20, 2 * 17 * 32 + 8 * 20)
        assert (over_n.shared, over_k.shared) == (170 * 1024, 170 * 1024)

    def test_triton_waits_in_each_step(self) -> None:
        """So that half as many rows, on half of the card, wait as long."""
        walks = [
            estimate_one_launch(M, 4096, 4096, 256, P, config("one_launch", 256), Flags(), DEFAULT).phases[0]
            for M in (4096, 8192)
        ]
        assert 0.0 < walks[0].latency_us == walks[1].latency_us

    def test_with_wgmma_a_step_waits_for_thin_products_alone(self) -> None:
        """R = 256, a step of 64 columns of 128 rows over N: dB in 8 pieces of 20 cycles and a wait of 100, then T_R and
        T_P. With mma.sync everything comes after everything."""
        hopper = _Tiles(DEFAULT, 2, 128, 64, 256, 16, 3)
        assert hopper.over_n(True, True).latency == 8 * 20 + 100 + 2 * 4 * (128 + 20)
        assert hopper.over_n(False, True).latency == 100 + 2 * 4 * (128 + 20)
        loads = 64 * (128 + 256 + 16) * 2 / 128
        narrow = replace(hopper, rank=16)
        assert narrow.over_n(True, True).latency == 8 * 20 + 100 + 64 * (128 + 16 + 16) * 2 / 128 + 350
        ampere = replace(hopper, device=KNOWN[A100])
        step = ampere.over_n(True, True)
        assert step.latency == pytest.approx(step.tensor + loads + 450)
        moved = 64 * (128 + 256 + 16 + 2 * 128) * 2 / 128  # over K each product is waited for, and dX is staged
        assert hopper.over_k(True, True).latency == 2 * 17 * 32 + 8 * 20 + 3 * 100 + moved + 400

    def test_a_tile_of_a_large_rank_by_hand(self) -> None:
        """[128, 256] of dX at R = 512: 8 steps of 64, the adapter's 16 and dA. A step loads 48 KiB and reads 80 as
        operands; x passes shared memory once and dX twice, 64 KiB each."""
        step = _tile(256, 512, 16, config("two_launch", 512), Flags(), DEFAULT, 2)
        assert step.tensor == 8 * 2 * 4 * 128 + 2 * 128 + 4 * 8 * 20
        assert step.shared == 8 * (48 + 80) * 1024 + 3 * 64 * 1024
        assert step.latency == step.tensor + 3 * 64 * 1024 / 128 + 3000

    def test_two_small_blocks_share_a_multiprocessor(self) -> None:
        waves = [
            estimate_one_launch(16384, 4096, 4096, R, P, config("one_launch", R), Flags(), DEFAULT).waves
            for R in (64, 128)
        ]
        assert waves == [256 / 132 / 2, 256 / 132]

    def test_casts_and_fills_are_counted(self) -> None:
        def kernels(itemsize: int, **flags: bool) -> int:
            arguments = (4096, 4096, 4096, 64, P, config("one_launch", 64), Flags(**flags), DEFAULT, itemsize)
            return estimate_one_launch(*arguments).kernels

        assert kernels(2) == 1 + 1 + 2
        assert kernels(4) == 1 + 1  # fp32 gradients need no cast
        assert kernels(2, need_dbias=True) == 1 + 1 + 3
        assert kernels(2, deterministic=True) == 1 + 2 + 2
        assert kernels(2, need_dA=False, need_dB=False) == 1


class TestLibrary:
    def test_narrow_products_reach_a_share_of_the_rate(self) -> None:
        assert [narrow_share(DEFAULT, width) for width in (144, 272, 528)] == [0.42, 0.6, 0.78]
        shares = [narrow_share(DEFAULT, width) for width in (1, 16, 80, 100, 144, 500, 2000, 4096, 9999)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        wide = narrow_product("T", DEFAULT, 8192, 4096, 272)
        assert wide.tensor_us == pytest.approx(2 * 8192 * 4096 * 272 / (0.6 * DEFAULT.tflops_16 * 1e6))

    def test_skinny_products_move_at_their_own_rate(self) -> None:
        dA = narrow_product("dA", DEFAULT, P, 8192, 4096)
        assert dA.limit == "hbm"
        assert dA.hbm_us == pytest.approx(2 * (P * 8192 + 8192 * 4096 + P * 4096) / (0.7 * DEFAULT.hbm_gbs * 1e3))

    def test_dense_products_run_at_the_rate_that_lasts(self) -> None:
        flops = 2 * 8192 * 4096 * 4096
        dense = dense_product("dX", DEFAULT, 8192, 4096, 4096)
        assert dense.tensor_us == pytest.approx(flops / (DEFAULT.tflops_16_sustained * 1e6))
        few = dense_product("dX", DEFAULT, 128, 4096, 128 * 33)
        assert few.tensor_us == pytest.approx(
            2 * 128 * 4096 * 128 * 33 / (DEFAULT.tflops_16_sustained * 1e6 * 33 / 132)
        )


class TestCuda:
    def test_sixteen_bit_sums_are_filled_once_and_rounded_at_the_kernels_end(self) -> None:
        estimate = cost_cuda.estimate_cuda(8192, 4096, 4096, 256, P, Flags(), DEFAULT)
        assert estimate.kernels == 2
        small = estimate.phases[-1]
        sums = P * (4096 + 4096)
        assert small.hbm_bytes == 4 * sums
        # 4 bytes of each sum are read and 2 written, by one multiprocessor for each of two splits.
        assert small.launch_us == pytest.approx(DEFAULT.gap_us + KERNEL_US + 3 * sums / (56 * DEFAULT.clock_ghz * 1e3))

    def test_two_slabs_read_the_factors_once(self) -> None:
        walk_n, exchange, walk_k, _ = cost_cuda.estimate_cuda(8192, 4096, 4096, 256, P, Flags(), DEFAULT).phases
        factors = 32 * 272 * 2 * 4096  # of 32 pairs of slabs, over N and over K
        atomics = 4 * 64 * P * 4096  # each slab's share of dB, and of dA
        assert walk_n.l2_bytes == 2 * 8192 * (4096 + 2 * P) + factors + atomics
        assert walk_k.l2_bytes == 2 * 2 * 8192 * 4096 + factors + atomics
        assert factors * 2 == pytest.approx(143e6, rel=0.01)
        assert exchange.l2_bytes == pytest.approx(13.4e6, rel=0.01)

    @pytest.mark.parametrize(("M", "splits"), [(4096, 4), (8192, 2), (16384, 1)])
    def test_the_cluster_fills_the_card(self, M: int, splits: int) -> None:
        assert cost_sm90.cut(M, 4096, 4096, 256, P, 132) == (2, splits)
        assert cost_sm90.rounds(M, 256, 2, splits, 132) == 1
        assert cost_cuda.estimate_cuda(M, 4096, 4096, 256, P, Flags(), DEFAULT).blocks == 128

    def test_the_plan_is_the_extensions_own(self) -> None:
        extension = pytest.importorskip("loge_kernels._C")
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        for M in (1, 100, 4096, 5000, 8192, 16384):
            for N, K in ((4096, 4096), (14336, 4096), (1024, 4096), (72, 136)):
                for R, adapter in ((512, P), (256, P), (256, 64), (128, P), (40, 8)):
                    plan = extension.plan("sm90", M=M, N=N, K=K, R=R, P=adapter, **needs, sm_count=132)
                    cut = plan.rows, plan.cluster // plan.rows
                    assert cut == cost_sm90.cut(M, N, K, R, adapter, 132), (M, N, K, R, adapter)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"R": 520}, "R=520 is not a multiple of 8 in 8 .. 512"),
            ({"R": 12}, "R=12"),
            ({"P": 72}, "P=72"),
            ({"P": 4}, "P=4"),
            ({"N": 4100}, "N=4100"),
            ({"itemsize": 4}, "float16 and bfloat16"),
            ({"flags": Flags(dropout=True)}, "dropout"),
            ({"capability": (7, 5)}, "8.0"),
            ({"capability": (8, 0), "R": 520}, "8 .. 512"),
        ],
    )
    def test_what_the_kernels_refuse(self, changes: dict[str, Any], words: str) -> None:
        problem = {"N": 4096, "K": 4096, "R": 256, "P": P, "itemsize": 2, "flags": Flags(), "capability": (9, 0)}
        assert cost_cuda.why_not(**problem) is None  # type: ignore[arg-type]
        assert words in str(cost_cuda.why_not(**(problem | changes)))

    def test_a_tile_costs_the_same_whatever_it_holds(self) -> None:
        """But loads what there is."""
        times = [cost_cuda.estimate_cuda(16384, 4096, 4096, R, P, Flags(), DEFAULT) for R in (136, 256)]
        assert times[0].bound_us("tensor") == times[1].bound_us("tensor")
        assert times[0].l2_bytes < times[1].l2_bytes


class TestAmpere:
    """A100, N = K = 4096: two launches, each of as many blocks as there are multiprocessors."""

    @pytest.mark.parametrize(
        ("M", "R", "us"),
        [(4096, 64, 84), (4096, 256, 116), (8192, 64, 145), (8192, 128, 155), (8192, 256, 195), (16384, 256, 363)],
    )
    def test_predictions(self, M: int, R: int, us: float) -> None:
        cuda = cost_cuda.estimate_cuda(M, 4096, 4096, R, P, Flags(), KNOWN[A100])
        assert cuda.predicted_us == pytest.approx(us, rel=0.02)
        assert (cuda.blocks, cuda.waves, cuda.kernels) == (108, 1.0, 3)
        torch_us = estimate_torch(M, 4096, 4096, R, P, Flags(), KNOWN[A100]).predicted_us
        assert 1.5 < torch_us / cuda.predicted_us < 2.0

    def test_each_launch_has_its_limit(self) -> None:
        limits = {}
        for R in (64, 256, 512):
            cuda = cost_cuda.estimate_cuda(8192, 4096, 4096, R, P, Flags(), KNOWN[A100])
            limits[R] = [phase.limit for phase in cuda.phases if phase.name in ("project", "expand")]
        assert limits == {64: ["hbm", "hbm"], 256: ["tensor", "hbm"], 512: ["tensor", "l2"]}

    def test_equal_shares_whatever_the_rows(self) -> None:
        """A slab more costs a slab more, and no wave."""
        times = [
            cost_cuda.estimate_cuda(128 * slabs, 4096, 4096, 256, P, Flags(), KNOWN[A100]).predicted_us
            for slabs in (108, 109, 110)
        ]
        assert times[2] - times[0] < 0.1 * times[0]


class TestExplain:
    @pytest.mark.parametrize(("gpu", "kernel"), [(H100, "cuda sm90"), (H200, "cuda sm90"), (A100, "cuda sm80")])
    def test_every_bound_of_every_candidate_is_shown(self, gpu: str, kernel: str) -> None:
        found = explained(gpu=gpu)
        assert {c.name for c in found.candidates} == {"torch", "one_launch", "two_launch", kernel}
        text = str(found)
        assert all(head in text for head in ("HBM", "L2", "tensor", "shared", "latency", "launches"))
        for candidate in (*found.candidates, *found.exact):
            line = next(line for line in text.splitlines() if line[2:].startswith(candidate.name.ljust(22)))
            assert all(f"{candidate.bound_us(bound):.1f}" in line for bound in BOUNDS)
        assert f"host: about {found.candidates[0].host_us:.0f} µs a call of {found.choice}" in text

    def test_the_kernels_win_where_a_perfect_roofline_had_torch(self) -> None:
        """R = 256, the twelve shapes of LLaMA-3-8B: both kernels before the composition."""
        for M in (4096, 8192, 16384):
            for N, K in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)):
                times = explained(M=M, N=N, K=K).by_backend()
                assert times["cuda"] < times["triton"] < times["reference"]

    def test_the_exact_gradient_is_shown_and_never_chosen(self) -> None:
        found = explained(R=512)
        assert found.choice == "cuda sm90"
        assert min(c.predicted_us for c in found.exact) > found.candidates[0].predicted_us
        # At so high a rank an exact backward in 8 bits would take less time: it is still another gradient.
        found = explained(R=4096)
        assert found.exact[0].predicted_us < found.candidates[0].predicted_us
        assert found.choice in {c.name for c in found.candidates}
        assert len({c.precision for c in found.exact}) == len(found.exact) == 4

    @pytest.mark.parametrize("R", [0, None])
    def test_without_factors_the_exact_backwards_are_the_candidates(self, R: int | None) -> None:
        names = {c.name for c in explained(R=R, gpu=H100).candidates}
        assert {"torch 16-bit", "prepared 16-bit", "fused 16-bit", "fused float8", "prepared int8"} <= names
        assert explained(R=R, gpu=H100).choice == explained(R=R, gpu=H100).candidates[0].name
        assert {c.precision for c in explained(R=R, gpu=A100).candidates} == {"16-bit", "int8"}
        odd = tk.explain(8192, 4100, 4096, R, P, device=H100)  # no multiple of 16
        assert {c.precision for c in odd.candidates} == {"16-bit"}

    def test_no_gpu_that_exists_is_needed(self) -> None:
        unknown = replace(DEFAULT, name="NVIDIA X", capability=(12, 0), sms=48)
        assert cost_cuda.estimate_cuda(100, 64, 72, 16, 8, Flags(), unknown).predicted_us > 0.0
        for M in (0, 1, 7):
            assert tk.explain(M, 64, 72, 16, 8, device=H200).candidates
            assert tk.explain(M, 64, 72, None, 8, device=H200).candidates
