"""Every Triton kernel in the interpreter, on the CPU: awkward shapes, poisoned outputs, guard bands, traffic."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, assert_passes_interpreted, needs_triton
from poisoned import Buffers, assert_close, guard_bands, guarded, in_double, strided
from surrogate import case, problem_of

from loge_kernels import triton_kernels as tk
from loge_kernels.backend import reference
from loge_kernels.backend.problem import BackwardProblem, Operands
from loge_kernels.triton_kernels.configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig
from loge_kernels.triton_kernels.cost_model import Flags, Traffic, estimate_two_launch, predicted_bytes
from loge_kernels.triton_kernels.rates import DEFAULT
from loge_kernels.triton_kernels.traffic import Recorder, recording

pytestmark = needs_triton

Config = OneLaunchConfig | TwoLaunchConfig
ONE = OneLaunchConfig(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)
TWO = TwoLaunchConfig(
    block_m=32, block_n=32, project_r=64, block_k=32, slab_stages=2, tile_k=64, tile_r=32, num_warps=4, num_stages=2
)
FORWARD = ForwardConfig(block_m=32, block_n=32, block_k=32, group=2, num_warps=4, num_stages=2)
FORMS = pytest.mark.parametrize("config", [ONE, TWO], ids=["one_launch", "two_launch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
SIZES = [(1, 33, 17, 5, 3), (7, 40, 72, 24, 4), (33, 100, 71, 37, 5), (70, 57, 41, 100, 17)]  # M, N, K, R, P
SPLIT = [(33, 320, 72, 37, 5), (40, 300, 41, 100, 17)]  # N in two, with T on chip and in tiles
OPERANDS = ("dy", "x", "xa", "left", "right", "lora_A", "lora_B")


def problem(
    M: int,
    N: int,
    K: int,
    R: int,
    P: int,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Of guarded tensors; with dropout it has a seed."""
    c = case(M, N, K, R, P, dtype=dtype)
    lora = {name: getattr(c, name).to(lora_dtype or dtype) for name in ("lora_A", "lora_B")}
    if options.get("dropout"):
        options.setdefault("seed", torch.tensor([-(2**61) + 12345, 2**40 + 7]))
    needs = ("need_dx", "need_dbias", "need_dA", "need_dB")
    made = problem_of(c, needs, **{"weight": None, "scaling": 1.5, **lora, **options})
    return replace(made, **{f.name: guarded(getattr(made, f.name)) for f in fields(made)})


def run(p: BackwardProblem, config: Config | None) -> dict[str, Any]:
    needs = ("need_dx", "need_dA", "need_dB", "need_dbias")
    options = {name: getattr(p, name) for name in ("dropout", "seed", *needs, "deterministic")}
    outputs = tk.backward(*(getattr(p, name) for name in OPERANDS), p.scaling, **options, config=config)
    return dict(zip(("dx", "dA", "dB", "dbias"), outputs, strict=True))


def assert_right(computed: dict[str, Any], p: BackwardProblem) -> None:
    """Every gradient that the problem asks for, and no other."""
    plain, exact = reference.backward(p), reference.backward(in_double(p))
    for name, value in computed.items():
        if getattr(exact, name) is None:
            assert value is None, name
        else:
            assert_close(name, value, getattr(plain, name), getattr(exact, name))


def check(p: BackwardProblem, config: Config | None) -> None:
    with guard_bands():
        computed = run(p, config)
    assert_right(computed, p)


def recorded(p: BackwardProblem, config: Config = ONE) -> tuple[Recorder, dict[str, Any]]:
    """What a backward did, and its operands and gradients."""
    with recording() as recorder:
        gradients = run(p, config)
    named = {name: getattr(p, name) for name in (*OPERANDS, "seed")} | gradients
    return recorder, {name: t for name, t in named.items() if t is not None}


def test_in_a_process_of_its_own() -> None:
    assert_passes_interpreted(__file__)


