"""Every Triton kernel in the interpreter, on the CPU: awkward shapes, poisoned outputs, guard bands, traffic.

TRITON_INTERPRET must be set before Triton is first imported, so the tests of this file run in a pytest of their own,
which `test_in_a_process_of_its_own` starts; with TRITON_INTERPRET=1 in the environment they run directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loge_kernels import reference
from loge_kernels import triton_kernels as tk
from loge_kernels.problem import BackwardProblem, Operands
from loge_kernels.triton_kernels.configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig
from loge_kernels.triton_kernels.model import Flags, Traffic, predicted_bytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

ONE = OneLaunchConfig(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)
TWO = TwoLaunchConfig(block_m=32, block_n=32, project_r=64, block_k=32, tile_k=64, tile_r=32, num_warps=4, num_stages=2)
FORWARD = ForwardConfig(block_m=32, block_n=32, block_k=32, group=2, num_warps=4, num_stages=2)
FORMS = pytest.mark.parametrize("config", [ONE, TWO], ids=["one_launch", "two_launch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
GUARD = 64  # elements around every buffer; keeps 16-byte alignment


def guarded(t: Tensor) -> Tensor:
    """A copy of `t` in the middle of NaNs: a read past its ends shows in the result."""
    if not t.is_floating_point():
        return t
    buffer = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype)
    inner = buffer[GUARD : GUARD + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner


def strided(t: Tensor) -> Tensor:
    """The same values as every second row and a slice of the columns of a larger buffer of NaNs."""
    buffer = torch.full((2 * t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
    view = buffer[::2, 3 : 3 + t.shape[1]]
    view.copy_(t)
    return view


def problem(
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    **options: Any,
) -> BackwardProblem:
    g = torch.Generator().manual_seed(M + 3 * N + 5 * K + 7 * R + 11 * P)

    def draw(scale: float, *shape: int) -> Tensor:
        return guarded((torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype))

    lora = lora_dtype or dtype
    made = BackwardProblem(
        dy=draw(1.0, M, N),
        x=draw(1.0, M, K),
        xa=draw(1.0, M, P),
        weight=None,
        left=draw(N**-0.5, N, R),
        right=draw(max(R, 1) ** -0.5, R, K),
        lora_A=guarded(draw(max(P, 1) ** -0.5, P, K).to(lora)),
        lora_B=guarded(draw(N**-0.5, N, P).to(lora)),
        scaling=1.5,
        dropout=0.0,
        seed=None,
        exact_fraction=0.0,
        need_dx=True,
        need_dweight=False,
        need_dbias=True,
        need_dA=True,
        need_dB=True,
        deterministic=False,
    )
    if options.get("dropout"):
        options.setdefault("seed", torch.tensor([-(2**61) + 12345, 2**40 + 7]))
    return replace(made, **options)


class Buffers:
    """`torch` as the launcher sees it: what it allocates lies between guard bands, and `empty` is full of NaNs."""

    def __init__(self) -> None:
        self.allocated: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _allocate(self, shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * GUARD,), 12345.0, dtype=dtype)
        inner = buffer[GUARD : GUARD + count]
        inner.fill_(fill)
        self.allocated.append((buffer, inner))
        return inner.view(shape)

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._allocate(shape, float("nan"), dtype)

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._allocate(shape, 0.0, dtype)

    def check(self) -> None:
        assert self.allocated
        for buffer, inner in self.allocated:
            assert (buffer[:GUARD] == 12345.0).all()
            assert (buffer[GUARD + inner.numel() :] == 12345.0).all()


def run(p: BackwardProblem, config: OneLaunchConfig | TwoLaunchConfig | None) -> dict[str, Tensor | None]:
    outputs = tk.backward(
        p.dy,
        p.x,
        p.xa,
        p.left,
        p.right,
        p.lora_A,
        p.lora_B,
        p.scaling,
        dropout=p.dropout,
        seed=p.seed,
        need_dx=p.need_dx,
        need_dA=p.need_dA,
        need_dB=p.need_dB,
        need_dbias=p.need_dbias,
        deterministic=p.deterministic,
        config=config,
    )
    return dict(zip(("dx", "dA", "dB", "dbias"), outputs, strict=True))


def in_double(p: BackwardProblem) -> BackwardProblem:
    values = {f.name: getattr(p, f.name) for f in fields(p)}
    return BackwardProblem(
        **{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
    )


def assert_close(name: str, computed: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The house rule: at most twice the error of plain PyTorch at the same precision, plus a tiny absolute term."""
    assert computed.dtype == plain.dtype, name
    assert computed.shape == exact.shape, name
    error, allowed = (torch.linalg.vector_norm(t.double() - exact) for t in (computed, plain))
    assert error <= 2 * allowed + 1e-6 * torch.linalg.vector_norm(exact), f"{name}: {error} against {allowed}"


