"""What only a GPU can show of a backend: graphs, streams, determinism, bfloat16, sizes beyond 32-bit offsets."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

import loge_kernels as loge
from loge_kernels.backend import cuda as cuda_backend
from loge_kernels.check import harness as check
from loge_kernels.check.accuracy import judge
from loge_kernels.numerics.matmul import matmul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = "cuda"
BACKENDS = ["triton", "cuda-sm80", "cuda-sm90"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend's name; of "cuda" each kernel that this GPU can run."""
    name, _, kernel = request.param.partition("-")
    (row,) = [row for row in loge.backends() if row.name == name]
    if not row.available:
        pytest.skip(row.reason)
    if kernel:
        use_kernel(monkeypatch, kernel)
    return name


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel: str, cluster: str = "0x0") -> None:
    """Has the backend "cuda" run `kernel`, in clusters of so many slabs by so many splits (0: what the plan has)."""
    if cuda_backend.why_not_here() is not None:
        pytest.skip(str(cuda_backend.why_not_here()))
    extension = import_module("loge_kernels._C")
    capability = torch.cuda.get_device_capability()
    if kernel not in extension.kernels or (kernel == "sm90" and capability != (9, 0)):
        pytest.skip(f"no {kernel} kernel in this build, or not for a GPU of compute capability {capability}")
    rows, splits = map(int, cluster.split("x"))
    target = {"kernel": kernel, "rows": rows, "splits": splits}
    monkeypatch.setattr(cuda_backend, "_target", lambda extension, device: target | {"device": device.index})
    monkeypatch.setattr(cuda_backend, "_plans", {})


def operands(
    M: int = 300, N: int = 512, K: int = 384, P: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=CUDA, dtype=dtype) * shape[-1] ** -0.5

    x, A, B = (t.requires_grad_() for t in (random(M, K), random(P, K), random(N, P)))
    return x, random(N, K), A, B, random(M, N)


def factors_of(weight: torch.Tensor, R: int) -> loge.Factors:
    """Any: an SVD of a large weight takes long."""
    (N, K), options = weight.shape, {"device": CUDA, "dtype": weight.dtype}
    return loge.Factors(torch.randn(N, R, **options) * R**-0.5, torch.randn(R, K, **options) * K**-0.5)


def gradients(
    operands: tuple[torch.Tensor, ...], backend: str, dropout: float = 0.0, factors: loge.Factors | None = None
) -> tuple[torch.Tensor, ...]:
    x, weight, A, B, dy = operands
    factors = factors or loge.factorize(weight, 64)
    torch.cuda.manual_seed(5)
    y = loge.linear(x, weight, factors, bias=None, lora_A=A, lora_B=B, scaling=0.5, dropout=dropout, backend=backend)
    return torch.autograd.grad(y, (x, A, B), dy)


@pytest.mark.parametrize("dtype", list(check.DTYPES))
def test_every_dtype(backend: str, dtype: str) -> None:
    if dtype == "float32":
        pytest.skip("on a GPU the kernels multiply 16-bit operands")
    report = check.run(backend, CUDA, (dtype,), sample=60)
    assert report.passed, [row for row in report.rows if row.failed]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_deterministic_mode_repeats_its_bits(backend: str, dropout: float) -> None:
    if backend == "cuda" and dropout > 0.0:
        pytest.skip("the CUDA kernels regenerate no dropout mask")
    given = operands(M=4096)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(given, backend, dropout), gradients(given, backend, dropout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# A slab is one block's or split among some, and two slabs share the factors' loads.
CLUSTERS = ["1x1", "1x2", "1x4", "2x1", "2x2", "2x4"]
CUDA_KERNELS = [("sm80", "1x1"), *(("sm90", cluster) for cluster in CLUSTERS)]


SIXTEEN = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@SIXTEEN
@pytest.mark.parametrize(("R", "P"), [(40, 8), (128, 16), (256, 64), (328, 16), (512, 64)])
@pytest.mark.parametrize(("kernel", "cluster"), CUDA_KERNELS)
def test_cuda_kernels(
    kernel: str, cluster: str, R: int, P: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged edges of every tile, full pipelines, every cluster; what compute-sanitizer watches. dA and dB are rounded
    by the last block."""
    use_kernel(monkeypatch, kernel, cluster)
    assert_right(300, 1032, 1160, R, P, dtype)


def assert_right(M: int, N: int, K: int, R: int, P: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every gradient of the backend "cuda" against float64, by the rule of the house."""
    given = operands(M, N, K, P, dtype)
    factors = factors_of(given[1], R)
    assert_gradients(gradients(given, "cuda", factors=factors), given, factors)


def assert_gradients(got: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...], factors: loge.Factors) -> None:
    plain = gradients(given, "reference", factors=factors)
    doubles = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in given)
    in_double = loge.Factors(factors.left.double(), factors.right.double())
    exact = gradients(doubles, "reference", factors=in_double)
    for name, mine, reference, truth in zip(("dX", "dA", "dB"), got, plain, exact, strict=True):
        verdict = judge(mine, reference, truth)
        assert verdict.passed, (name, verdict)


# What the emulated kernels leave open: sizes at which each reading of the hardware's rules gives other numbers.


