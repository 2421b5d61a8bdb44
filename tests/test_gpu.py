"""What only a GPU can show of a backend: graphs, streams, determinism, bfloat16, sizes beyond 32-bit offsets."""

from __future__ import annotations

import pytest
import torch

import loge_kernels as loge
from loge_kernels import check
from loge_kernels.products import matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = "cuda"


def operands(M: int = 300, N: int = 512, K: int = 384, P: int = 16) -> tuple[torch.Tensor, ...]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=CUDA, dtype=torch.bfloat16) * shape[-1] ** -0.5

    x, A, B = (t.requires_grad_() for t in (random(M, K), random(P, K), random(N, P)))
    return x, random(N, K), A, B, random(M, N)


def gradients(operands: tuple[torch.Tensor, ...], backend: str, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
    x, weight, A, B, dy = operands
    factors = loge.factorize(weight, 64)
    torch.cuda.manual_seed(5)
    y = loge.linear(x, weight, factors, None, A, B, 0.5, dropout, backend=backend)
    return torch.autograd.grad(y, (x, A, B), dy)


@pytest.mark.parametrize("dtype", list(check.DTYPES))
def test_triton_in_every_dtype(dtype: str) -> None:
    report = check.run("triton", CUDA, (dtype,), sample=60)
    assert report.passed, [row for row in report.rows if row.failed]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_deterministic_mode_repeats_its_bits(dropout: float) -> None:
    given = operands(M=4096)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(given, "triton", dropout), gradients(given, "triton", dropout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_graph_capture_and_side_stream(backend: str) -> None:
    x, weight, A, B, dy = operands()
    factors = loge.factorize(weight, 64)

    def step() -> tuple[torch.Tensor, ...]:
        y = loge.linear(x, weight, factors, None, A, B, 0.5, backend=backend)
        return torch.autograd.grad(y, (x, A, B), dy)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            on_side = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for results in (on_side, captured):
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=2e-2, atol=1e-3)


def test_offsets_beyond_32_bits() -> None:
    M, N, K = 300_000, 8192, 64  # dY has 2.46e9 elements
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    dy = torch.empty(M, N, device=CUDA, dtype=torch.bfloat16).normal_()
    x = torch.randn(M, K, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(N, K, device=CUDA, dtype=torch.bfloat16)
    factors = loge.factorize(weight, 16, "random")
    y = loge.linear(x, weight, factors, backend="triton")
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
