"""Hooks of the user's on an applied model: they see the calls, the tensors and the gradients that PEFT's own has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from models import assert_close, logits, lora
from situations import REENTRANT, applied, assert_same_gradients, derived, loss_of, pair, trained
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import loge_kernels as loge

Seen = list[tuple[str, str, Tensor]]


def assert_same_calls(models: tuple[Any, Any], watch: Callable[[Any], tuple[Seen, ExitStack]], seed: int = 0) -> None:
    """Both models' hooks see the same in the same order, and the gradients are the same."""
    found = []
    for one in models:
        seen, handles = watch(one)
        with handles:
            loss_of(one, seed).backward()
        found.append(seen)
    expected, got = found
    assert expected
    assert [call[:2] for call in got] == [call[:2] for call in expected]
    for (name, kind, tensor), (_, _, other) in zip(got, expected, strict=True):
        assert_close({f"{name} {kind}": tensor}, {f"{name} {kind}": other}, 1e-5)
    assert_same_gradients(*models)
    for one in models:
        one.zero_grad()


def hooked(model: Any, part: Callable[[str], bool], before: bool = False) -> tuple[Seen, ExitStack]:
    """Forward and backward hooks on the modules whose name `part` picks."""
    seen: Seen = []
    stack = ExitStack()

    def keep(name: str, kind: str, tensors: Any) -> None:
        first = tensors[0] if isinstance(tensors, tuple) else tensors
        if first is not None:
            seen.append((name, kind, first.detach().clone()))

    for name, module in model.named_modules():
        if not part(name):
            continue

        def forward(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            keep(name, "input", args)
            keep(name, "output", output)

        def backward(module: nn.Module, grad_input: Any, grad_output: Any, name: str = name) -> None:
            keep(name, "grad input", grad_input)
            keep(name, "grad output", grad_output)

        def before_backward(module: nn.Module, grad_output: Any, name: str = name) -> None:
            keep(name, "before", grad_output)

        for handle in (
            module.register_forward_hook(forward),
            module.register_full_backward_hook(backward),
            module.register_full_backward_pre_hook(before_backward),
        ):
            stack.callback(handle.remove)
    return seen, stack


PARTS: dict[str, Callable[[str], bool]] = {
    "adapters": lambda name: name.endswith((".lora_A.default", ".lora_B.default")),
    "one adapter": lambda name: name.endswith("layers.0.mlp.up_proj.lora_B.default"),
    "base layers": lambda name: name.endswith("base_layer"),
    "layers": lambda name: name.endswith("_proj"),
    "blocks": lambda name: name.endswith(("layers.0", "layers.1", "mlp")),
    "dropouts": lambda name: name.endswith("lora_dropout.default"),
}


@REENTRANT
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_hooks_of_modules(part: Callable[[str], bool], reentrant: bool | None) -> None:
    models = pair(reentrant=reentrant)
    assert_same_calls(models, lambda model: hooked(model, part))
    assert_close(derived(models[1], 3), derived(models[0], 3), 1e-5)  # without them


def test_hooks_from_before_apply() -> None:
    plain, model = pair()
    loge.remove(model)
    watched = {id(one): hooked(one, PARTS["adapters"]) for one in (plain, model)}
    applied(model)
    assert_same_calls((plain, model), lambda one: watched[id(one)])


# Hooks of tensors


def retaining(model: Any, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, int], ExitStack]:
    """Outputs of modules that keep their gradient, and how often the hook of each has fired."""
    kept: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    stack = ExitStack()
    for name, module in model.named_modules():
        if not name.endswith(names):
            continue

        def forward(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            y = output if isinstance(output, Tensor) else output[0]
            if not y.requires_grad:
                return

            def count(grad: Tensor) -> None:
                calls[name] = calls.get(name, 0) + 1

            y.register_hook(count)
            y.retain_grad()
            kept[name] = y

        stack.callback(module.register_forward_hook(forward).remove)
    return kept, calls, stack


@REENTRANT
def test_retained_gradients_and_tensor_hooks_fire_once(reentrant: bool | None) -> None:
    models = pair(reentrant=reentrant)
    found: list[dict[str, Tensor]] = []
    for one in models:
        kept, calls, stack = retaining(one, ("v_proj", "down_proj", "layers.1"))
        with stack:
            loss_of(one).backward()
        assert len(kept) == 5
        assert calls == dict.fromkeys(kept, 1)
        found.append({name: y.grad for name, y in kept.items() if y.grad is not None})
    # Of a block that ran again without being reentrant, not all of the outputs kept last are in the graph.
    assert len(found[0]) == (3 if reentrant is False else 5)
    assert_close(found[1], found[0], 1e-5)


@REENTRANT
def test_hooks_of_parameters_fire_once(reentrant: bool | None) -> None:
    models = pair(reentrant=reentrant)
    for one in models:
        calls: list[tuple[str, str]] = []
        stack = ExitStack()
        for name, p in trained(one).items():

            def changed(grad: Tensor, name: str = name, calls: list[tuple[str, str]] = calls) -> Tensor:
                calls.append((name, "hook"))
                return 2 * grad

            def after(p: Tensor, name: str = name, calls: list[tuple[str, str]] = calls) -> None:
                calls.append((name, "after"))

            stack.callback(p.register_hook(changed).remove)
            stack.callback(p.register_post_accumulate_grad_hook(after).remove)
        with stack:
            for seed in range(2):
                loss_of(one, seed).backward()
        assert sorted(calls) == sorted(2 * [(name, kind) for name in trained(one) for kind in ("hook", "after")])
    assert_same_gradients(*models)


def test_gradients_that_a_hook_replaces() -> None:
    """Clipped at a layer's output, and zeroed in a backward hook."""
    models = pair()
    for one in models:
        layer = one.get_submodule("base_model.model.model.layers.1.mlp.gate_proj")
        block = one.get_submodule("base_model.model.model.layers.1")
        with ExitStack() as stack:
            clipped = lambda module, args, output: output.register_hook(lambda g: g.clamp(-1e-4, 1e-4)) and None  # noqa: E731
            stack.callback(layer.register_forward_hook(clipped).remove)
            halved = lambda module, grad_input, grad_output: (grad_input[0] / 2, *grad_input[1:])  # noqa: E731
            stack.callback(block.register_full_backward_hook(halved).remove)
            loss_of(one).backward()
    assert_same_gradients(*models)


def test_a_hook_on_all_modules_sees_those_inside_a_fused_layer() -> None:
    model = lora()
    loge.apply(model)
    ends = ("lora_A.default", "lora_B.default", "base_layer")
    inside = {name for name, _ in model.named_modules() if name.endswith(ends)}
    names = {module: name for name, module in model.named_modules()}
    seen: set[str] = set()
    handle = register_module_forward_hook(lambda module, args, out: seen.add(names[module]))
    try:
        logits(model)
    finally:
        handle.remove()
    assert inside <= seen
