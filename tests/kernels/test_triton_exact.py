"""The exact kernels in the interpreter, on the CPU: awkward shapes, poisoned outputs, guard bands, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, assert_passes_interpreted, needs_triton
from poisoned import assert_close, guard_bands, guarded, in_double, strided
from surrogate import case, problem_of
from torch import Tensor

from loge_kernels import triton_kernels as tk
from loge_kernels.backend import reference
from loge_kernels.backend import triton as triton_backend
from loge_kernels.backend.choice import run_backward
from loge_kernels.backend.problem import BackwardProblem, Operands
from loge_kernels.backend.triton import exact_backward
from loge_kernels.numerics import eight_bit
from loge_kernels.numerics.eight_bit import as_bits
from loge_kernels.numerics.rotation import rotate
from loge_kernels.triton_kernels.configs import PrepareConfig
from loge_kernels.triton_kernels.cost_model import Traffic
from loge_kernels.triton_kernels.exact_plan import m_chunk_of, product_takes_dA
from loge_kernels.triton_kernels.rates import DEFAULT, KNOWN
from loge_kernels.triton_kernels.traffic import recording

pytestmark = needs_triton

FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
EIGHT_BITS = pytest.mark.parametrize("eight_bits", [FLOAT8, INT8], ids=["float8", "int8"])
SIZES = [(1, 33, 17, 3), (7, 40, 72, 4), (33, 260, 71, 5), (70, 144, 40, 17)]  # M, N, K, P
NEEDS = ("need_dx", "need_dbias", "need_dA", "need_dB")


def problem(
    M: int, N: int, K: int, P: int | None, dtype: torch.dtype, eight_bits: torch.dtype | None = None, **options: Any
) -> BackwardProblem:
    """Of guarded tensors, with an exact frozen path."""
    c = case(M, N, K, None, P, dtype=dtype)
    if options.get("dropout"):
        options.setdefault("seed", torch.tensor([-(2**61) + 12345, 2**40 + 7]))
    if eight_bits is not None:
        options["dense"], options["dense_scale"] = eight_bit.quantize_columns(c.weight, eight_bits)
        options.setdefault("weight", None)
    needs = NEEDS if P else NEEDS[:2]
    p = problem_of(c, needs, **{"scaling": 1.5, **options})
    for name in ("dy", "x", "xa", "weight", "lora_A", "lora_B"):
        setattr(p, name, guarded(getattr(p, name)))
    return p


def check(p: BackwardProblem, form: Any = "fused") -> Any:
    """The gradients by the kernels, against the reference in the same precision and in float64."""
    with guard_bands("exact_launch"):
        computed = exact_backward(p, form)
    plain, exact = reference.backward(p), reference.backward(in_double(p) if p.dense is None else dequantized(p))
    for name in ("dx", "dA", "dB", "dbias"):
        if getattr(plain, name) is None:
            assert getattr(computed, name) is None, name
        else:
            assert_close(name, *(getattr(g, name) for g in (computed, plain, exact)))
    return computed


def dequantized(p: BackwardProblem) -> BackwardProblem:
    """The problem in float64, whose frozen product is that of the rounded operands, and all else of the given ones."""
    assert p.dense is not None
    assert p.dense_scale is not None
    q, scale = eight_bit.quantize_rows(p.dy, p.dense.dtype)
    frozen = (q.double() * scale) @ (p.dense.double() * p.dense_scale)
    double = in_double(p)
    double.dense = double.dense_scale = None
    # dY · weight = frozen, for a weight of least norm; in float64 the rest of dY is none of the product's business.
    double.weight = torch.linalg.lstsq(double.dy, frozen).solution
    return double


def test_in_a_process_of_its_own() -> None:
    assert_passes_interpreted(__file__)


class TestExactBackward:
    __test__ = INTERPRETED

    @DTYPES
    @pytest.mark.parametrize("form", ["fused", "prepared"])
    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_shapes(self, sizes: tuple[int, ...], deterministic: bool, form: str, dtype: torch.dtype) -> None:
        check(problem(*sizes, dtype, deterministic=deterministic), form)

    @DTYPES
    @EIGHT_BITS
    @pytest.mark.parametrize("sizes", [(1, 33, 17, 3), (33, 48, 70, 5), (40, 64, 33, 16)])
    def test_in_eight_bits(self, sizes: tuple[int, ...], eight_bits: torch.dtype, dtype: torch.dtype) -> None:
        check(problem(*sizes, dtype, eight_bits))

    def test_of_int8_dA_is_pytorchs_or_the_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch's on Hopper, which the interpreter plays, but with dropout."""
        given = []
        launched = tk.product
        monkeypatch.setattr(tk, "product", lambda *a, **named: (given.append(named["x"]), launched(*a, **named))[1])
        check(problem(33, 48, 70, 5, torch.float16, INT8))
        check(problem(33, 48, 70, 5, torch.float16, INT8, dropout=0.5))
        check(problem(33, 48, 70, 5, torch.float16, FLOAT8))
        monkeypatch.setattr(tk, "takes_dA", lambda *_: True)
        check(problem(33, 48, 70, 5, torch.float16, INT8))
        assert [x is not None for x in given] == [False, True, True, True]

    @DTYPES
    @pytest.mark.parametrize("probability", [0.1, 0.7])  # thresholds on both sides of 2^31
    def test_dropout(self, probability: float, dtype: torch.dtype) -> None:
        check(problem(50, 40, 72, 5, dtype, dropout=probability))
        check(problem(50, 64, 48, 5, dtype, INT8, dropout=probability))

    def test_without_an_adapter(self) -> None:
        check(problem(40, 64, 48, None, torch.float32))
        check(problem(40, 64, 48, None, torch.float32, FLOAT8))

    @pytest.mark.parametrize("missing", ["need_dA", "need_dB", "need_dbias"])
    def test_any_subset_of_the_gradients(self, missing: str) -> None:
        check(problem(35, 40, 33, 5, torch.float32, **{missing: False}))

    def test_strided_dy_and_x(self) -> None:
        p = problem(40, 64, 48, 5, torch.float16)
        p.dy, p.x = strided(p.dy), strided(p.x)
        check(p)
        p.dy, p.x = p.dy.t().contiguous().t(), p.x.t().contiguous().t()
        check(p)

    def test_adapter_in_fp32(self) -> None:
        p = problem(40, 64, 48, 5, torch.float16, dropout=0.1)
        p.lora_A, p.lora_B = guarded(p.lora_A.float()), guarded(p.lora_B.float())
        assert {check(p).dA.dtype, check(p).dB.dtype} == {torch.float32}

    def test_deterministic_mode_gives_the_same_bits_without_atomic_sums(self) -> None:
        p = problem(70, 300, 64, 5, torch.float32, deterministic=True)
        with recording() as recorder:
            first = exact_backward(p, "fused")
        assert not recorder.atomics
        for name in ("dx", "dA", "dB", "dbias"):
            assert torch.equal(getattr(exact_backward(p, "fused"), name), getattr(first, name)), name

    def test_runs_where_it_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        p = problem(20, 32, 24, 3, torch.float32)
        assert torch.equal(run_backward(p, "triton").dx, exact_backward(p, "fused").dx)
        monkeypatch.setattr("loge_kernels.backend.triton.exact_backward", None)  # which would raise
        run_backward(p, "auto")
        run_backward(problem(20, 32, 24, 3, torch.float64), "triton")  # which no kernel takes

    def test_missing_tensors_raise(self) -> None:
        p = problem(5, 8, 8, 4, torch.float32)
        for options in ({"need_t": False, "xa": None}, {"lora_B": None}):
            given = {"xa": p.xa, "lora_B": p.lora_B} | options
            with pytest.raises(ValueError, match="is None"):
                tk.prepare(p.dy, given.pop("xa"), given.pop("lora_B"), 1.0, **given)
        with pytest.raises(ValueError, match="eight_bits"):
            tk.prepare(p.dy, p.xa, p.lora_B, 1.0, eight_bits=torch.int16)
        with pytest.raises(ValueError, match="dy_scale"):
            tk.product(p.dy, p.weight, dy_scale=torch.ones(5))
        with pytest.raises(ValueError, match="dy_scale"):
            tk.product(p.dy.to(torch.int8), p.weight.to(torch.int8))
        with pytest.raises(ValueError, match="is None"):
            tk.product(p.dy, p.weight, x=p.x)


