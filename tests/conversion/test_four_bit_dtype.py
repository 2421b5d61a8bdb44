"""`exact_dtype="nvfp4"` and `"mxfp4"` in the op, in layers and in models: `numerics.four_bit` is tested by itself."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import assert_close, assert_differ, gradients, llama, logits, lora, modules_of
from surrogate import Case, case, heaviest
from surrogate import run as run_for
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels import LoGELinear
from loge_kernels.conversion import exact_dtype
from loge_kernels.numerics import four_bit
from loge_kernels.numerics.four_bit import FORMATS, FourBitWeight

NAMED = pytest.mark.parametrize("name", list(FORMATS))


def multiply(dy: Tensor, weight: Tensor, name: str) -> Tensor:
    return four_bit.multiply(dy, *FourBitWeight(name).operands(weight).values())


# Where it runs


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_auto_never_takes_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(exact_dtype, "faster_dtype", lambda N, K, name, *_: (asked.append(name), (name, ""))[1])
    weight: Any = SimpleNamespace(
        shape=(4096, 4096), dtype=torch.bfloat16, device=torch.device(device), numel=lambda: 4096 * 4096
    )
    assert exact_dtype.choose(weight, "auto")[0] in (None, "float8", "int8")
    assert asked == (["float8"] if device == "cuda" else [])
    assert exact_dtype.choose(weight, "nvfp4")[0] == "nvfp4"


def test_the_report_says_that_it_is_emulated() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    (row,) = loge.apply(model, exact_dtype="nvfp4").converted
    assert (row.dx, row.path) == ("nvfp4", "plain")
    assert "emulated, slower than float32" in row.reason


def test_where_it_cannot_run_the_product_is_in_x_s_dtype(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    c = case(M=9, N=48, K=32, R=None).to(torch.float32)
    monkeypatch.setattr(import_module("loge_kernels.op.linear"), "why_not", lambda *_: "a test says so")
    need = ("x", "lora_A", "lora_B")
    got = run_for(c, need, exact_dtype="nvfp4")
    assert all(torch.equal(tensor, got[name]) for name, tensor in run_for(c, need).items())
    assert "exact_dtype='nvfp4' cannot run here: a test says so; the exact products run in torch.float32" in caplog.text


# Through the op


def adapter_part(c: Case) -> Tensor:
    return c.scaling * c.dy.double() @ c.lora_B.double() @ c.lora_A.double()


@NAMED
@pytest.mark.parametrize("shape", [{"N": 48}, {"N": 33}, {"N": 48, "P": None}])
def test_exact_layer(shape: dict[str, Any], name: str) -> None:
    c = case(M=9, K=32, R=None, **shape).to(torch.float32)
    need = tuple(n for n in ("x", "bias", "lora_A", "lora_B") if getattr(c, n) is not None)
    torch.manual_seed(2)
    got = run_for(c, need, exact_dtype=name)
    torch.manual_seed(2)
    expected = multiply(c.dy, c.weight, name).double() + (0.0 if c.lora_A is None else adapter_part(c))
    torch.testing.assert_close(got["x"].double(), expected, rtol=1e-5, atol=1e-5)
    plain = run_for(c, need)
    for other in set(got) - {"x"}:
        assert torch.equal(got[other], plain[other]), other


@NAMED
def test_exact_rows_are_in_4_bits_and_the_others_are_not(name: str) -> None:
    c = case(M=9, N=48, K=32).to(torch.float32)
    got = run_for(c, ("x",), exact_fraction=0.3, exact_dtype=name)["x"]
    plain = run_for(c, ("x",), exact_fraction=0.3)["x"]
    heavy = heaviest(c.dy, 3)
    torch.testing.assert_close(got[~heavy], plain[~heavy], rtol=1e-5, atol=1e-6)
    error = (got - plain)[heavy].norm() / plain[heavy].norm()
    assert 0.01 < error < 0.3


def test_float64_is_refused() -> None:
    c = case(N=48, K=32, R=None)
    with pytest.raises(TypeError, match=r"exact_dtype='nvfp4' with x in torch\.float64: 4 bits are for float32"):
        run_for(c, exact_dtype="nvfp4")


def test_the_copy_is_saved_and_the_weight_is_not() -> None:
    c = case(M=9, N=48, K=32, R=None, P=None).to(torch.bfloat16)
    held, x = FourBitWeight("nvfp4"), c.x.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loge.linear(x, c.weight, None, exact_dtype=held)
    kept = {t.data_ptr() for t in saved}
    assert c.weight.data_ptr() not in kept
    copies = (held.tensor, held.scale, held.whole)
    assert {t.data_ptr() for t in copies} <= kept
    assert all(t._is_buffer for t in copies), "what offloads activations would take it along"


@NAMED
def test_a_name_in_a_compiled_graph_is_rounded_in_backward(name: str, without_chance: None, compiler: Any) -> None:
    """The graph would hold the copy from forward on, and inductor cannot make mxfp4's."""
    c = case(M=8, N=48, K=32, R=None, P=None, bias=False).to(torch.float32)
    seen: list[str] = []

    def layer(x: Tensor) -> Tensor:
        return loge.linear(x, c.weight, None, exact_dtype=name)

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node.name for node in graph.graph.nodes if node.op == "call_function")
        return graph

    found = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        x = c.x.detach().requires_grad_()
        found.append(torch.autograd.grad(function(x), x, c.dy)[0])
    assert torch.equal(*found)
    assert not compiler["graph_break"]
    assert len(seen) < 5, seen


