"""Exact products in 8 bits: rounding against a formula written apart, backends, copies that follow the weight."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from surrogate import NAMES, Case, call, case, heaviest, leaves_of
from surrogate import run as run_for
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import LoGELinear
from loge_kernels.check.accuracy import judge
from loge_kernels.numerics import eight_bit
from loge_kernels.numerics.eight_bit import EightBitWeight

NAMED = ("float8", "int8")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rounded_rows(matrix: Tensor, name: str) -> Tensor:
    """`matrix`, each row rounded to 8 bits on its own scale, in float64."""
    share = 1 / (448.0 if name == "float8" else 127.0)
    scale = (matrix.float().abs().max(1, keepdim=True).values * share).clamp_min(1e-37)
    q = matrix.float() / scale
    q = q.to(torch.float8_e4m3fn) if name == "float8" else q.round()
    return q.double() * scale.double()


def rounded_product(dy: Tensor, weight: Tensor, name: str) -> Tensor:
    return rounded_rows(dy, name) @ rounded_rows(weight.t(), name).t()


def is_within_twice(got: Tensor, dy: Tensor, weight: Tensor, name: str, more: Tensor | float = 0.0) -> bool:
    """The rule of `accuracy`: the yardstick is the same formula in float32, rounded once; `more` is added to both."""
    plain = rounded_rows(dy, name).float() @ rounded_rows(weight.t(), name).t().float()
    plain += more.float() if isinstance(more, Tensor) else more
    return judge(got, plain.to(got.dtype), rounded_product(dy, weight, name) + more).passed


def operands(M: int = 21, N: int = 48, K: int = 32, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """dY with rows, and a weight with columns, of very different size."""
    dy = torch.randn(M, N) * torch.logspace(-6, 2, M)[:, None]
    weight = torch.randn(N, K) * torch.logspace(-3, 1, K)
    return dy.to(dtype), weight.to(dtype)


def assert_product(got: Tensor, dy: Tensor, weight: Tensor, name: str) -> None:
    truth = rounded_product(dy, weight, name)
    assert got.dtype == dy.dtype
    assert is_within_twice(got, dy, weight, name)
    if dy.dtype != torch.float16:  # each element, small rows and columns too: rounded once, float32 in the sum
        size = rounded_rows(dy, name).abs() @ rounded_rows(weight.t(), name).t().abs()
        eps = torch.finfo(got.dtype).eps
        assert ((got.double() - truth).abs() <= 0.51 * eps * truth.abs() + 1e-5 * size).all()


@pytest.fixture
def exact_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch._int_mm, which saturates on a CPU without VNNI."""
    if not eight_bit.cpu_multiplies_int8():
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())


