"""Exact layers whose products take less time than the Python around them are PyTorch's own operations."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import loge_kernels as loge
from loge_kernels.conversion import exact_dtype as choosing
from loge_kernels.layers import linear as layer_linear
from loge_kernels.op import linear as op

M, N, K, P = 12, 24, 16, 4
SMALL_ON_CPU = op._SMALL_ON_CPU  # which conftest.py takes from the tests


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every exact layer of this CPU counts as one."""
    for module in (op, layer_linear):
        monkeypatch.setattr(module, "waits_for_host", lambda x, weight, backend: backend == "auto")


def by_function(y: Tensor) -> bool:
    """Whether the package's autograd function has made `y`."""
    seen, pending = set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "LinearBackward":
            return True
        pending += [following for following, _ in node.next_functions]
    return False


@pytest.mark.parametrize(
    ("tokens", "backend", "device", "expected"),
    [
        (1024, "auto", "cuda", True),
        (1025, "auto", "cuda", False),  # M · N · K past 2 ** 34
        (1, "reference", "cuda", False),
        (1, "auto", "cpu", True),
        (2, "auto", "cpu", False),  # past 2 ** 24
        (1, "reference", "cpu", False),
    ],
)
def test_which_sizes(tokens: int, backend: str, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_SMALL_ON_CPU", SMALL_ON_CPU)
    with FakeTensorMode():
        x = torch.empty(1, tokens, 4096, device=device)
        assert op.waits_for_host(x, torch.empty(4096, 4096, device=device), backend) is expected


def test_a_cpu_without_16_bit_instructions(either_processor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has y of one row fast, and what else there is by float32 blocks of ours."""
    monkeypatch.setattr(op, "slow_on_cpu", lambda dtype: either_processor and dtype.itemsize == 2)
    monkeypatch.setattr(op, "_SMALL_ON_CPU", SMALL_ON_CPU)
    weight = torch.empty(N, K, dtype=torch.bfloat16)
    for rows in (1, 2):
        assert op.waits_for_host(weight[:rows], weight, "auto") is not either_processor
    with torch.no_grad():
        assert op.waits_for_host(weight[:1], weight, "auto")
        assert op.waits_for_host(weight[:2], weight, "auto") is not either_processor


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("given", [{"rank": 4}, {"exact_dtype": "int8"}])
def test_a_forward_alone_reads_no_stand_in(given: dict[str, Any], grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = loge.LoGELinear.from_linear(nn.Linear(K, N), lora_rank=P, **{"rank": None} | given)
    assert layer.lora_B is not None
    nn.init.normal_(layer.lora_B)
    taken: list[None] = []
    small = op._small
    monkeypatch.setattr(op, "_small", lambda *a: taken.append(None) or small(*a))
    x = torch.randn(M, K, requires_grad=True)
    expected = x @ (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).T + layer.bias
    for dropout in (0.0, 0.5):
        layer.lora_dropout = dropout
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert bool(taken) is not grad, "without dropout; with it a checkpoint's first forward and second must agree"
        assert dropout or torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert len(taken) == (0 if grad else 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        ({}, False),
        ({"exact_dtype": "float8"}, True),
        ({"rank": 4}, True),
        ({"rank": 4, "exact_fraction": 1.0}, False),
        ({"backend": "reference"}, True),
    ],
)
def test_which_layers(arguments: dict[str, Any], function: bool) -> None:
    x, weight, given = torch.randn(M, K, requires_grad=True), torch.randn(N, K), dict(arguments)
    rank = given.pop("rank", None)
    factors = None if rank is None else loge.factorize(weight, rank)
    assert by_function(loge.linear(x, weight, factors, **given)) is function


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("adapter", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (M, K), (3, 4, K), (0, K)])
def test_the_same_gradients(shape: tuple[int, ...], adapter: torch.dtype | None) -> None:
    """As by the function, which a backend's name asks for; of 16-bit operands to a rounding of them."""
    dtype = adapter or torch.float32
    base = torch.bfloat16 if adapter else torch.float64
    leaves = {
        "x": torch.randn(shape, dtype=base),
        "weight": torch.randn(N, K, dtype=base),
        "bias": torch.randn(N, dtype=base),
        "lora_A": torch.randn(P, K, dtype=dtype if adapter else base),
        "lora_B": torch.randn(N, P, dtype=dtype if adapter else base),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    dy = torch.randn(*shape[:-1], N, dtype=base)
    found = []
    for backend in ("auto", "reference"):
        given = dict(leaves)
        y = loge.linear(given.pop("x"), given.pop("weight"), None, scaling=0.5, backend=backend, **given)
        assert by_function(y) is (backend == "reference")
        found.append((y, *torch.autograd.grad(y, list(leaves.values()), dy)))
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if adapter else {"rtol": 1e-9, "atol": 1e-9}
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **tolerance)


def peft_model(dropout: float, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    model = get_peft_model(net, LoraConfig(r=P, target_modules=["0", "2"], lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_is_as_pefts(autocast: bool) -> None:
    x, found = torch.randn(M, K), []
    for ours in (False, True):
        model = peft_model(0.0).train()
        if ours:
            loge.apply(model, exact_dtype=None)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        assert not by_function(y)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, other in zip(*found, strict=True):
        assert (other - plain).norm() <= (2e-2 if autocast else 1e-5) * plain.norm()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("left", ["factors", "name"])
def test_a_checkpoint_has_one_mask(left: str) -> None:
    """Also where the second forward is another kind of layer than the first: after a block that names a backend, and
    where factors had no values before."""
    layer = loge.LoGELinear.from_linear(nn.Linear(K, N), rank=4, lora_rank=P, lora_dropout=0.5)
    assert layer.factors is not None
    assert layer.lora_B is not None
    nn.init.normal_(layer.lora_B)
    if left == "factors":
        layer.factors.apply_(lambda tensor: tensor.to("meta"))
    else:
        layer.factors = None
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        seen.append(y.detach().clone())
        return y

    with loge.use_backend("reference" if left == "name" else "auto"):
        y = checkpoint(forward, torch.randn(M, K, requires_grad=True), use_reentrant=True)
    y.sum().backward()
    torch.testing.assert_close(*seen)


@pytest.mark.usefixtures("small")
def test_x_alone_is_saved_and_once() -> None:
    """By layers that share it, with adapters in float32 over 16 bits, as PEFT makes them."""
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    weight, saved = torch.randn(N, K, dtype=torch.bfloat16), dict[int, Tensor]()

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    adapters = [(torch.randn(P, K, requires_grad=True), torch.randn(N, P, requires_grad=True)) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        ys = [loge.linear(x, weight, None, lora_A=A, lora_B=B) for A, B in adapters]
    assert not any(by_function(y) for y in ys)
    assert [tensor.dtype for tensor in saved.values() if tensor.shape[0] == M and tensor.shape[1] > P] == [x.dtype]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scaling", [2, Fraction(2), torch.tensor([2.0]), torch.tensor(2.0, requires_grad=True)])
def test_a_scaling_is_any_number(scaling: Any) -> None:
    x, weight, A, B = torch.randn(M, K), torch.randn(N, K), torch.randn(P, K), torch.randn(N, P)
    y = loge.linear(x, weight, None, lora_A=A, lora_B=B, scaling=scaling)
    torch.testing.assert_close(y, x @ weight.T + 2.0 * x @ A.T @ B.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("exact_dtype", ["auto", "int8"])
def test_8_bits_by_name_or_by_auto(exact_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" chose for many tokens is not for a few; what the user named is."""
    monkeypatch.setattr(choosing, "cpu_multiplies_int8", lambda: True)
    monkeypatch.setitem(choosing._CPU_FROM, torch.float32, 1)
    model = peft_model(0.0)
    report = loge.apply(model, exact_dtype=exact_dtype)
    assert {row.dx for row in report.layers} == {"int8"}
    assert by_function(model(torch.randn(M, K))) is (exact_dtype == "int8")
    loge.remove(model)
    assert not hasattr(model.base_model.model[0].base_layer, "chosen_by_auto")


@pytest.mark.usefixtures("small")
def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(M, K), torch.randn(N, K)
    A, B = torch.randn(P, K), torch.randn(1, P)  # which would broadcast
    with pytest.raises(ValueError, match=r"lora_B has shape \(1, 4\); expected \(24, 4\)"):
        loge.linear(x, weight, None, lora_A=A, lora_B=B)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); expected \(24,\)"):
        loge.linear(x, weight, None, bias=torch.randn(1))
    with pytest.raises(ValueError, match=r"dropout=1.5"):
        loge.linear(x, weight, None, lora_A=A, lora_B=torch.randn(N, P), dropout=1.5)
    with torch.no_grad():  # where nothing reads them
        with pytest.raises(ValueError, match="exact_dtype='foo' is unknown"):
            loge.linear(x, weight, None, exact_dtype="foo")
        with pytest.raises(TypeError, match="float64"):
            loge.linear(x.double(), weight.double(), None, exact_dtype="int8")
        with pytest.raises(ValueError, match=r"factors.left has shape \(12, 4\)"):
            loge.linear(x, weight, loge.Factors(torch.randn(M, 4), torch.randn(4, K)))