def check(
    p: BackwardProblem, config: OneLaunchConfig | TwoLaunchConfig | None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor | None]:
    """Run a problem with guarded buffers and compare every gradient; returns them."""
    from loge_kernels.triton_kernels import launch

    buffers = Buffers()
    monkeypatch.setattr(launch, "torch", buffers)
    computed = run(p, config)
    buffers.check()
    plain, exact = reference.backward(p), reference.backward(in_double(p))
    for name, value in computed.items():
        if getattr(exact, name) is None:
            assert value is None, name
        else:
            assert value is not None, name
            assert_close(name, value, getattr(plain, name), getattr(exact, name))
    return computed


def test_in_a_process_of_its_own() -> None:
    if INTERPRETED:
        pytest.skip("already in the interpreter")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class TestBackward:
    __test__ = INTERPRETED

    @FORMS
    @DTYPES
    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize(
        ("M", "N", "K", "R", "P"),
        [
            (1, 33, 17, 5, 3),
            (7, 40, 72, 24, 4),
            (50, 96, 64, 16, 8),
            (33, 100, 71, 37, 5),
            (70, 57, 41, 100, 17),
            (64, 64, 64, 64, 16),
            (40, 1, 1, 1, 1),
        ],
    )
    def test_shapes(
        self,
        M: int,
        N: int,
        K: int,
        R: int,
        P: int,
        deterministic: bool,
        dtype: torch.dtype,
        config: OneLaunchConfig | TwoLaunchConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        check(problem(M, N, K, R, P, dtype, deterministic=deterministic), config, monkeypatch)

    @FORMS
    @DTYPES
    @pytest.mark.parametrize("probability", [0.1, 0.7])  # thresholds on both sides of 2^31
    def test_dropout(
        self,
        probability: float,
        dtype: torch.dtype,
        config: OneLaunchConfig | TwoLaunchConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        check(problem(50, 40, 72, 20, 5, dtype, dropout=probability), config, monkeypatch)

    @FORMS
    @pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)])
    def test_any_subset_of_the_gradients(
        self,
        needs: tuple[bool, ...],
        config: OneLaunchConfig | TwoLaunchConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        names = ("need_dx", "need_dA", "need_dB", "need_dbias")
        options = dict(zip(names, needs, strict=True))
        check(problem(35, 40, 33, 20, 5, dropout=0.2, **options), config, monkeypatch)

    @FORMS
    def test_what_is_not_read_may_be_none(
        self, config: OneLaunchConfig | TwoLaunchConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = problem(35, 40, 33, 20, 5)
        frozen = replace(
            whole, x=None, xa=None, lora_A=None, lora_B=None, need_dA=False, need_dB=False, need_dbias=False
        )
        check(frozen, config, monkeypatch)
        check(replace(whole, left=None, right=None, need_dx=False), config, monkeypatch)
        check(replace(whole, left=None, right=None, x=None, need_dx=False, need_dA=False), config, monkeypatch)

    @FORMS
    @DTYPES
    def test_strided_dy_and_x(
        self, dtype: torch.dtype, config: OneLaunchConfig | TwoLaunchConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        p = problem(40, 48, 56, 20, 5, dtype)
        assert p.x is not None
        check(replace(p, dy=strided(p.dy), x=strided(p.x)), config, monkeypatch)
        check(replace(p, dy=p.dy.t().contiguous().t(), x=p.x.t().contiguous().t()), config, monkeypatch)
        check(replace(p, dy=p.dy[:1].expand(40, -1)), config, monkeypatch)

    @FORMS
    def test_adapter_in_fp32(self, config: OneLaunchConfig | TwoLaunchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        check(problem(40, 48, 56, 20, 5, torch.float16, torch.float32, dropout=0.1), config, monkeypatch)

    @FORMS
    def test_no_rows(self, config: OneLaunchConfig | TwoLaunchConfig) -> None:
        gradients = run(problem(0, 8, 8, 4, 2), config)
        assert {name: tuple(g.shape) for name, g in gradients.items() if g is not None} == {
            "dx": (0, 8),
            "dA": (2, 8),
            "dB": (8, 2),
            "dbias": (8,),
        }
        assert all(g.abs().sum() == 0 for g in gradients.values() if g is not None)

    @FORMS
    def test_deterministic_mode_has_no_atomics(self, config: OneLaunchConfig | TwoLaunchConfig) -> None:
        from loge_kernels.triton_kernels.traffic import recording

        p = problem(70, 300, 64, 40, 5, deterministic=True)
        with recording() as recorder:
            first = run(p, config)
        assert not recorder.atomics
        with recording() as recorder:
            run(replace(p, deterministic=False), config)
        assert recorder.atomics
        again = run(p, config)
        for name, gradient in first.items():
            assert gradient is not None
            assert torch.equal(gradient, again[name]), name

    def test_default_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for M in (5, 90):
            check(problem(M, 40, 48, 20, 5), None, monkeypatch)

    def test_missing_tensors_raise(self) -> None:
        p = problem(5, 8, 8, 4, 2)
        for missing in ("x", "xa", "left", "lora_A", "lora_B"):
            with pytest.raises(ValueError, match="is None"):
                run(replace(p, **{missing: None}), ONE)
        with pytest.raises(ValueError, match="is None"):
            run(replace(p, dropout=0.5), ONE)


class TestForward:
    __test__ = INTERPRETED

    @DTYPES
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("shape", [(1, 33, 17, 3), (50, 40, 72, 8), (70, 97, 64, 17)])
    def test_against_the_reference(
        self,
        shape: tuple[int, int, int, int],
        dropout: float,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from loge_kernels.triton_kernels import launch

        M, N, K, P = shape
        p = problem(M, N, K, 1, P, dtype)
        weight = guarded((torch.randn(N, K) * K**-0.5).to(dtype))
        seed = torch.tensor([5, -9])
        assert p.x is not None
        assert p.lora_A is not None
        assert p.lora_B is not None
        for x, bias in ((p.x, None), (strided(p.x), guarded(torch.randn(N).to(dtype)))):
            buffers = Buffers()
            with monkeypatch.context() as patch:
                patch.setattr(launch, "torch", buffers)
                y, xa = tk.forward(x, weight, bias, p.lora_A, p.lora_B, 0.5, dropout=dropout, seed=seed, config=FORWARD)
            buffers.check()
            adapter = {"lora_A": p.lora_A, "lora_B": p.lora_B, "scaling": 0.5, "dropout": dropout, "seed": seed}
            operands = Operands(x, weight, bias=bias, **adapter)
            double = {n: t.double() for n, t in operands._asdict().items() if isinstance(t, Tensor) and n != "seed"}
            plain, exact = reference.forward(operands), reference.forward(operands._replace(**double))
            for name, computed, q, e in zip(("y", "xa"), (y, xa), plain, exact, strict=True):
                assert q is not None
                assert e is not None
                assert_close(name, computed, q, e)

    def test_x_is_read_as_often_as_by_the_frozen_product_alone(self) -> None:
        from loge_kernels.triton_kernels.traffic import recording

        M, N, K, P = 50, 70, 64, 8
        p = problem(M, N, K, 1, P)
        assert p.x is not None
        assert p.lora_A is not None
        assert p.lora_B is not None
        with recording() as recorder:
            y, xa = tk.forward(p.x, torch.randn(N, K), None, p.lora_A, p.lora_B, 0.5, config=FORWARD)
        assert recorder.of(p.x) == Traffic(loaded=3 * M * K * 4)  # ⌈70 / 32⌉ columns of tiles
        assert recorder.of(y) == Traffic(stored=M * N * 4)
        assert recorder.of(xa) == Traffic(stored=M * P * 4)


class TestTraffic:
    """dY once, x once, dX once, and the model's bytes to the byte."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @DTYPES
    @pytest.mark.parametrize(
        ("M", "N", "K", "R", "P"),
        [
            (1, 33, 17, 5, 3),
            (7, 40, 72, 24, 4),
            (64, 96, 64, 16, 8),
            (33, 100, 71, 37, 5),
            (70, 57, 41, 100, 17),
            (97, 64, 48, 64, 16),
        ],
    )
    def test_counted_bytes_are_the_predicted_ones(
        self, M: int, N: int, K: int, R: int, P: int, dtype: torch.dtype, dropout: float
    ) -> None:
        from loge_kernels.triton_kernels.traffic import recording

        # An adapter in fp32, so that the buffers the kernel adds to are the gradients that come back.
        p = problem(M, N, K, R, P, dtype, torch.float32, dropout=dropout, need_dbias=dtype == torch.float32)
        with recording() as recorder:
            gradients = run(p, ONE)
        named = {name: getattr(p, name) for name in ("dy", "x", "xa", "left", "right", "lora_A", "lora_B", "seed")}
        counted = {name: recorder.of(t) for name, t in (named | gradients).items() if t is not None}
        flags = Flags(dropout=dropout > 0, need_dbias=p.need_dbias)
        assert counted == predicted_bytes(M, N, K, R, P, ONE, flags, dtype.itemsize, 4)
        total = recorder.total()
        assert total.loaded == sum(t.loaded for t in counted.values())
        assert total.stored == sum(t.stored for t in counted.values())
        assert p.x is not None
        assert gradients["dx"] is not None
        assert recorder.most_loads_of_an_element(p.dy) == 1
        assert recorder.most_loads_of_an_element(p.x) == 1
        assert recorder.most_stores_of_an_element(gradients["dx"]) == 1

    def test_deterministic_buffers(self) -> None:
        from loge_kernels.triton_kernels.traffic import recording

        p = problem(70, 57, 41, 20, 5, deterministic=True)
        with recording() as recorder:
            run(p, ONE)
        predicted = predicted_bytes(70, 57, 41, 20, 5, ONE, Flags(need_dbias=True, deterministic=True), 4)
        assert recorder.total().stored == sum(t.stored for t in predicted.values())
        assert recorder.total().loaded == sum(t.loaded for t in predicted.values())

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_only_what_is_needed_is_read(self, needs: tuple[bool, bool, bool]) -> None:
        from loge_kernels.triton_kernels.traffic import recording

        flags = Flags(*needs)
        p = problem(40, 57, 41, 20, 5, need_dx=needs[0], need_dA=needs[1], need_dB=needs[2], need_dbias=False)
        with recording() as recorder:
            gradients = run(p, ONE)
        named = {name: getattr(p, name) for name in ("dy", "x", "xa", "left", "right", "lora_A", "lora_B")}
        counted = {name: recorder.of(t) for name, t in (named | gradients).items() if t is not None}
        counted = {name: t for name, t in counted.items() if t != Traffic()}
        assert counted == predicted_bytes(40, 57, 41, 20, 5, ONE, flags, 4)

    def test_two_launches_read_dy_and_x_once_and_write_dx_once(self) -> None:
        from loge_kernels.triton_kernels.traffic import recording

        p = problem(70, 57, 41, 40, 5)
        with recording() as recorder:
            gradients = run(p, TWO)
        assert p.x is not None
        assert gradients["dx"] is not None
        assert recorder.of(p.dy) == Traffic(loaded=p.dy.numel() * 4)
        assert recorder.of(p.x) == Traffic(loaded=p.x.numel() * 4)
        assert recorder.of(gradients["dx"]) == Traffic(stored=p.x.numel() * 4)


class Spy:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


class TestFirstCall:
    __test__ = INTERPRETED

    def test_compiles_both_forms_of_a_kind_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes choose between two forms; the one that the first call does not need is compiled by it all the same."""
        from loge_kernels.triton_kernels import launch

        launched: list[str] = []
        for name in ("one_launch_backward", "project"):
            monkeypatch.setattr(launch, name, Spy(getattr(launch, name), name, launched))
        monkeypatch.setattr(launch, "_plans", {})
        monkeypatch.setattr(launch, "_kinds", set())
        monkeypatch.setattr(launch, "compiles_both_forms", True)
        p = problem(40, 56, 48, 16, 8)
        computed = run(p, None)
        assert sorted(launched) == ["one_launch_backward", "project"]
        plain, exact = reference.backward(p), reference.backward(in_double(p))
        for name, value in computed.items():
            assert_close(name, value, getattr(plain, name), getattr(exact, name))
        for M, N, K in ((40, 56, 48), (24, 56, 48), (40, 64, 96)):
            launched.clear()
            run(problem(M, N, K, 16, 8), None)
            assert len(launched) == 1
        launched.clear()
        run(problem(40, 56, 48, 32, 8), None)  # another R is another kind
        assert len(launched) == 2