@SIXTEEN
@pytest.mark.parametrize("P", [8, 16])
@pytest.mark.parametrize("cluster", ["1x1", "1x4", "2x1"])
def test_adapter_tile_of_16(cluster: str, P: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """lora_A and lora_B in tiles 16 wide, with the 32-byte swizzle that no other operand has."""
    use_kernel(monkeypatch, "sm90", cluster)
    assert_right(128, 512, 512, 64, P, dtype)


@pytest.mark.parametrize("R", [64, 128, 256])
def test_order_of_the_boxes_of_left(R: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """left's tile is one box of 64 by 64, two or four; from two on it matters in which order their atoms lie."""
    use_kernel(monkeypatch, "sm90", "1x1")
    assert_right(128, 256, 256, R, 16)


@pytest.mark.parametrize("R", [72, 136])
@pytest.mark.parametrize("cluster", ["1x1", "1x2", "2x1"])
def test_boxes_out_of_bounds(cluster: str, R: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of R = 136 in a tile of 256 one box of 64 is in part, and one wholly, outside the factors: zeros."""
    use_kernel(monkeypatch, "sm90", cluster)
    assert_right(128, 520, 584, R, 16)


@pytest.mark.parametrize(("N", "K"), [(264, 264), (64, 1160), (1160, 64)])
def test_cluster_of_eight_with_idle_blocks(N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps, or one, for eight blocks: those without a share still take part in the exchange."""
    for cluster in ("1x8", "2x4"):
        use_kernel(monkeypatch, "sm90", cluster)
        assert_right(128, N, K, 64, 16)


@pytest.mark.parametrize("M", [1, 64, 65, 129, 192, 193])
@pytest.mark.parametrize(("kernel", "cluster"), [("sm80", "0x0"), ("sm90", "1x1"), ("sm90", "1x2"), ("sm90", "2x2")])
def test_rows_beside_whole_slabs(kernel: str, cluster: str, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last slab has 1, 64 or 65 of its 128 rows: a warpgroup without a row, with all of its own, with one."""
    use_kernel(monkeypatch, kernel, cluster)
    assert_right(M, 520, 584, 64, 16)


def test_two_streams_at_once(backend: str) -> None:
    """Different problems side by side: nothing of a launch is shared with another one."""
    given = [operands(4096, 1024, 1024, dtype=torch.bfloat16) for _ in range(2)]
    factors = [factors_of(each[1], 64) for each in given]
    gradients(given[0], backend, factors=factors[0])  # compiled before
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    got: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    for _ in range(8):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[which].append(gradients(given[which], backend, factors=factors[which]))
    torch.cuda.synchronize()
    for which, results in enumerate(got):
        for found in results:
            assert_gradients(found, given[which], factors[which])


def capture(step: Callable[[], Any]) -> tuple[Any, Any, torch.cuda.CUDAGraph]:
    """What `step` gives on a side stream, and where a graph of it writes the same at each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            on_side = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return on_side, captured, graph


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_graph_capture_and_side_stream(backend: str) -> None:
    x, weight, A, B, dy = operands()
    factors = loge.factorize(weight, 64)

    def step() -> tuple[torch.Tensor, ...]:
        y = loge.linear(x, weight, factors, bias=None, lora_A=A, lora_B=B, scaling=0.5, backend=backend)
        return torch.autograd.grad(y, (x, A, B), dy)

    expected = step()
    on_side, captured, graph = capture(step)
    graph.replay()
    torch.cuda.synchronize()
    for results in (on_side, captured):
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=2e-2, atol=1e-3)


def layer(dropout: float) -> loge.LoGELinear:
    linear = torch.nn.Linear(384, 512, device=CUDA, dtype=torch.bfloat16)
    made = loge.LoGELinear.from_linear(linear, rank=64, lora_rank=16, lora_dropout=dropout)
    torch.nn.init.normal_(made.lora_B)
    return made


def test_a_captured_layer_draws_a_new_mask_at_each_replay() -> None:
    module = layer(0.3)
    x = torch.randn(300, 384, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    leaves = (x, module.lora_A, module.lora_B)

    def step() -> tuple[torch.Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)

    _, captured, graph = capture(step)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append([t.clone() for t in captured])
    for first, second in zip(*seen, strict=True):
        assert first.isfinite().all()
        assert not torch.equal(first, second)


def test_compiled_into_cuda_graphs() -> None:
    module = layer(0.0)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    found = []
    for function in (module, compiled):
        for seed in range(3):  # the second call records the graph, the third replays it
            torch.manual_seed(seed)
            x = torch.randn(300, 384, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
            torch.compiler.cudagraph_mark_step_begin()
            y = function(x)
            result = y.detach().clone()
            y.sum().backward()
        found.append([result, x.grad, module.lora_A.grad, module.lora_B.grad])
        module.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def test_offsets_beyond_32_bits(backend: str) -> None:
    M, N, K = 300_000, 8192, 64  # dY has 2.46e9 elements
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    dy = torch.empty(M, N, device=CUDA, dtype=torch.bfloat16).normal_()
    x = torch.randn(M, K, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(N, K, device=CUDA, dtype=torch.bfloat16)
    factors = factors_of(weight, 16)
    y = loge.linear(x, weight, factors, backend=backend)
    (dx,) = torch.autograd.grad(y, x, dy)
    tail = matmul(matmul(dy[-64:], factors.left), factors.right)
    torch.testing.assert_close(dx[-64:], tail, rtol=2e-2, atol=2e-1)


def test_no_compilation_for_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *_, **details: compiled.append(details["repr"]))
    sizes = ((300, 512, 384), (304, 512, 384), (1000, 1024, 2048), (8, 2048, 512), (16384, 512, 384))
    for M, N, K in sizes:
        gradients(operands(M, N, K), "triton")
    once = len(compiled)
    assert once > 0
    for M, N, K in sizes:
        gradients(operands(M + 8, N + 64, K + 128), "triton")
    assert len(compiled) == once, compiled[once:]
