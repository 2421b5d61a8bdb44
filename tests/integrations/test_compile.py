"""torch.compile: whole graphs, forward and backward, the same ones for every number of rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import loretta_models
import pytest
import torch
from models import VOCABULARY, assert_close, llama, lora
from peft import get_peft_model
from switching import config as switch_config
from switching import optimizer_of as switching_optimizer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import loge_kernels as loge
from loge_kernels.layers.exact_every import ExactEvery

SIZES = [(2, 10), (3, 12), (5, 7)]  # sequences, tokens
pytestmark = pytest.mark.usefixtures("compiler")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> list[str]:
    return list(counters["graph_break"])


def stance(fixed: bool) -> Any:
    """Where `fixed`, any further compilation raises."""
    return torch.compiler.set_stance("fail_on_recompile") if fixed else nullcontext()


def whole(function: Any, **options: Any) -> Any:
    return torch.compile(function, **{"backend": "aot_eager", "fullgraph": True, "dynamic": True, **options})


# The op


INDUCTOR = [pytest.param("inductor", dropout, marks=pytest.mark.slow) for dropout in (0.0, 0.5)]


@pytest.mark.parametrize(("backend", "dropout"), [("aot_eager", 0.5), *INDUCTOR])
def test_a_dropout_mask_is_one_mask_in_a_compiled_step(backend: str, dropout: float) -> None:
    """By the mask that y shows, dA is its gradient: forward and backward drop the same."""
    # With W = 0 and A = B = 1 the output is the dropped x, and dA its column sums in every row, for dY of ones.
    K = 16
    factors = loge.factorize(torch.randn(K, K), 4)
    weight = torch.zeros(K, K)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return loge.linear(x, weight, factors, lora_A=A, lora_B=B, dropout=dropout)

    compiled = whole(layer, backend=backend)
    for rows in (40, 56):
        A, B = torch.eye(K, requires_grad=True), torch.eye(K, requires_grad=True)
        x = (torch.rand(rows, K) + 0.5).requires_grad_()
        y = compiled(x, A, B)
        y.sum().backward()
        dropped = (y == 0).float().mean().item()
        assert abs(dropped - dropout) < 0.1
        torch.testing.assert_close(A.grad, y.detach().sum(0).expand(K, K))


# PEFT models


def batch(size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def gradients(call: Any, model: nn.Module, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Of every trained parameter of `model`, where `call` is the model or its compiled form; `.grad` keeps them."""
    model.zero_grad()
    torch.manual_seed(seed)
    call(**batch(size, seed)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted(layers: int = 1, dropout: float = 0.3) -> Any:
    return lora(llama(layers=layers), target_modules=["q_proj", "down_proj"], lora_dropout=dropout).train()


def applied(model: Any, rank: float | None = 0.25, exact_dtype: str | None = None, **options: Any) -> Any:
    loge.apply(model, rank, exact_dtype=exact_dtype, **options)
    return model.train()


def tensor_trains(config: Any) -> Any:
    return loretta_models.moved(get_peft_model(llama(layers=1), config))


def switched() -> Any:
    torch.manual_seed(9)
    return get_peft_model(llama(layers=1), switch_config(interval=1, freeze_steps=0))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


MODELS: dict[str, Callable[[], Any]] = {
    "low rank": lambda: applied(adapted()),
    "exact": lambda: applied(adapted(), None),
    "exact, in int8": lambda: applied(adapted(), None, "int8"),
    "exact layers": lambda: applied(adapted(2), exact_layers=0.5),
    "frozen below": lambda: applied(adapted(2), freeze_below=1),
    "loretta rep": lambda: applied(tensor_trains(loge.LorettaRepConfig(dropout=0.3))),
    "loretta adp": lambda: applied(tensor_trains(loge.LorettaAdpConfig())),
    "switchlora": lambda: applied(switched(), None),
}


def test_a_model_is_one_graph_for_every_batch() -> None:
    model, other = MODELS["low rank"](), MODELS["low rank"]()
    compiled = whole(model)
    for count, size in enumerate(SIZES):
        with stance(count > 0):
            got = gradients(compiled, model, size, count)
        assert_close(got, gradients(other, other, size, count), 1e-5)
    assert graphs() == 1
    assert not breaks()


def assert_trains_alike(
    compiled: Any, model: Any, other: Any, optimizers: list[Any], steps: int, compiling_steps: int
) -> None:
    """The compiled model's gradients are those of `other`, and nothing is compiled after the first steps."""
    for count in range(steps):
        with stance(count >= compiling_steps):
            got = gradients(compiled, model, SIZES[0], count)
        assert_close(got, gradients(other, other, SIZES[0], count), 1e-5)
        for optimizer in optimizers:
            optimizer.step()


# Methods of their own reach the same op by the same way as the policies.
OTHERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name.startswith(("loretta", "switchlora")) else [])
    for name in list(MODELS)[1:]
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_policies_and_methods_are_one_graph(name: str) -> None:
    model, other = MODELS[name](), MODELS[name]()
    optimizers = [(switching_optimizer if name == "switchlora" else sgd)(each) for each in (model, other)]
    assert_trains_alike(whole(model, dynamic=False), model, other, optimizers, 3, 1)
    assert graphs() == 1
    assert not breaks()


SLOW = [pytest.param(None, backend, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor")]


@pytest.mark.parametrize(("exact_dtype", "backend"), [("int8", "aot_eager"), *SLOW])
def test_one_exact_forward_in_two_is_two_graphs(exact_dtype: str | None, backend: str) -> None:
    dropout = 0.0 if backend == "inductor" else 0.3  # inductor draws other numbers
    model, other = (applied(adapted(1, dropout), exact_every=2, exact_dtype=exact_dtype) for _ in range(2))
    compiled = whole(model, dynamic=False, backend=backend)
    assert_trains_alike(compiled, model, other, [sgd(model), sgd(other)], 6, 2)
    assert graphs() == 2
    assert not breaks()


def test_the_operator_that_counts() -> None:
    counter = ExactEvery(2)
    torch.library.opcheck(torch.ops.loge_kernels.count_forward.default, (counter._number,))
    counter.exact, counter._begun = True, 0
    for exact in (False, True):
        torch.ops.loge_kernels.count_forward(counter._number)
        assert counter.exact == exact
    torch.ops.loge_kernels.count_forward(ExactEvery(2)._number)  # of one that is gone
    assert counter.exact


# CUDA graphs: what can be seen without a GPU


class NoHostReads(TorchDispatchMode):
    """Raises where a value, or a shape that depends on one, is read on the host, which no CUDA graph can hold."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "allclose")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.READS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_check_finds_a_host_read() -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="_local_scalar_dense waits"):
        torch.ones(1).item()


POLICIES: list[dict[str, Any]] = [
    {},
    {"exact_fraction": 0.3},
    {"residual": 0.2},
    {"exact_every": 2},
    {"exact_every": 2, "residual": 0.2},
    {"exact_every": 2, "exact_dtype": "int8"},
]


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_a_step_reads_nothing_on_the_host(options: dict[str, Any]) -> None:
    """Forward, backward and optimizer step."""
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(3))).requires_grad_(False)
    model[0].weight.requires_grad_()
    model.append(loge.LoGELinear.from_linear(nn.Linear(48, 48), rank=16, lora_rank=4, lora_dropout=0.2))
    loge.apply(model, 16, targets=["1", "2"], **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(6, 48)
    model(x).sum().backward()  # 8-bit copies are made, and checked, in the first step
    optimizer.step()
    for _ in range(3):
        with NoHostReads():
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
