"""Exact products in 4 bits, "nvfp4" and "mxfp4": the rounding against a rule written apart in float64, and what cuBLAS
is given. Layers and models: `tests/conversion/test_four_bit_dtype.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surrogate import case, problem_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from loge_kernels.backend import triton as triton_backend
from loge_kernels.numerics import exact_dtypes, four_bit
from loge_kernels.numerics.four_bit import FourBitWeight, Quantized

NAMED = pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
BLOCK = {"nvfp4": 16, "mxfp4": 32}
# In the order of their codes; those of even codes win ties.
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
SCALES = {
    "nvfp4": torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double(),  # 2^-9 to 448
    "mxfp4": torch.tensor([2.0**power for power in range(-126, 127)], dtype=torch.float64),
}


# The rule


def scales_of(matrix: Tensor, name: str, stochastic: bool) -> tuple[Tensor, float]:
    """The scale of each element of `matrix` [I, N], float64, in whole blocks, and the tensor's own."""
    largest = matrix.abs().view(len(matrix), -1, BLOCK[name]).amax(2)
    whole = max(largest.max().item() / (6 * 448), 2.0**-116) if name == "nvfp4" else 1.0
    wanted = (largest / 6 / whole).clamp_max(SCALES[name][-1].item())
    if stochastic or name == "mxfp4":
        place = torch.searchsorted(SCALES[name], wanted * (1 - 1e-7))  # the first not smaller; float32's own error
    else:
        place = (wanted[..., None] - SCALES[name]).abs().argmin(-1)
    return SCALES[name][place].repeat_interleave(BLOCK[name], 1), whole


def padded(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[1] % 32))