class TestBackward:
    __test__ = INTERPRETED

    @FORMS
    @DTYPES
    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize(
        "sizes", [*SIZES, *SPLIT, (50, 96, 64, 16, 8), (64, 64, 64, 64, 16), (40, 1, 1, 1, 1), (40, 56, 200, 20, 5)]
    )
    def test_shapes(self, sizes: tuple[int, ...], deterministic: bool, dtype: torch.dtype, config: Config) -> None:
        check(problem(*sizes, dtype, deterministic=deterministic), config)

    @FORMS
    @DTYPES
    @pytest.mark.parametrize("probability", [0.1, 0.7])  # thresholds on both sides of 2^31
    def test_dropout(self, probability: float, dtype: torch.dtype, config: Config) -> None:
        for R in (20, 100):
            check(problem(50, 40, 72, R, 5, dtype, dropout=probability), config)

    @FORMS
    @pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)])
    def test_any_subset_of_the_gradients(self, needs: tuple[bool, ...], config: Config) -> None:
        names = ("need_dx", "need_dA", "need_dB", "need_dbias")
        options = dict(zip(names, needs, strict=True))
        check(problem(35, 40, 33, 20, 5, dropout=0.2, **options), config)

    @FORMS
    def test_what_is_not_read_may_be_none(self, config: Config) -> None:
        whole = problem(35, 40, 33, 20, 5)
        no_adapter = {**dict.fromkeys(("x", "xa", "lora_A", "lora_B")), "need_dA": False, "need_dB": False}
        check(replace(whole, **no_adapter, need_dbias=False), config)
        check(replace(whole, left=None, right=None, need_dx=False), config)
        check(replace(whole, left=None, right=None, x=None, need_dx=False, need_dA=False), config)

    @FORMS
    @DTYPES
    def test_strided_dy_and_x(self, dtype: torch.dtype, config: Config) -> None:
        p = problem(40, 48, 56, 20, 5, dtype)
        check(replace(p, dy=strided(p.dy), x=strided(p.x)), config)
        check(replace(p, dy=p.dy.t().contiguous().t(), x=p.x.t().contiguous().t()), config)
        check(replace(p, dy=p.dy[:1].expand(40, -1)), config)

    @FORMS
    def test_adapter_in_fp32(self, config: Config) -> None:
        check(problem(40, 48, 56, 20, 5, torch.float16, torch.float32, dropout=0.1), config)

    @FORMS
    def test_no_rows(self, config: Config) -> None:
        gradients = run(problem(0, 8, 8, 4, 2), config)
        shapes = {"dx": (0, 8), "dA": (2, 8), "dB": (8, 2), "dbias": (8,)}
        assert {name: tuple(g.shape) for name, g in gradients.items()} == shapes
        assert all(g.abs().sum() == 0 for g in gradients.values())

    @FORMS
    def test_deterministic_mode_has_no_atomics(self, config: Config) -> None:
        p = problem(70, 300, 64, 40, 5, deterministic=True)
        recorder, first = recorded(p, config)
        assert not recorder.atomics
        assert recorded(replace(p, deterministic=False), config)[0].atomics
        for name, gradient in run(p, config).items():
            assert torch.equal(gradient, first[name]), name

    @FORMS
    @DTYPES
    def test_no_columns(self, dtype: torch.dtype, config: Config) -> None:
        for need_dA in (False, True):
            check(problem(9, 56, 0, 20, 5, dtype, need_dA=need_dA), config)

    def test_default_choice(self) -> None:
        for M in (5, 90):
            check(problem(M, 40, 48, 20, 5), None)

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
    def test_against_the_reference(self, shape: tuple[int, ...], dropout: float, dtype: torch.dtype) -> None:
        M, N, K, P = shape
        p = problem(M, N, K, 1, P, dtype)
        weight = guarded((torch.randn(N, K) * K**-0.5).to(dtype))
        seed = torch.tensor([5, -9])
        for x, bias in ((p.x, None), (strided(p.x), guarded(torch.randn(N).to(dtype)))):
            operands = (x, weight, bias, p.lora_A, p.lora_B)
            with guard_bands():
                computed = tk.forward(*operands, 0.5, dropout=dropout, seed=seed, config=FORWARD)
            names = ("x", "weight", "bias", "lora_A", "lora_B")
            constants = {"scaling": 0.5, "dropout": dropout, "seed": seed}
            plain = reference.forward(Operands(**dict(zip(names, operands, strict=True)), **constants))
            double = dict(zip(names, map(in_double, operands), strict=True))
            exact = reference.forward(Operands(**double, **constants))
            for name, *found in zip(("y", "xa"), computed, plain, exact, strict=True):
                assert_close(name, *found)

    def test_x_is_read_as_often_as_by_the_frozen_product_alone(self) -> None:
        M, N, K, P = 50, 70, 64, 8
        p = problem(M, N, K, 1, P)
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
    @pytest.mark.parametrize("sizes", [*SIZES, (64, 96, 64, 16, 8), (97, 64, 48, 64, 16)])
    def test_counted_bytes_are_predicted(self, sizes: tuple[int, ...], dtype: torch.dtype, dropout: float) -> None:
        # An adapter in fp32, so that the buffers the kernel adds to are the gradients that come back.
        p = problem(*sizes, dtype, torch.float32, dropout=dropout, need_dbias=dtype == torch.float32)
        recorder, named = recorded(p)
        counted = {name: recorder.of(t) for name, t in named.items()}
        flags = Flags(dropout=dropout > 0, need_dbias=p.need_dbias)
        assert counted == predicted_bytes(*sizes, ONE, flags, dtype.itemsize, 4)
        total = recorder.total()
        assert total.loaded == sum(t.loaded for t in counted.values())
        assert total.stored == sum(t.stored for t in counted.values())
        assert recorder.most_loads_of_an_element(p.dy) == 1
        assert recorder.most_loads_of_an_element(p.x) == 1
        assert recorder.most_stores_of_an_element(named["dx"]) == 1

    def test_deterministic_buffers(self) -> None:
        total = recorded(problem(70, 57, 41, 20, 5, deterministic=True))[0].total()
        predicted = predicted_bytes(70, 57, 41, 20, 5, ONE, Flags(need_dbias=True, deterministic=True), 4)
        assert total.stored == sum(t.stored for t in predicted.values())
        assert total.loaded == sum(t.loaded for t in predicted.values())

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_only_what_is_needed_is_read(self, needs: tuple[bool, bool, bool]) -> None:
        p = problem(40, 57, 41, 20, 5, need_dx=needs[0], need_dA=needs[1], need_dB=needs[2], need_dbias=False)
        recorder, named = recorded(p)
        counted = {name: recorder.of(t) for name, t in named.items() if recorder.of(t) != Traffic()}
        assert counted == predicted_bytes(40, 57, 41, 20, 5, ONE, Flags(*needs), 4)

    def test_two_launches_read_dy_and_x_once_and_write_dx_once(self) -> None:
        p = problem(70, 57, 41, 40, 5)
        recorder, named = recorded(p, TWO)
        assert recorder.of(p.dy) == Traffic(loaded=p.dy.numel() * 4)
        assert recorder.of(p.x) == Traffic(loaded=p.x.numel() * 4)
        assert recorder.of(named["dx"]) == Traffic(stored=p.x.numel() * 4)

    @pytest.mark.parametrize(("R", "width", "reads"), [(40, 64 + 16, 2), (100, 128 + 16, 3)])  # chunks, tiles of K
    @DTYPES
    def test_T_is_written_once_in_the_inputs_dtype(self, R: int, width: int, reads: int, dtype: torch.dtype) -> None:
        recorder, named = recorded(problem(70, 57, 130, R, 5, dtype, torch.float32, need_dbias=False), TWO)
        total, counted = recorder.total(), [recorder.of(t) for t in named.values()]
        of_t = 3 * 32 * width * dtype.itemsize  # whole tiles
        assert total.stored - sum(t.stored for t in counted) == of_t
        assert total.loaded - sum(t.loaded for t in counted) == reads * of_t

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("deterministic", [False, True])
    @DTYPES
    @pytest.mark.parametrize("sizes", [*SIZES, *SPLIT], ids=str)
    def test_the_model_of_two_launches_counts_every_byte(
        self, sizes: tuple[int, ...], dtype: torch.dtype, deterministic: bool, dropout: float
    ) -> None:
        total = recorded(problem(*sizes, dtype, deterministic=deterministic, dropout=dropout), TWO)[0].total()
        flags = Flags(need_dbias=True, dropout=dropout > 0, deterministic=deterministic)
        phases = estimate_two_launch(*sizes, TWO, flags, DEFAULT, dtype.itemsize).phases
        assert total.loaded + total.stored == sum(p.l2_bytes for p in phases if p.name in ("project", "expand"))