class TestQuantization:
    """Bit for bit what PyTorch's rules give."""

    __test__ = INTERPRETED

    @DTYPES
    @EIGHT_BITS
    @pytest.mark.parametrize("magnitude", [1.0, 1e-6, 300.0])
    def test_rows(self, magnitude: float, eight_bits: torch.dtype, dtype: torch.dtype) -> None:
        dy = self.awkward(37, 300, magnitude, dtype)
        q, scale = eight_bit.quantize_rows(dy, eight_bits)
        with guard_bands("exact_launch"):
            prepared = tk.prepare(dy, None, None, 1.0, need_t=False, need_dB=False, eight_bits=eight_bits)
        assert torch.equal(prepared.scale, scale.flatten())
        assert torch.equal(prepared.q.float(), q.float())  # and so any sign of a zero

    @DTYPES
    @EIGHT_BITS
    def test_rows_times_the_scales_of_columns(self, eight_bits: torch.dtype, dtype: torch.dtype) -> None:
        dy, columns = self.awkward(37, 300, 1.0, dtype), guarded(torch.rand(300))
        q, scale = eight_bit.quantize_rows(dy.float() * columns, eight_bits)
        with guard_bands("exact_launch"):
            prepared = tk.prepare(
                dy, None, None, 1.0, need_t=False, need_dB=False, eight_bits=eight_bits, column_scale=columns
            )
        assert torch.equal(prepared.scale, scale.flatten())
        assert torch.equal(prepared.q.float(), q.float())

    @DTYPES
    @EIGHT_BITS
    @pytest.mark.parametrize("shape", [(37, 300), (16, 128), (5, 1), (40, 320)])
    @pytest.mark.parametrize("strides", ["contiguous", "strided"])
    def test_an_input(self, strides: str, shape: tuple[int, int], eight_bits: torch.dtype, dtype: torch.dtype) -> None:
        """In one kernel: the same bits, and rotated for int8, where the order of a sum may move a rounding."""
        x = self.awkward(*shape, 1.0, dtype) if shape == (37, 300) else guarded(torch.randn(shape).to(dtype))
        x = strided(x) if strides == "strided" else x
        with guard_bands("exact_launch"), recording() as recorder:
            q, scale = triton_backend.quantize(x, eight_bits)
        expected, expected_scale = reference.quantize(x, eight_bits)
        if eight_bits == FLOAT8:
            assert torch.equal(q.float(), expected.float())
            assert torch.equal(scale, expected_scale)
            assert recorder.of(x) == Traffic(loaded=2 * x.numel() * x.element_size())  # once more from L2
        else:
            assert (q.float() - expected.float()).abs().max() <= 1
            assert (q != expected).float().mean() < 0.02
            torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0.0)

    @staticmethod
    def awkward(M: int, N: int, magnitude: float, dtype: torch.dtype) -> Tensor:
        """Rows of zeros, of one element, of ties between two steps, with outliers, below the smallest scale."""
        dy = torch.randn(M, N) * magnitude
        dy[0] = 0.0
        dy[1, 1:] = 0.0
        dy[2] = torch.arange(N).float() % 127 + 0.5
        dy[2, 0] = 127.0
        dy[3, 5] = 200.0 * magnitude
        dy[4] *= 1e-30
        return guarded(dy.to(dtype))

    @EIGHT_BITS
    def test_nan_and_inf_come_through(self, eight_bits: torch.dtype) -> None:
        p = problem(9, 40, 32, 3, torch.float32, eight_bits)
        p.dy[2, 3], p.dy[5, 7] = float("nan"), float("inf")
        dx = exact_backward(p, "fused").dx
        assert not dx[[2, 5]].isfinite().any()
        assert dx[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()


class TestWeightInEightBits:
    """Forward and backward over a weight that has no other form."""

    __test__ = INTERPRETED

    @DTYPES
    @EIGHT_BITS
    @pytest.mark.parametrize("sizes", [(33, 80, 192, 5), (5, 33, 40, None), (7, 48, 33, 4)])
    def test_against_the_reference(self, sizes: tuple[int, ...], eight_bits: torch.dtype, dtype: torch.dtype) -> None:
        M, N, K, P = sizes
        c = case(M, N, K, None, P, dtype=dtype)
        q, scale = eight_bit.quantize_weight(c.weight, eight_bits)
        p = problem_of(c, NEEDS if P else NEEDS[:2], scaling=1.5, weight=None, dense=q, weight_scale=scale)
        for name in ("dy", "x", "xa", "lora_A", "lora_B", "dense", "weight_scale"):
            setattr(p, name, guarded(getattr(p, name)))
        bits, x_scale = reference.quantize(p.x, eight_bits)
        o = Operands(
            x=p.x, weight=None, dense=as_bits(p.dense), weight_scale=p.weight_scale, x_bits=as_bits(bits),
            x_scale=x_scale, lora_A=p.lora_A, lora_B=p.lora_B, scaling=1.5,
        )  # fmt: skip
        weight = eight_bit.dequantize(q, scale, torch.float64)
        rounded = eight_bit.dequantize(bits, x_scale, torch.float64)
        y = rounded @ weight.t()
        if P:
            y += 1.5 * (p.x.double() @ p.lora_A.double().t()) @ p.lora_B.double().t()
        with guard_bands("exact_launch"):
            got, xa = triton_backend.forward_in_eight_bits(o)
        plain, plain_xa = reference.forward(o)
        assert_close("y", got, plain, y)
        assert (xa is None) == (P is None)
        assert xa is None or torch.equal(xa, plain_xa)
        with guard_bands("exact_launch"):
            computed = exact_backward(p, "fused")
        exact = reference.backward(p)
        double = in_double(p)
        double.dense = double.weight_scale = None
        folded, fold = eight_bit.quantize_rows(p.dy.float() * scale.t(), eight_bits)
        double.weight = torch.linalg.lstsq(
            double.dy, rotate(folded.double() * fold.double() @ q.double(), p.rotation)
        ).solution
        truth = reference.backward(double)
        for name in ("dx", "dA", "dB", "dbias"):
            if getattr(exact, name) is not None:
                assert_close(name, *(getattr(g, name) for g in (computed, exact, truth)))


class TestTraffic:
    """The bytes that the exact step is there to save."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("eight_bits", "reads"), [(None, 1), (FLOAT8, 2), (INT8, 2)])
    def test_dy_x_and_dx(self, eight_bits: torch.dtype | None, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without 8 bits `exact_prepare` reads dY once and the product once in each column of tiles."""
        M, N, K, P = 70, 160, 300, 5
        p = problem(M, N, K, P, torch.float16, eight_bits)
        columns_of_tiles = 3  # of 128
        monkeypatch.setattr(tk, "takes_dA", lambda *_: True)
        with recording() as recorder:
            gradients = exact_backward(p, "fused")
        product = columns_of_tiles if eight_bits is None else 0
        assert recorder.of(p.dy) == Traffic(loaded=(reads + product) * M * N * 2)
        assert recorder.of(p.x) == Traffic(loaded=M * K * 2)
        assert recorder.of(gradients.dx) == Traffic(stored=M * K * 2)

    def test_sums_are_added_once_a_chunk(self) -> None:
        M, N, P = 96, 256, 4
        p = problem(M, N, 32, P, torch.float32, need_dbias=False)
        chunks = -(-M // m_chunk_of(M, N, PrepareConfig(64, 128, 4, 2), 132))
        with recording() as recorder:
            prepared = tk.prepare(p.dy, p.xa, p.lora_B, 1.0)
        assert recorder.of(prepared.dB) == Traffic(stored=chunks * N * P * 4)
        assert recorder.of(prepared.t) == Traffic(stored=2 * M * P * 4)  # two blocks of 128 columns


def test_who_computes_dA() -> None:
    ampere = KNOWN["NVIDIA A100-SXM4-80GB"]
    taken = [product_takes_dA(bits, drop, DEFAULT) for bits in (None, FLOAT8, INT8) for drop in (False, True)]
    assert taken == [True, True, True, True, False, True]
    assert product_takes_dA(INT8, False, ampere)


def test_chunks_fill_the_card() -> None:
    config = PrepareConfig(64, 256, 8, 3)
    for M, N in ((8192, 4096), (8192, 14336), (4096, 4096), (8192, 1024), (512, 4096), (100, 64)):
        chunk = m_chunk_of(M, N, config, 132)
        blocks = -(-N // 256) * -(-M // chunk)
        assert chunk % 64 == 0
        if M * N >= 64 * 256 * 132:
            assert blocks / (-(-blocks // 132) * 132) > 0.84
            assert blocks <= 4 * 132