def neighbours(size: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of `size`, from 0 to 6, the largest number below or at it and the smallest above or at it."""
    above = torch.searchsorted(NUMBERS, size).clamp_max(7)
    exact = NUMBERS[above] == size
    return NUMBERS[torch.where(exact, above, above - 1)], NUMBERS[above]


def nearest(matrix: Tensor, name: str) -> Tensor:
    """`matrix` [I, N], each block rounded on its own scale, ties to even codes, in float64; no rotation."""
    wide = padded(matrix.double())
    scale, whole = scales_of(wide, name, stochastic=False)
    size = wide.abs() / (scale * whole)
    distance = (size[..., None] - NUMBERS).abs()
    odd = torch.arange(8) % 2 * 1e-12
    return NUMBERS[(distance + odd).argmin(-1)] * wide.sign() * scale * whole


def hadamard(size: int) -> Tensor:
    """By Sylvester's construction, orthogonal, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def rotation(N: int) -> Tensor:
    """H [N, N]: blocks of the largest power of two up to 64 that divides N."""
    size = next(size for size in (64, 32, 16, 8, 4, 2, 1) if N % size == 0)
    return torch.block_diag(*[hadamard(size)] * (N // size))


def stands_for(q: Quantized, N: int) -> Tensor:
    """What a copy stands for, [I, N] in float64, still rotated, read byte by byte; its padding must be zero."""
    codes = torch.stack([q.packed & 15, q.packed >> 4], dim=2).flatten(1).long()  # the first in the low half
    values = torch.cat([NUMBERS, -NUMBERS])[codes]
    bits = q.scale.double() if q.whole is None else q.scale.view(torch.float8_e4m3fn).double()
    scale = 2.0 ** (bits - 127) if q.whole is None else bits * q.whole.double()
    values = values * scale.repeat_interleave(BLOCK[q.name], 1)
    assert (values[:, N:] == 0).all()
    return values[:, :N]


def copy_of(weight: Tensor, name: str) -> Quantized:
    found = FourBitWeight(name).operands(weight)
    return Quantized(found["dense"].t(), found["dense_scale"], found["dense_whole"])


def matrices(M: int = 21, N: int = 96, K: int = 24) -> tuple[Tensor, Tensor]:
    """dY with rows, and a weight with columns, of very different size."""
    dy = torch.randn(M, N) * torch.logspace(-3, 2, M)[:, None]
    return dy, torch.randn(N, K) * torch.logspace(-2, 1, K)


def multiply(dy: Tensor, weight: Tensor, name: str) -> Tensor:
    return four_bit.multiply(dy, *FourBitWeight(name).operands(weight).values())


def is_product(got: Tensor, left: Tensor, right: Tensor) -> None:
    """`left` @ `right` up to the rounding of a float32 sum and of the result."""
    truth, size = left @ right, left.abs() @ right.abs()
    form = torch.finfo(got.dtype)
    rounding = 0.51 * form.eps * truth.abs().clamp_min(form.smallest_normal)
    assert ((got.double() - truth).abs() <= rounding + 1e-5 * size).all()


# Rounding


@NAMED
@pytest.mark.parametrize("N", [1, 7, 31, 33, 129])
def test_a_weight_is_rounded_as_the_rule_says(N: int, name: str) -> None:
    """Odd N: nothing is rotated."""
    weight = torch.randn(N, 40) * torch.logspace(-4, 3, 40)
    weight[:, 0] = 0.0
    q = copy_of(weight, name)
    torch.testing.assert_close(stands_for(q, N), nearest(weight.t(), name)[:, :N], rtol=1e-6, atol=0.0)


@NAMED
@pytest.mark.parametrize("N", [2, 12, 48, 64, 160])
def test_and_rotated_along_n_first(N: int, name: str) -> None:
    weight = torch.randn(N, 40)
    turned = rotation(N) @ weight.double()
    got = stands_for(copy_of(weight, name), N)
    torch.testing.assert_close(got, nearest(turned.t(), name)[:, :N], rtol=1e-5, atol=1e-6)
    assert (got - turned.t()).norm() < 0.15 * turned.norm()


@NAMED
def test_ties_go_to_even_codes_and_signs_stay(name: str) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0], dtype=torch.float64)
    weight = torch.zeros(33, 2)
    weight[:8, 0], weight[8:16, 0], weight[32, 1] = ties, -ties, 6 * 448  # nvfp4's scale of the tensor is 1
    got = stands_for(copy_of(weight, name), 33)
    assert torch.equal(got[0, :16], torch.cat([expected, -expected]))


@NAMED
def test_what_it_takes(name: str) -> None:
    weight = torch.randn(256, 48)
    found = FourBitWeight(name).operands(weight)
    assert (found["dense"].dtype, found["dense"].nbytes) == (torch.uint8, weight.numel() // 2)
    assert found["dense_scale"].nbytes == weight.numel() // BLOCK[name]
    assert (found["dense_whole"] is None) == (name == "mxfp4")
    assert found["dense"].shape == (128, 48)


@NAMED
def test_dy_goes_up_or_down_and_in_the_mean_nowhere(name: str) -> None:
    matrix = torch.randn(4, 63) * 3
    matrix[0, 0] = matrix.abs().max() * 1.3  # the largest of all, where a scale rounded down would cut it off
    wide = padded(matrix.double())
    scale, whole = scales_of(wide, name, stochastic=True)
    down, up = (side * scale * whole for side in neighbours(wide.abs() / (scale * whole)))
    draws = torch.stack([stands_for(four_bit.quantize(matrix, name, stochastic=True), 63) for _ in range(600)])
    size = draws.abs()
    assert (torch.isclose(size, down[:, :63]) | torch.isclose(size, up[:, :63])).all()
    spread = (up - down)[:, :63] / 2 / 600**0.5
    assert ((draws.mean(0) - matrix.double()).abs() <= 5 * spread + 1e-6 * matrix.abs()).all()
    assert len(draws.unique(dim=0)) > 1


@NAMED
def test_what_4_bits_hold_is_never_moved(name: str) -> None:
    matrix = torch.zeros(2, 33)
    matrix[0, :15] = torch.cat([NUMBERS, -NUMBERS[1:]]).float()
    matrix[1, 32] = 6 * (448 if name == "nvfp4" else 512)
    for stochastic in (False, True):
        assert torch.equal(stands_for(four_bit.quantize(matrix, name, stochastic), 33), matrix.double())


# The product


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(21, 96, 24), (1, 7, 5), (64, 1, 3), (3, 33, 1), (40, 300, 20)])
def test_product(shape: tuple[int, int, int], dtype: torch.dtype, name: str) -> None:
    """Of the numbers that dY was rounded to and of those that W was, seen apart."""
    dy, weight = matrices(*shape)
    dy, weight = dy.to(dtype), (weight / 100).to(dtype)
    N = shape[1]
    torch.manual_seed(3)
    q = four_bit.quantize(dy, name, stochastic=True)
    torch.manual_seed(3)
    got = multiply(dy, weight, name)
    assert got.dtype == dtype
    is_product(got, stands_for(q, N), stands_for(copy_of(weight, name), N).t())