@pytest.fixture(params=[True, False], ids=["integers", "float32"])
def either_cpu(exact_integers: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies int8, and one that does not, whatever this one is."""
    monkeypatch.setattr(eight_bit, "cpu_multiplies_int8", lambda: request.param)


# The product


@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("shape", [(21, 48, 32), (1, 7, 5), (64, 1, 3), (3, 33, 1), (40, 300, 20)])
def test_product_rounds_as_the_formula(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    dy, weight = operands(*shape, dtype)
    tensor, scale = EightBitWeight(name).current(weight)
    assert (tensor.dtype, tensor.shape, scale.shape) == (eight_bit.DTYPES[name], weight.shape, weight.shape[1:])
    assert_product(eight_bit.multiply(dy, tensor, scale), dy, weight, name)


@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("name", NAMED)
def test_slabs_strides_and_no_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dy, weight = operands(50, 40, 24)
    wide = torch.zeros(40, 100, dtype=dy.dtype).t()
    wide[::2] = dy
    copies = EightBitWeight(name).current(weight)
    whole = eight_bit.multiply(dy, *copies)
    assert torch.equal(eight_bit.multiply(wide[::2], *copies), whole)
    assert eight_bit.multiply(dy[:0], *copies).shape == (0, 24)
    monkeypatch.setattr(eight_bit, "_SLAB", 40 * 7)
    assert_product(eight_bit.multiply(dy, *copies), dy, weight, name)
    other = EightBitWeight(name).current(weight.t().contiguous().t())
    assert torch.equal(eight_bit.multiply(dy, *other), eight_bit.multiply(dy, *copies))


@pytest.mark.usefixtures("either_cpu")
def test_int8_is_the_integer_result() -> None:
    """With both scales 1 the result is an integer product, whatever multiplies."""
    dy, weight = torch.randint(-127, 128, (9, 700)).float(), torch.randint(-127, 128, (700, 16)).float()
    dy[:, 0], weight[0] = 127.0, 127.0
    copies = EightBitWeight("int8").current(weight)
    truth = (dy.double() @ weight.double()).float()
    assert torch.equal(eight_bit.multiply(dy, *copies), truth)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("capability", ["avx2", "avx512_vnni"])
def test_what_the_processor_says_is_tried(capability: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN can be kept from using what the processor has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int() - int(wrong))
    asked = eight_bit.cpu_multiplies_int8.__wrapped__
    assert asked() is (capability == "avx512_vnni" and not wrong)


def by_cublas(dy: Tensor, tensor: Tensor, scale: Tensor) -> Tensor:
    return eight_bit._by_cublas(*eight_bit.quantize_rows(dy, tensor.dtype), tensor, scale, dy.dtype)


@pytest.mark.usefixtures("exact_integers")
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M", [0, 1, 16, 31, 32, 50])
def test_the_gpus_composition(name: str, dtype: torch.dtype, M: int) -> None:
    """torch._scaled_mm and torch._int_mm take the same operands on a CPU."""
    dy, weight = operands(M, 48, 32, dtype)
    for given in (weight, weight.t().contiguous().t()):
        copies = EightBitWeight(name).current(given)
        got = by_cublas(dy, *copies)
        assert got.shape == (M, 32)
        assert_product(got, dy, weight, name)
        assert torch.equal(by_cublas(dy, copies[0].contiguous(), copies[1]), got)


def test_int8_on_a_gpu_is_padded_to_more_than_16_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    int_mm = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: rows.append(a.shape[0]) or int_mm(a, b))
    for M in (0, 1, 16, 17, 40):
        dy, weight = operands(M)
        by_cublas(dy, *EightBitWeight("int8").current(weight))
    assert rows == [32, 32, 32, 40]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M", [0, 1, 16, 17, 300])
def test_on_a_gpu(name: str, dtype: torch.dtype, M: int) -> None:
    dy, weight = (t.cuda() for t in operands(M, 512, 256, dtype))
    reason = eight_bit.why_not(name, dy.device, *weight.shape)
    if reason is not None:
        pytest.skip(reason)
    got = eight_bit.multiply(dy, *EightBitWeight(name).current(weight))
    if name == "float8":  # Hopper's tensor cores keep 14 bits of a sum
        truth = rounded_product(dy, weight, name)
        assert judge(got, truth.bfloat16().to(dtype), truth).passed
    else:
        assert_product(got, dy, weight, name)


@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("name", NAMED)
def test_zero_rows_and_values_that_are_not_finite(name: str) -> None:
    dy, weight = operands(8)
    dy[0], dy[1], weight[:, 3] = 0.0, 1e-30, 0.0
    dy[2, 5], dy[3, 5] = float("nan"), float("inf")
    got = eight_bit.multiply(dy, *EightBitWeight(name).current(weight))
    assert (got[0] == 0).all()
    assert (got[4:, 3] == 0).all()
    finite = torch.isfinite(got)
    assert finite[[0, 1, 4, 5, 6, 7]].all()
    assert not finite[2].any()
    assert not finite[3].all()
    assert eight_bit.multiply(torch.zeros_like(dy), *EightBitWeight(name).current(weight)).abs().max() == 0


# Through the op


def run(c: Case, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of everything but the weight."""
    return run_for(c, tuple(n for n in NAMES if n != "weight"), **options)


def in_float32(dtype: torch.dtype = torch.float32, **shape: Any) -> Case:
    return case(M=9, N=48, K=32, **shape).to(dtype)


def adapter_part(c: Case) -> Tensor:
    if c.lora_A is None or c.lora_B is None:
        return torch.zeros(())
    return c.scaling * c.dy.double() @ c.lora_B.double() @ c.lora_A.double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("shape", [{"R": None}, {"R": None, "P": None}])
def test_exact_layer(name: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    c = in_float32(dtype, **shape)
    got, plain = run(c, exact_dtype=name), run(c)
    assert is_within_twice(got["x"], c.dy, c.weight, name, adapter_part(c))
    assert set(got) == set(plain)
    for other in set(got) - {"x"}:
        assert torch.equal(got[other], plain[other]), other
    assert not torch.equal(got["x"], plain["x"])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("fraction", "count"), [(1.0, 9), (0.3, 3), (0.0, 0)])
def test_exact_rows_and_exact_step(name: str, fraction: float, count: int) -> None:
    c = in_float32()
    wide = c.to(torch.float64)
    heavy = heaviest(c.dy, count)[:, None]
    low_rank = wide.dy @ wide.left @ wide.right
    truth = torch.where(heavy, rounded_product(c.dy, c.weight, name), low_rank) + adapter_part(c)
    got = run(c, exact_fraction=fraction, exact_dtype=name)["x"]
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)
    if fraction == 0.0:
        assert torch.equal(got, run(c)["x"])


