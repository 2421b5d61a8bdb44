"""`apply(base_dtype=)`: a model whose frozen weights are 8 bits alone, against the rule written out."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, assert_close, gradients, llama, logits, lora
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import loge_kernels as loge
from loge_kernels.layers.eight_bit_base import EightBitLinear
from loge_kernels.op import shared_input

NAMED = pytest.mark.parametrize("name", ["float8", "int8"])
# Where both go the same way, and one takes long.
INT8_FIRST = pytest.mark.parametrize("name", [pytest.param("float8", marks=pytest.mark.slow), "int8"])


def rounded(matrix: Tensor, name: str) -> Tensor:
    """Each row in 8 bits on its own scale."""
    scale = (matrix.abs().amax(1, keepdim=True) * (1 / (448.0 if name == "float8" else 127.0))).clamp_min(1e-37)
    q = matrix / scale
    return (q.to(torch.float8_e4m3fn).float() if name == "float8" else q.round()) * scale


def turned(matrix: Tensor, name: str) -> Tensor:
    """In int8 times Hadamard's matrix, in blocks of 64 columns, or 32 where 64 does not divide them."""
    if name == "float8":
        return matrix
    block = 64 if matrix.shape[1] % 64 == 0 else 32
    H = torch.ones(1, 1)
    while len(H) < block:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (matrix.view(matrix.shape[0], -1, block) @ (H / block**0.5)).flatten(1)


class Rule(torch.autograd.Function):
    """y = x Wᵀ and dX = dY W with everything rounded, by dequantised operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str) -> Tensor:
        W = rounded(turned(weight.float(), name), name)
        ctx.weight, ctx.name = W, name
        flat = rounded(turned(x.reshape(-1, x.shape[-1]).float(), name), name)
        return (flat @ W.t()).view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        W, name = ctx.weight, ctx.name
        scale = (W.abs().amax(1) * (1 / (448.0 if name == "float8" else 127.0))).clamp_min(1e-37)
        flat = rounded(dy.reshape(-1, dy.shape[-1]).float() * scale, name)
        return turned(flat @ (W / scale[:, None]), name).view(*dy.shape[:-1], -1).to(dy.dtype), None, None


def rule(x: Tensor, weight: Tensor, name: str) -> Tensor:
    x = x.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else x
    with torch.autocast("cpu", enabled=False):
        return Rule.apply(x, weight, name)


def by_rule(model: Any, name: str) -> Any:
    """A PEFT model whose frozen linear layers follow the rule."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            base.forward = lambda x, w=base.weight: rule(x, w, name)  # type: ignore[method-assign]
    return model


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key].float() - value.float()).norm() <= tolerance * value.float().norm(), key


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_the_rule(dtype: torch.dtype, name: str) -> None:
    model, plain = lora(llama(dtype)), by_rule(lora(llama(dtype)), name)
    report = loge.apply(model, base_dtype=name)
    assert {layer.dx for layer in report.converted} == {name}
    assert f"{name} base" in report.converted[0].reason
    # One step of rounding here and there: in another order of a sum, and in bfloat16 of what is between the layers.
    tolerance = 5e-3 if dtype == torch.float32 else 0.08
    assert (logits(model) - logits(plain)).norm() < tolerance * logits(plain).norm()
    close(gradients(model), gradients(plain), tolerance if dtype == torch.float32 else 0.15)


@NAMED
def test_under_autocast(name: str) -> None:
    model, plain = lora(llama()), by_rule(lora(llama()), name)
    loge.apply(model, base_dtype=name)
    with torch.autocast("cpu", torch.bfloat16):
        close(gradients(model), gradients(plain), 0.25)  # adapters in float32 are rounded at other places