# The copy follows its weight


def layer_of(name: str = "nvfp4") -> LoGELinear:
    return LoGELinear.from_linear(nn.Linear(24, 20), rank=None, lora_rank=0, exact_dtype=name)


def follows(layer: LoGELinear) -> None:
    weight = layer.weight.detach()
    x, dy = torch.randn(5, 24, dtype=weight.dtype, requires_grad=True), torch.randn(5, 20, dtype=weight.dtype)
    y = layer(x)
    torch.manual_seed(6)
    (got,) = torch.autograd.grad(y, x, dy)
    torch.manual_seed(6)
    assert torch.equal(got, multiply(dy, weight, layer.exact_dtype))


@NAMED
def test_a_layer_rounds_once_and_follows(name: str) -> None:
    layer = layer_of(name)
    follows(layer)
    first = layer.eight_bit.tensor
    follows(layer)
    assert layer.eight_bit.tensor is first
    values = {"weight": torch.randn(20, 24), "bias": torch.randn(20)}
    changes = [
        lambda: (layer.weight.data.mul_(-2), layer.invalidate()),
        lambda: layer.load_state_dict(values),
        lambda: nn.init.normal_(layer.weight),
        lambda: layer.to(torch.bfloat16),
    ]
    for change in changes:
        change()
        layer.requires_grad_(False)
        follows(layer)
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(way: Any) -> None:
    layer = layer_of()
    follows(layer)
    other = way(layer)
    held = other.eight_bit
    assert (held.tensor, held.scale, held.whole, other.exact_dtype) == (None, None, None, "nvfp4")
    nn.init.normal_(other.weight)
    follows(other)
    follows(layer)


def test_the_attribute() -> None:
    layer = layer_of()
    layer.exact_dtype = "int8"
    assert not isinstance(layer.eight_bit, FourBitWeight)
    layer.exact_dtype = "mxfp4"
    follows(layer)
    with pytest.raises(ValueError, match="exact_dtype='fp4' is unknown; choose one of 'float8', 'int8', 'nvfp4'"):
        layer.exact_dtype = "fp4"
    with pytest.raises(ValueError, match="exact_dtype='int8' is unknown; choose one of 'nvfp4', 'mxfp4', or None"):
        FourBitWeight("int8")
    with pytest.raises(ValueError, match="low_rank_dtype='nvfp4' is unknown; choose one of 'float8', 'int8', or None"):
        loge.factorize(torch.randn(32, 32), 4).low_rank_dtype = "nvfp4"