@NAMED
def test_strides_slabs_and_no_rows(name: str, monkeypatch: pytest.MonkeyPatch, without_chance: None) -> None:
    dy, weight = matrices(50)
    whole = multiply(dy, weight, name)
    wide = torch.zeros(96, 100).t()
    wide[::2] = dy
    assert torch.equal(multiply(wide[::2], weight.t().contiguous().t(), name), whole)
    assert multiply(dy[:0], weight, name).shape == (0, 24)
    monkeypatch.setattr(four_bit, "_SLAB", 96 * 7)
    assert torch.equal(multiply(dy, weight, name), whole)


@NAMED
def test_in_the_mean_it_is_the_product_with_the_rounded_weight(name: str) -> None:
    dy, weight = matrices(5, 64, 16)
    expected = dy.double() @ (rotation(64) @ stands_for(copy_of(weight, name), 64).t())
    draws = torch.stack([multiply(dy, weight, name).double() for _ in range(400)])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 400**0.5 + 1e-5 * expected.abs()).all()
    assert (error / expected.abs()).median() < 0.1


@NAMED
def test_the_rotation_leaves_the_product(name: str) -> None:
    H = hadamard(64)
    turned = torch.cat([NUMBERS, -NUMBERS])[torch.randint(16, (64, 8))]
    turned[::16] = 6.0  # of every block: nvfp4's scales are then all the same
    dy, weight = 4 * H[:6].float(), (H @ turned).float()  # rotated they are what 4 bits hold
    torch.testing.assert_close(multiply(dy, weight, name), dy @ weight, rtol=1e-4, atol=1e-4)


@NAMED
def test_zeros_and_values_that_are_not_finite(name: str) -> None:
    dy, weight = matrices(8)
    dy[0], dy[1], weight[:, 3] = 0.0, 1e-30, 0.0
    got = multiply(dy, weight, name)
    assert torch.isfinite(got).all()
    assert (got[0] == 0).all()
    assert (got[:, 3] == 0).all()
    assert multiply(torch.zeros_like(dy), weight, name).abs().max() == 0
    assert multiply(dy, torch.zeros_like(weight), name).abs().max() == 0
    tiny = torch.full((2, 96), 1e-38)
    assert torch.isfinite(multiply(tiny, weight, name)).all()
    assert (four_bit.quantize(torch.zeros(2, 96), name).scale > 0).all(), "0 / 0 would be anything"
    for value in (float("nan"), float("inf")):
        broken = dy.clone()
        broken[2, 5] = value
        finite = torch.isfinite(multiply(broken, weight, name))
        assert not finite[2].any(), "it must be seen by who looks for it"
        assert finite[[0, 1, 3, 4, 5, 6, 7]].all() == (name == "mxfp4")