@NAMED
def test_the_weight_is_half_as_large_and_the_old_one_gone(name: str) -> None:
    model = lora(llama(torch.bfloat16, layers=1))
    linears = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    before = sum(linear.weight.nbytes for linear in linears)
    old = [weakref.ref(linear.weight) for linear in linears]
    loge.apply(model, base_dtype=name)
    gc.collect()
    assert not any(reference() is not None for reference in old)
    after = sum(linear.weight.nbytes + linear.weight_scale.nbytes for linear in linears)
    assert after <= (0.5 + 2 / 64) * before  # K = 64: of a scale's four bytes
    assert all(isinstance(linear, EightBitLinear) for linear in linears)


@NAMED
def test_an_input_that_layers_share_is_quantised_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama(layers=1))
    loge.apply(model, base_dtype=name)
    model.enable_input_require_grads()  # autograd has made what q, k and v share
    seen: list[int] = []
    quantize = shared_input.quantize_input
    monkeypatch.setattr(shared_input, "quantize_input", lambda o: seen.append(0) or quantize(o))
    shared = gradients(model)
    assert len(seen) == 4  # of q, k, v; o; gate, up; down
    monkeypatch.setattr(Tensor, "_version", property(lambda tensor: object()))  # never the same
    assert_close(gradients(model), shared, 0.0)
    assert len(seen) == 4 + 7
    gc.collect()
    assert shared_input._last is None or shared_input._last[1]() is not None


def test_an_input_that_has_changed_is_quantised_anew() -> None:
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    model = nn.Sequential(layer)
    loge.apply(model, base_dtype="int8", targets=["0"])
    leaf = torch.randn(5, 64, requires_grad=True)
    for x in (torch.randn(5, 64), leaf, leaf * 1.0):
        with torch.no_grad():
            first = model(x)
            assert torch.equal(model(x), first)
            x.mul_(2.0)
            torch.testing.assert_close(model(x), 2 * first)
        if x.grad_fn is None:
            x.data.mul_(2.0)  # which torch does not count
            torch.testing.assert_close(model(x).detach(), 4 * first)
    with torch.inference_mode():
        y = torch.ones(5, 64)
        first = model(y)
        y.mul_(3.0)
        torch.testing.assert_close(model(y), 3 * first)


@NAMED
def test_its_state_dict_loads_without_the_16_bit_model(name: str, tmp_path: Path) -> None:
    model = llama(torch.bfloat16).requires_grad_(False)
    loge.apply(model, base_dtype=name)
    state = model.state_dict()
    path = "model.layers.0.self_attn.q_proj"
    assert state[f"{path}.weight"].dtype == (torch.int8 if name == "int8" else torch.float8_e4m3fn)
    assert (state[f"{path}.weight_scale"].shape, state[f"{path}.weight_scale"].dtype) == ((64, 1), torch.float32)
    save_file(state, tmp_path / "model.safetensors")
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = LlamaForCausalLM(model.config).to(torch.bfloat16).requires_grad_(False)
    loge.apply(empty, base_dtype=name)
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(logits(empty), logits(model))
    # Adapters come and go as ever.
    trained = lora(empty)
    trained.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trained))


@NAMED
def test_a_16_bit_state_dict_is_rounded_as_it_is_loaded(name: str) -> None:
    model, other = (llama(torch.bfloat16).requires_grad_(False) for _ in range(2))
    for parameter in other.parameters():
        parameter.mul_(1.1)
    loge.apply(model, base_dtype=name)
    model.load_state_dict(other.state_dict())
    loge.apply(other, base_dtype=name)
    assert torch.equal(logits(model), logits(other))
    wrong = llama(torch.bfloat16).requires_grad_(False)
    loge.apply(wrong, base_dtype="int8" if name == "float8" else "float8")
    with pytest.raises(RuntimeError, match=r"q_proj.weight is torch\.\w+, and the layer was applied with base_dtype="):
        wrong.load_state_dict(model.state_dict())