# Models


def cosine(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(got) == set(expected)
    flat = [torch.cat([g[name].double().flatten() for name in expected]) for g in (got, expected)]
    return torch.cosine_similarity(*flat, dim=0).item()


def applied(name: str | None, model: Any = None, **options: Any) -> Any:
    model = lora() if model is None else model
    loge.apply(model, exact_dtype=name, **options)
    return model.train()


@NAMED
def test_a_peft_model(name: str) -> None:
    model, plain = applied(name), applied(None)
    assert torch.equal(logits(model), logits(plain))
    exact, got = gradients(plain), gradients(model)
    assert 0.93 < cosine(got, exact) < 0.9999
    top = [key for key in exact if "layers.1.mlp.down_proj" in key]
    assert_close({key: got[key] for key in top}, {key: exact[key] for key in top}, 1e-6)
    assert_close(gradients(model), got, 0.0)
    assert_differ(gradients(model, seed=1), got)
    layers = [model.get_submodule(found) for found in modules_of(model, lambda m: isinstance(m, LoGELinear))]
    assert all(layer.exact_dtype == name and layer.eight_bit.tensor is not None for layer in layers)
    loge.remove(model)
    assert_close(gradients(model), gradients(lora()), 1e-6)


def test_deterministic_algorithms() -> None:
    model = applied("nvfp4")
    expected = gradients(model)
    torch.use_deterministic_algorithms(True)
    try:
        assert_close(gradients(model), expected, 0.0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_step_is_the_step_itself(reentrant: bool) -> None:
    model = applied("nvfp4", lora(lora_dropout=0.3))
    expected = gradients(model, seed=4)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert cosine(gradients(model, seed=4), expected) > 0.9
    assert_close(gradients(model, seed=4), gradients(model, seed=4), 0.0)


def test_a_recomputed_step_is_the_step_itself_but_for_chance(without_chance: None) -> None:
    model = applied("mxfp4", lora(lora_dropout=0.3))
    expected = gradients(model, seed=4)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(model, seed=4), expected, 1e-5)


def test_autocast() -> None:
    model, plain = applied("nvfp4"), applied(None)
    with torch.autocast("cpu", torch.bfloat16):
        got, exact = gradients(model), gradients(plain)
    assert 0.93 < cosine(got, exact) < 0.9999
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(layer.eight_bit.tensor, FourBitWeight("nvfp4").current(layer.weight)[0])


@NAMED
@pytest.mark.slow
def test_a_compiled_model_is_one_graph(name: str, without_chance: None, compiler: Any) -> None:
    make = {"target_modules": ["q_proj", "down_proj"]}
    model, other = (applied(name, lora(llama(layers=1), **make)) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    ids = torch.randint(50, (2, 10))
    found = []
    for call, trained in ((compiled, model), (other, other)):
        call(input_ids=ids, labels=ids).loss.backward()
        found.append({key: p.grad for key, p in trained.named_parameters() if p.grad is not None})
    assert_close(*found, 1e-5)
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lora, {"exact_dtype": "fp4"}, ValueError, "exact_dtype='fp4' is unknown; choose one of 'auto', 'float8'"),
        (lora, {"base_dtype": "nvfp4"}, ValueError, "base_dtype='nvfp4' is unknown"),
        (lora, {"base_dtype": "int8", "exact_dtype": "nvfp4"}, ValueError, "leave exact_dtype at 'auto'"),
        (lora, {"rank": 8, "low_rank_dtype": "mxfp4"}, ValueError, "low_rank_dtype='mxfp4' is unknown"),
        (lambda: lora(llama(torch.float64)), {"exact_dtype": "nvfp4"}, TypeError, "4 bits are for float32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=message):
        loge.apply(model, **options)
    assert before == [(name, type(module)) for name, module in model.named_modules()]