def test_the_generator_decides() -> None:
    dy, weight = matrices()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(multiply(dy, weight, "nvfp4"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# What cuBLAS is given


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 3), (300, 10)])
def test_scales_in_cublas_order(shape: tuple[int, int]) -> None:
    bits = torch.randint(1, 255, shape, dtype=torch.uint8)
    flat = four_bit.in_cublas_order(bits)
    assert len(flat) == -(-shape[0] // 128) * 128 * -(-shape[1] // 4) * 4
    assert torch.equal(in_order(flat, *shape), bits)
    assert flat.long().sum() == bits.long().sum(), "the padding is zero"


def in_order(flat: Tensor, rows: int, blocks: int) -> Tensor:
    """The scales that lie in `flat` as cuBLAS documents it, [rows, blocks]."""
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)
    tile = row // 128 * -(-blocks // 4) + block // 4
    return flat.view(torch.uint8)[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4]


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpus_composition(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scaled_mm` as its documentation has it, on a CPU."""
    kinds, orders = F.ScalingType, F.SwizzleType
    M, N, K = 21, 72, 48
    dy, weight = (t.to(dtype) for t in matrices(M, N, K))
    form = {
        "nvfp4": ([kinds.BlockWise1x16, kinds.TensorWise], [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE], dtype),
        "mxfp4": ([kinds.BlockWise1x32], [orders.SWIZZLE_32_4_4], torch.bfloat16),
    }[name]

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Any, recipe_a: Any, *rest: Any, output_dtype: torch.dtype) -> Tensor:
        scale_b, recipe_b, order_a, order_b = rest
        assert (recipe_a, order_a, output_dtype) == form
        assert (recipe_b, order_b) == form[:2]
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        sides = []
        for matrix, scale in ((a, scale_a), (b.t(), scale_b)):
            packed = matrix.view(torch.uint8)
            scales = in_order(scale[0], len(packed), 2 * packed.shape[1] // BLOCK[name])
            q = Quantized(packed, scales, scale[1] if name == "nvfp4" else None)
            sides.append(stands_for(q, N))
        return (sides[0] @ sides[1].t()).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    torch.manual_seed(1)
    q = four_bit.quantize(dy, name, stochastic=True)
    on_gpu = [Quantized(m.packed, four_bit.in_cublas_order(m.scale), m.whole) for m in (q, copy_of(weight, name))]
    got = four_bit._by_cublas(*on_gpu, dtype)
    torch.manual_seed(1)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), multiply(dy, weight, name).float(), rtol=0.01, atol=1e-3)


@NAMED
@pytest.mark.parametrize("shape", [(130, 48, 32), (1, 7, 16)])
def test_torch_takes_it_for_a_gpu(shape: tuple[int, int, int], name: str) -> None:
    """By the checks of its fake tensors, which count the scales."""
    M, N, K = shape
    sides = []
    for rows in (M, K):
        q = four_bit.quantize(torch.randn(rows, N), name)
        sides.append((q.packed, four_bit.in_cublas_order(q.scale), q.whole))
    with FakeTensorMode():
        on_gpu = [[None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in q] for q in sides]
        got = four_bit._by_cublas(*(Quantized(*tensors) for tensors in on_gpu), torch.bfloat16)
    assert (got.shape, got.dtype, got.device.type) == ((M, K), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [0, 1, 17, 300])
def test_on_a_gpu(name: str, dtype: torch.dtype, M: int) -> None:
    dy, weight = (t.to("cuda", dtype) for t in matrices(M, 208, 256))
    reason = exact_dtypes.why_not(name, dy.device, *weight.shape)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(1)
    got = multiply(dy, weight, name)
    exact = dy.double() @ weight.double()
    assert got.shape == exact.shape
    assert M == 0 or torch.cosine_similarity(got.double().flatten(), exact.flatten(), dim=0) > 0.97


# Where it runs


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not, cuda = exact_dtypes.why_not, torch.device("cuda")
    for capability, able in (((9, 0), ""), ((8, 9), ""), ((10, 3), "nvfp4 mxfp4"), ((12, 0), "nvfp4"), ((11, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for name in BLOCK:
            reason = why_not(name, cuda, 64, 64)
            assert (reason is None) == (name in able), (capability, name)
            assert reason is None or f"{name} needs compute capability 10.x" in reason
            assert reason is None or "this GPU has" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "K must be a multiple of 16 on a GPU, and the weight is [64, 72]" in why_not("nvfp4", cuda, 64, 72)
    assert why_not("nvfp4", cuda, 72, 64) is None, "N is padded"
    assert "no products in 4 bits on mps" in why_not("nvfp4", torch.device("mps"), 64, 64)
    assert "empty" in why_not("mxfp4", torch.device("cpu"), 0, 5)
    assert why_not("mxfp4", torch.device("cpu"), 7, 5) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in why_not("nvfp4", cuda, 64, 64)
    assert "8.9" not in (why_not("int8", torch.device("cpu"), 7, 5) or "")


@NAMED
def test_triton_leaves_it_to_pytorch(name: str) -> None:
    c = case(M=9, N=48, K=32, R=None).to(torch.bfloat16)
    found = FourBitWeight(name).operands(c.weight)
    problem = problem_of(c, ("need_dx", "need_dA"), left=None, right=None, **{**found, "weight": None})
    assert "in 4 bits, which PyTorch computes" in (triton_backend.why_not(problem) or "")