@NAMED
def test_remove_takes_the_weights_back_or_says_that_it_cannot(name: str) -> None:
    model = lora()
    whole, before = {key: t.clone() for key, t in model.state_dict().items()}, logits(model)
    loge.apply(model, base_dtype=name)
    inside = logits(model)
    with pytest.raises(ValueError, match="load the model anew, or give remove"):
        loge.remove(model)
    with pytest.raises(ValueError, match=r"weights has nothing for '.*q_proj\.weight'"):
        loge.remove(model, weights={})
    assert torch.equal(logits(model), inside), "unchanged"
    loge.remove(model, weights=whole)
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == whole.keys()
    loge.apply(model, base_dtype=name)
    loge.remove(model, weights=llama().state_dict())  # as it was before PEFT wrapped it
    assert torch.equal(logits(model), before)


@NAMED
@pytest.mark.parametrize("safe", [False, True])
def test_merging_rounds_and_says_so(safe: bool, name: str) -> None:
    model = lora()
    loge.apply(model, base_dtype=name)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    expected = layer.base_layer.dense_weight() + layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="merged into a weight in"):
        model.merge_adapter(safe_merge=safe)
    merged = layer.base_layer.dense_weight()
    assert (merged - expected).norm() < 0.04 * expected.norm()
    with pytest.warns(UserWarning, match="merged into a weight in"):
        model.unmerge_adapter()
    assert layer.base_layer.weight.dtype in (torch.uint8, torch.int8)
    assert not model.base_model.model.model.layers[0].mlp.up_proj.merged


def test_pissa_starts_from_what_the_weight_stands_for() -> None:
    """An adapter that is added later and takes its start out of the weight."""
    model = lora()
    loge.apply(model, base_dtype="int8")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    before = layer.base_layer.dense_weight()
    with pytest.warns(UserWarning, match="merged into a weight in int8"):
        model.add_adapter("second", LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="pissa"))
    whole = layer.base_layer.dense_weight() + layer.get_delta_weight("second")
    assert (whole - before).norm() < 0.02 * before.norm()
    with pytest.raises(ValueError, match="DoRA reads a 16-bit weight"):
        model.add_adapter("third", LoraConfig(r=4, target_modules=["up_proj"], use_dora=True))


def tied(model: Any) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight = model.base_model.model.model.layers[
        0
    ].self_attn.o_proj.base_layer.weight