@pytest.mark.parametrize(("shape", "options"), [({"R": None}, {}), ({}, {"exact_fraction": 1.0})])
def test_the_copy_is_saved_and_the_weight_is_not(shape: dict[str, Any], options: dict[str, Any]) -> None:
    c = in_float32(torch.bfloat16, **shape)
    copy8 = EightBitWeight("int8")
    saved: list[Tensor] = []
    leaves = leaves_of(c, ("x",))
    x = leaves["x"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(c, leaves, exact_dtype=copy8, **options)
    kept = {t.data_ptr() for t in saved}
    assert c.weight.data_ptr() not in kept
    assert copy8.tensor.data_ptr() in kept
    expected = torch.autograd.grad(y, x, c.dy, retain_graph=True)[0]
    c.weight.data.fill_(float("nan"))
    assert torch.equal(torch.autograd.grad(y, x, c.dy)[0], expected)


def test_nothing_is_quantised_that_nobody_reads() -> None:
    c = in_float32()
    for options in ({"x": c.x, "factors": None}, {"x": c.x.clone().requires_grad_(), "factors": c.factors()}):
        unused = EightBitWeight("int8")
        loge.linear(weight=c.weight, exact_dtype=unused, **options)
        assert unused.tensor is None
    used = EightBitWeight("int8")
    x = c.x.clone().requires_grad_()
    with torch.no_grad():
        loge.linear(x, c.weight, None, exact_dtype=used)
        assert used.tensor is None
    loge.linear(x, c.weight, None, exact_dtype=used)
    assert used.tensor is not None


def test_autocast_quantises_the_weight_itself() -> None:
    c = in_float32(R=None, P=None)
    copy8, x = EightBitWeight("int8"), c.x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = loge.linear(x, c.weight, None, exact_dtype=copy8)
    first = copy8.tensor
    y.backward(c.dy.bfloat16())
    assert torch.equal(first, EightBitWeight("int8").current(c.weight)[0])
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loge.linear(x, c.weight, None, exact_dtype=copy8)
    assert copy8.tensor is first


# Reasons


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = eight_bit.why_not
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.9, this GPU has 8.0: use 'int8'" in why_not("float8", cuda, 64, 64)
    assert why_not("int8", cuda, 64, 64) is None
    assert "multiples of 16 on a GPU, and the weight is [64, 72]" in why_not("int8", cuda, 64, 72)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not("float8", cuda, 64, 64) is None
    assert "MPS" in why_not("int8", torch.device("mps"), 64, 64)
    assert why_not("int8", torch.device("cpu"), 7, 5) is None
    assert "empty" in why_not("int8", torch.device("cpu"), 0, 5)


# The copy follows its weight


def layer_of(name: str | None = "int8", rank: int | None = None, **options: Any) -> LoGELinear:
    return LoGELinear.from_linear(nn.Linear(24, 20), rank=rank, lora_rank=0, exact_dtype=name, **options)


def input_gradient(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """dX and the dY it came from."""
    weight = next(layer.parameters())
    x = torch.randn(5, 24, dtype=weight.dtype, requires_grad=True)
    dy = torch.randn(5, 20, dtype=weight.dtype)
    return torch.autograd.grad(layer(x), x, dy)[0], dy


def follows(layer: LoGELinear) -> None:
    got, dy = input_gradient(layer)
    assert_product(got, dy, layer.weight.detach(), layer.exact_dtype)


@pytest.mark.parametrize("name", NAMED)
def test_a_layer_quantises_once_and_follows(name: str) -> None:
    layer = layer_of(name)
    follows(layer)
    first = layer.eight_bit.tensor
    follows(layer)
    assert layer.eight_bit.tensor is first
    changes = [
        lambda: (layer.weight.data.mul_(-2), layer.invalidate()),
        lambda: layer.load_state_dict({"weight": torch.randn(20, 24), "bias": torch.randn(20)}),
        lambda: layer.load_state_dict({"weight": torch.randn(20, 24), "bias": torch.randn(20)}, assign=True),
        lambda: nn.init.normal_(layer.weight),
        lambda: layer.to(torch.bfloat16),
        lambda: nn.init.normal_(layer.to_empty(device="cpu").weight),
    ]
    for change in changes:
        change()
        layer.requires_grad_(False)
        follows(layer)


def test_a_trainable_weight_is_followed_at_every_step() -> None:
    layer = layer_of()
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([layer.weight], lr=0.5)
    for _ in range(3):
        follows(layer)
        layer(torch.ones(2, 24, requires_grad=True)).sum().backward()
        optimizer.step()


def test_an_earlier_graph_keeps_the_weight_it_was_made_with() -> None:
    layer = layer_of()
    before = layer.weight.detach().clone()
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 20)
    y = layer(x)
    nn.init.normal_(layer.weight)
    follows(layer)
    assert_product(torch.autograd.grad(y, x, dy)[0], dy, before, "int8")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(way: Any) -> None:
    layer = layer_of()
    follows(layer)
    other = way(layer)
    assert other.exact_dtype == "int8"
    nn.init.normal_(other.weight)
    follows(other)
    follows(layer)


def test_the_attribute() -> None:
    layer = layer_of(None, rank=8)
    assert layer.exact_dtype is None
    layer.exact_dtype, layer.exact_fraction = "float8", 1.0
    follows(layer)
    held = layer.eight_bit
    layer.exact_dtype = "float8"
    assert layer.eight_bit is held
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert len(list(layer.parameters())) == 2
    assert not list(layer.buffers())
    layer.exact_dtype = None
    got, dy = input_gradient(layer)
    torch.testing.assert_close(got, dy @ layer.weight)
    with pytest.raises(ValueError, match="exact_dtype='int4'"):
        layer.exact_dtype = "int4"


def test_merged_and_unmerged_by_peft() -> None:
    model = nn.Sequential(nn.Linear(24, 20))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    loge.apply(model, exact_dtype="int8")
    adapter = model.base_model.model[0]
    layer = adapter.base_layer
    before = layer.weight.detach().clone()

    def assert_follows(delta: Tensor) -> None:
        x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 20)
        (dx,) = torch.autograd.grad(model(x), x, dy)
        assert is_within_twice(dx, dy, layer.weight.detach(), "int8", dy.double() @ delta.double())

    delta = adapter.get_delta_weight("default").detach()
    assert_follows(delta)
    adapter.merge()
    assert not torch.equal(layer.weight, before)
    assert_follows(torch.zeros_like(delta))
    adapter.unmerge()
    assert_follows(delta)


@pytest.mark.parametrize("codes", [slice(None), slice(0, 127)], ids=["with NaN", "without"])
def test_float8_is_read_as_torch_reads_it(codes: slice) -> None:
    """Each of its numbers, of either sign, and NaN: times one, in a product of which torch converts nothing."""
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)[:, codes].t().contiguous()
    one, scale = torch.ones(1, 1).to(torch.float8_e4m3fn), torch.ones(q.numel(), 1)
    found = eight_bit.multiply_quantized(q.reshape(-1, 1), scale, one, torch.ones(1), torch.float32)
    torch.testing.assert_close(found.view_as(q), q.float(), rtol=0, atol=0, equal_nan=True)
