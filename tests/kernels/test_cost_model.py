"""The cost model against an independent estimate of the same kernels, and what must follow from its counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loge_kernels import triton_kernels as tk
from loge_kernels.triton_kernels import cost_cuda, cost_sm90
from loge_kernels.triton_kernels.configs import best_entry, padded, shipped
from loge_kernels.triton_kernels.cost_model import Flags, _tile, _Tiles, estimate_one_launch, estimate_two_launch
from loge_kernels.triton_kernels.explanation import Explanation
from loge_kernels.triton_kernels.library import dense_product, estimate_torch, narrow_product
from loge_kernels.triton_kernels.phases import BOUNDS, Estimate, Phase, l2_traffic
from loge_kernels.triton_kernels.rates import DEFAULT, KERNEL_US, KNOWN, OVERLAP, narrow_share

H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
P = 16

# An estimate on paper of bfloat16 with an adapter of 16, in microseconds: the PyTorch composition, the sm_90 kernels
# without what is small beside them, Triton's one launch and two launches. It is itself good to 15 %.
#
# The Triton forms by hand, W = R + 16, s slabs of rows, bytes through L2 at 6.2 TB/s (H100: 6.0) and through HBM at
# 0.92 of 4.3 (3.0), cycles at 1.7 GHz; bounds that come near each other add up to 9 %:
#   project: 2MN a column of 256 of R (dY), 2sNW (left, B), 64sN (dB's atomics, two stores each, at half weight), T: MW
#     where it is whole, 4MW a split where N is in 132 / s parts. Then 4 for the launch. Parts: a fill of 4MW, 2.5.
#   expand, R <= 256: 3MK (x, and dX at half weight), 2sKW (right, A), 64sK (dA), 2MW for each of 132 / s chunks of K.
#     HBM: 4MK. Then 4, and 3.6 where a slab sums its parts. R = 512: T once for each 256 columns of K; of parts the sum
#     is rounded first, 6MW and 2.5.
#   The small kernels: 10. M = 8192, N = K = 4096, R = 512, s = 64: 134 + 277 + 17 + 4 MB, 70 + 4; 101 + 277 + 17 + 138
#   MB, 86 + 4; 174 in all, where T in fp32 at 128 columns took 268: 277 MB in place of 138 of 16 bits at 256, with the
#   waits of that loop. Products are 2 x 45 us: L2 holds both kernels.
#   one launch: slabs of 64 rows, of 128 for R = 256. Of 64 columns over N a step takes dB's product, 100 cycles, and
#     the longer of the others and of loads at 128 B a cycle and 350; over K dA's and the adapter's, 200, and the longer
#     of T right and of loads, dX staged, and 400. M <= 8192, R = 256: 64 steps of 260 + 1184 and of 424 + 1072 cycles.
#    N     K     M     R  torch sm90 one  two
ESTIMATED = """
H200  4096  4096  4096  64   69   32   78   51
H200  4096  4096  4096 128   75   35   86   56
H200  4096  4096  4096 256   91   41  138   69
H200  4096  4096  4096 512  118   65    -  110
H200  4096  4096  8192  64  117   58   86   79
H200  4096  4096  8192 128  125   62  103   87
H200  4096  4096  8192 256  151   72  138  110
H200  4096  4096  8192 512  198  123    -  174
H200  4096  4096 16384  64  214  109  157  129
H200  4096  4096 16384 128  230  115  195  142
H200  4096  4096 16384 256  280  131  175  179
H200  4096  4096 16384 512  370  238    -  330
H200 14336  4096  4096  64  131   55  143   77
H200 14336  4096  4096 128  150   62  164   89
H200 14336  4096  4096 256  188   78  289  115
H200 14336  4096  4096 512  251  137    -  196
H200 14336  4096  8192  64  240  103  163  131
H200 14336  4096  8192 128  259  116  206  152
H200 14336  4096  8192 256  323  145  289  202
H200 14336  4096  8192 512  427  267    -  347
H200 14336  4096 16384  64  457  199  311  234
H200 14336  4096 16384 128  495  222  399  272
H200 14336  4096 16384 256  618  278  361  362
H200 14336  4096 16384 512  817  527    -  675
H200  4096 14336  4096  64  131   76  171   94
H200  4096 14336  4096 128  144   79  187  101
H200  4096 14336  4096 256  174   85  299  123
H200  4096 14336  4096 512  233  137    -  217
H200  4096 14336  8192  64  240  146  188  165
H200  4096 14336  8192 128  259  150  223  177
H200  4096 14336  8192 256  313  160  299  218
H200  4096 14336  8192 512  419  267    -  389
H200  4096 14336 16384  64  457  284  362  302
H200  4096 14336 16384 128  495  291  434  322
H200  4096 14336 16384 256  598  306  390  394
H200  4096 14336 16384 512  801  527    -  760
H200  1024  4096  4096  64   50   25   58   43
H200  1024  4096  4096 128   53   27   62   46
H200  1024  4096  4096 256   61   30   93   55
H200  1024  4096  4096 512   78   43    -   84
H200  1024  4096  8192  64   80   45   63   63
H200  1024  4096  8192 128   85   46   72   68
H200  1024  4096  8192 256  100   50   93   82
H200  1024  4096  8192 512  129   79    -  122
H200  1024  4096 16384  64  142   82  111   98
H200  1024  4096 16384 128  151   83  133  103
H200  1024  4096 16384 256  179   87  119  124
H200  1024  4096 16384 512  236  151    -  226
H100  4096  4096  8192  64  160   80   96   97
H100  4096  4096  8192 128  163   81  110  103
H100  4096  4096  8192 256  180   87  142  120
H100  4096  4096  8192 512  232  130    -  179
H100 14336  4096  8192  64  335  144  177  161
H100 14336  4096  8192 128  341  145  216  174
H100 14336  4096  8192 256  388  160  294  216
H100 14336  4096  8192 512  502  285    -  358
H100  4096 14336  8192  64  335  205  221  220
H100  4096 14336  8192 128  341  205  243  227
H100  4096 14336  8192 256  377  211  307  249
H100  4096 14336  8192 512  494  285    -  402
H100  1024  4096  8192  64  107   61   72   78
H100  1024  4096  8192 128  110   62   78   82
H100  1024  4096  8192 256  118   65   96   92
H100  1024  4096  8192 512  150   84    -  126
"""


def shapes() -> list[Any]:
    rows = [line.split() for line in ESTIMATED.strip().splitlines()]
    return [pytest.param({"H100": H100, "H200": H200}[gpu], *row, id=" ".join([gpu, *row[:4]])) for gpu, *row in rows]


def config(kernel: str, R: int) -> Any:
    entry = best_entry((shipped("sm_90"),), kernel, 16, padded(R), padded(P), True)
    assert entry is not None
    return entry.config


@pytest.mark.parametrize(("gpu", "n", "k", "m", "r", "torch_us", "sm90_us", "one_us", "two_us"), shapes())
def test_every_row_of_the_estimate(
    gpu: str, n: str, k: str, m: str, r: str, torch_us: str, sm90_us: str, one_us: str, two_us: str
) -> None:
    sizes, device = (int(m), int(n), int(k), int(r), P), KNOWN[gpu]
    assert estimate_torch(*sizes, Flags(), device).predicted_us == pytest.approx(float(torch_us), rel=0.1)
    two = estimate_two_launch(*sizes, config("two_launch", int(r)), Flags(), device)
    assert two.predicted_us == pytest.approx(float(two_us), rel=0.1)
    if one_us != "-":
        one = estimate_one_launch(*sizes, config("one_launch", int(r)), Flags(), device)
        assert one.predicted_us == pytest.approx(float(one_us), rel=0.1)
    if sm90_us != "-":
        cuda = cost_cuda.estimate_cuda(*sizes, Flags(), device)
        small = sum(phase.us for phase in cuda.phases if phase.name == "small")
        assert cuda.predicted_us - small == pytest.approx(float(sm90_us), rel=0.13)
        assert estimate_torch(*sizes, Flags(), device).predicted_us > 1.3 * cuda.predicted_us


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
        """R = 256: shared memory holds the walk over N, HBM that over K, which reads x and writes dX."""
        cuda = cost_cuda.estimate_cuda(8192, 4096, 4096, 256, P, Flags(), DEFAULT)
        limits = {phase.name: phase.limit for phase in cuda.phases}
        assert (limits["walk N"], limits["walk K"], limits["exchange"]) == ("shared", "hbm", "latency")

    def test_atomics_count_as_two_stores_and_stores_half(self) -> None:
        assert l2_traffic(100, 0, 0) == l2_traffic(0, 200, 0) == l2_traffic(0, 0, 100) == 100

    def test_a_step_of_the_hopper_kernel_by_hand(self) -> None:
        """Cycles of the matrix units, and KiB of shared memory, of 64 columns of 128 rows at R = 256."""
        problem = cost_sm90.Problem(8192, 4096, 4096, 256, 16, Flags(), DEFAULT, 2, 2)
        over_n, over_k = problem.step_n(), problem.step_k()
        assert (over_n.tensor, over_k.tensor) == (2 * 4 * (128 + 20) + 8 * 20, 2 * 17 * 32 + 8 * 20)
        assert (over_n.shared, over_k.shared) == (170 * 1024, 170 * 1024)

    def test_triton_waits_in_each_step(self) -> None:
        """So that half as many rows, on half of the card, take as long."""
        walks = [
            estimate_one_launch(M, 4096, 4096, 256, P, config("one_launch", 256), Flags(), DEFAULT).phases[0]
            for M in (4096, 8192)
        ]
        assert walks[0].limit == "latency"
        assert walks[1].us < 1.01 * walks[0].us

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
        assert [narrow_share(DEFAULT, width) for width in (144, 272, 528)] == [0.45, 0.56, 0.72]
        shares = [narrow_share(DEFAULT, width) for width in (1, 16, 80, 100, 144, 500, 2000, 4096, 9999)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        wide = narrow_product("T", DEFAULT, 8192, 4096, 272)
        assert wide.tensor_us == pytest.approx(2 * 8192 * 4096 * 272 / (0.56 * DEFAULT.tflops_16 * 1e6))

    def test_skinny_products_move_at_their_own_rate(self) -> None:
        dA = narrow_product("dA", DEFAULT, P, 8192, 4096)
        assert dA.limit == "hbm"
        assert dA.hbm_us == pytest.approx(2 * (P * 8192 + 8192 * 4096 + P * 4096) / (0.62 * DEFAULT.hbm_gbs * 1e3))

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