def thawed(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "unknown": (lora, {"base_dtype": "int4"}, ValueError, "base_dtype='int4' is unknown; choose one of"),
    "exact": (lora, {"base_dtype": "int8", "exact_dtype": "int8"}, ValueError, "leave exact_dtype at 'auto'"),
    "none": (lora, {"base_dtype": "int8", "exact_dtype": None}, ValueError, "leave exact_dtype at 'auto'"),
    "float64": (lambda: lora(llama(torch.float64)), {"base_dtype": "int8"}, TypeError, "8 bits are for float32"),
    "dora": (lambda: lora(use_dora=True), {"base_dtype": "int8"}, ValueError, "is read by DoRA"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_refused_before_anything_is_changed(case: str) -> None:
    make, arguments, error, message = REFUSED[case]
    model = make()
    before = {key: (type(module), id(getattr(module, "weight", None))) for key, module in model.named_modules()}
    with pytest.raises(error, match=message):
        loge.apply(model, **arguments)
    assert before == {key: (type(m), id(getattr(m, "weight", None))) for key, m in model.named_modules()}


@pytest.mark.parametrize(
    ("change", "message"), [(tied, r"is tied to that of '.*o_proj\.base_layer'"), (thawed, "trains, and rounding")]
)
def test_weights_that_are_shared_or_train(change: Any, message: str) -> None:
    model = lora()
    change(model)
    with pytest.raises(ValueError, match=message):
        loge.apply(model, base_dtype="float8", targets=r".*_proj")
    assert not any(isinstance(module, EightBitLinear) for module in model.modules())


def test_a_head_that_is_tied_to_the_embedding() -> None:
    model = llama(tied=True).requires_grad_(False)
    assert "lm_head" not in [layer.name for layer in loge.apply(model, base_dtype="int8").converted]
    model = llama(tied=True).requires_grad_(False)
    with pytest.raises(ValueError, match=r"'lm_head' is tied to that of 'model\.embed_tokens'"):
        loge.apply(model, base_dtype="int8", targets=["lm_head"])


def test_a_base_that_is_quantised_already() -> None:
    from quantized_layers import quantised

    model = quantised("nf4")
    with pytest.raises(ValueError, match="is quantised already"):
        loge.apply(model, base_dtype="int8")


@NAMED
@pytest.mark.parametrize("N", [1, 17, 130])
@pytest.mark.parametrize("K", [1, 24, 130])
def test_any_shape(K: int, N: int, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    x = torch.randn(3, 2, K, requires_grad=True)
    exact = model(x)
    dx = torch.autograd.grad(exact.sum(), x)[0]
    loge.apply(model, base_dtype=name, targets=["0"])
    y = model(x)
    assert (y - exact).norm() < 0.06 * exact.norm() + 0.05
    assert (torch.autograd.grad(y.sum(), x)[0] - dx).norm() < 0.06 * dx.norm() + 1e-6
    assert model(x[:0]).shape == (0, 2, N)


POLICIES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 8},
    "residual": {"rank": 8, "residual": 0.1},
    "rows": {"rank": 8, "exact_fraction": 0.3},
    "layers": {"rank": 8, "exact_layers": 0.5},
    "every": {"rank": 8, "exact_every": 2},
}


@NAMED
@pytest.mark.parametrize("policy", list(POLICIES))
def test_beside_a_low_rank_backward(policy: str, name: str) -> None:
    """The forward is that of the 8-bit base, and dX that of the same policy over the weights it stands for."""
    torch.manual_seed(0)
    stands_for, model = lora(), lora()
    loge.apply(model, base_dtype=name, **POLICIES[policy])
    assert {layer.dx for layer in loge.apply(lora(), base_dtype=name, **POLICIES[policy]).converted} & {"rank 8"}
    loge.apply(stands_for, exact_dtype=None, **POLICIES[policy])
    for _ in range(2):  # an exact forward, then another
        got, near = gradients(model), gradients(stands_for)
        for key, value in near.items():
            assert F.cosine_similarity(got[key].flatten(), value.flatten(), dim=0) > 0.8, key


@NAMED
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool, name: str) -> None:
    model = lora()
    loge.apply(model, base_dtype=name)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_close(gradients(model), expected)


@INT8_FIRST
def test_compiled(name: str) -> None:
    model = lora()
    loge.apply(model, base_dtype=name)
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(compiled), {f"_orig_mod.{key}": value for key, value in expected.items()}, 1e-4)


@NAMED
def test_copies_pickles_and_casts(name: str) -> None:
    model = lora()
    loge.apply(model, base_dtype=name)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    bits, scale = layer.weight.clone(), layer.weight_scale.clone()
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        model.to(cast)
        assert torch.equal(layer.weight, bits)
        assert torch.equal(layer.weight_scale, scale)
        assert layer.weight_scale.dtype == torch.float32
    assert name in repr(layer)


def test_exported_it_is_what_the_weight_stands_for() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    loge.apply(model, base_dtype="float8", targets=["0"])
    x = torch.randn(4, 64)
    exported = torch.export.export(model, (x,)).module()
    layer: Any = model[0]
    torch.testing.assert_close(exported(x), F.linear(x, layer.dense_weight(), layer.bias))


@INT8_FIRST
def test_it_learns_what_exact_lora_learns(name: str) -> None:
    def train(**arguments: Any) -> float:
        model = lora()
        if arguments:
            loge.apply(model, **arguments)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(40):
            ids = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(step % 4))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    exact = train()
    assert exact < 3.0
    assert train(base_dtype=name) == pytest.approx(exact, rel=0.05)


def test_adapters_that_come_later_train_beside_it() -> None:
    model = llama().requires_grad_(False)
    loge.apply(model, base_dtype="int8")
    late = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert {p.dtype for p in late.parameters() if p.requires_grad} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(late).values())
    with pytest.raises(RuntimeError, match="can't be cast"):
        late.merge_adapter()