class Spy:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


SUMS = ("dA", "dB", "dbias")


class TestWorkspace:
    """dA, dB and db lie in one allocation, so that zeroing them is one memset."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_one_launch_and_one_memset(self, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        from loge_kernels.triton_kernels import launch

        launched: list[str] = []
        monkeypatch.setattr(launch, "one_launch_backward", Spy(launch.one_launch_backward, "one", launched))
        buffers = Buffers()
        monkeypatch.setattr(launch, "torch", buffers)
        computed = run(problem(40, 57, 41, 20, 5, deterministic=deterministic), ONE)
        assert launched == ["one"]
        assert buffers.filled == ["empty", "empty" if deterministic else "zeros"]  # dX, then the workspace
        (_, workspace) = buffers.allocated[1]
        base = workspace.data_ptr()
        if deterministic:  # the sums over slabs are tensors of their own
            assert all(computed[name].untyped_storage().nbytes() == computed[name].nbytes for name in SUMS)
            return
        places = [(computed[name].data_ptr() - base, computed[name].nbytes) for name in SUMS]
        assert [begin for begin, _ in places] == [0, 1024, 2560]  # 820 and 1140 bytes, on boundaries of 512
        assert places[-1][0] + places[-1][1] == workspace.nbytes
        covered = torch.ones_like(workspace, dtype=torch.bool)
        for begin, size in places:
            covered[begin // 4 : (begin + size) // 4] = False
        assert (workspace[covered] == 0).all()  # nothing is added between them
        assert all(computed[name].is_contiguous() for name in SUMS)

    def test_sixteen_bit_gradients_do_not_keep_it(self) -> None:
        computed = run(problem(40, 57, 41, 20, 5, torch.float16), ONE)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in computed.values())

    def test_as_gradients_of_parameters(self) -> None:
        """What a step adds to one in place leaves the others alone."""
        p = problem(40, 57, 41, 20, 5)
        computed = run(p, ONE)
        before = computed["dB"].clone()
        leaf = torch.zeros_like(p.lora_A, requires_grad=True)
        leaf.backward(computed["dA"])
        assert leaf.grad is not None
        leaf.grad.add_(leaf.grad)
        leaf.grad = None
        assert torch.equal(computed["dB"], before)

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize(("N", "parts"), [(100, 0), (300, 1)])
    def test_parts_of_T_are_zeroed_only_where_they_are_added(
        self, N: int, parts: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        buffers = Buffers()
        monkeypatch.setattr("loge_kernels.triton_kernels.launch.torch", buffers)
        run(problem(40, N, 41, 20, 5, torch.float16, need_dA=False, need_dB=False, deterministic=deterministic), TWO)
        pairs = zip(buffers.filled, buffers.allocated, strict=True)
        zeroed = [inner.numel() for fill, (_, inner) in pairs if fill == "zeros"]
        assert sum(zeroed) == (0 if deterministic else N + parts * 64 * (32 + 16))  # db, and whole tiles

    def test_sizes_that_split_n_compile_nothing_new(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pointer's type is part of what a kernel is compiled for."""
        from loge_kernels.triton_kernels import launch

        kinds: dict[str, set[Any]] = {}

        def note(name: str, kernel: Any) -> Any:
            def call(*arguments: Any, **constants: Any) -> None:
                types = tuple(a.dtype if isinstance(a, torch.Tensor) else type(a) for a in arguments)
                kinds.setdefault(name, set()).add((types, tuple(constants.items())))

            return type("Kernel", (), {"__getitem__": lambda self, grid: call})()

        for name in ("project", "expand_slab", "expand_tiles"):
            monkeypatch.setattr(launch, name, note(name, getattr(launch, name)))
        for N in (100, 300):
            for R in (37, 100):
                run(problem(40, N, 41, R, 5, torch.float16), TWO)
        assert {name: len(found) for name, found in kinds.items()} == {
            "project": 2,
            "expand_slab": 1,
            "expand_tiles": 1,
        }

    @pytest.mark.parametrize("sizes", [(0, 57, 41, 20, 5), (9, 0, 41, 20, 5), (9, 57, 0, 20, 5)], ids=str)
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_nothing_to_add(self, sizes: tuple[int, ...], deterministic: bool) -> None:
        p = problem(*sizes, need_dx=False, deterministic=deterministic)
        assert_right(run(p, ONE), p)


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
        assert_right(computed, p)
        for M, N, K in ((40, 56, 48), (24, 56, 48), (40, 64, 96)):
            launched.clear()
            run(problem(M, N, K, 16, 8), None)
            assert len(launched) == 1
        launched.clear()
        run(problem(40, 56, 48, 32, 8), None)  # another R is another kind
        assert len(launched) == 2
