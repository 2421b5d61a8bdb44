"""16 bits, float32 and autocast in one model: what PEFT computes, without its casts, in no more memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import LINEARS, VOCABULARY, assert_close, assert_within_twice_pefts, gradients, llama, lora, randomised
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loge_kernels as loge
from loge_kernels.bench.measure.memory import with_peak_memory
from loge_kernels.numerics import matmul

HALF = [torch.bfloat16, torch.float16]
BLOCKED = matmul._blocked


def autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def built(base: torch.dtype, adapters: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT model with the base's numbers rounded to 16 bits, whatever it is held in."""
    rounded = base if base in HALF else torch.bfloat16
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options})
    model = randomised(get_peft_model(llama(rounded), config)).to(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(rounded).to(adapters)
    return model.train()


def applied(model: Any, full_rank: bool) -> Any:
    """Exactly, or through factors that leave nothing out."""
    loge.apply(model, 1.0, exact_dtype=None)
    for module in model.modules():
        if full_rank and isinstance(module, loge.LoGELinear) and module.converted:
            module.factors = loge.factorize(module.weight, 1.0)
    return model


full_rank = pytest.mark.parametrize("full_rank", [False, True], ids=["exact", "factors of full rank"])


@full_rank
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["float32 adapters", "16-bit adapters"])
def test_a_bfloat16_base_is_as_good_as_pefts(adapters: torch.dtype, full_rank: bool) -> None:
    model, other = applied(built(torch.bfloat16, adapters), full_rank), built(torch.bfloat16, adapters)
    truth = gradients(built(torch.float64, torch.float64))
    assert_within_twice_pefts(gradients(model), gradients(other), truth)


@pytest.mark.usefixtures("either_processor")
@full_rank
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32 base", "16-bit base"])
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_autocast_is_as_good_as_pefts(dtype: torch.dtype, base: torch.dtype, full_rank: bool) -> None:
    """float32 activations come in (the embeddings' or the norms'), weights and adapters are in what `base` says."""
    base = dtype if base == torch.bfloat16 else base
    model, other, truth = applied(built(base), full_rank), built(base), gradients(built(torch.float64, torch.float64))
    if dtype == torch.float16 and base == dtype:  # rounded to float16, not bfloat16
        exact = built(base)
        truth = gradients(exact.double())
    with autocast(dtype):
        got, plain = gradients(model), gradients(other)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    assert_within_twice_pefts(got, plain, truth)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_grad_scaler_steps_as_with_peft(overflows: bool) -> None:
    model, other = built(torch.float32), built(torch.float32)
    loge.apply(model, 1.0)
    found = []
    for each in (model, other):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60 if overflows else 2.0**12)
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        before = {n: p.detach().clone() for n, p in each.named_parameters() if p.requires_grad}
        for step in range(3):
            ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = each(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        moved = {n: p.detach() - before[n] for n, p in each.named_parameters() if p.requires_grad}
        found.append((scaler.get_scale(), moved))
    (scale, moved), (expected_scale, expected) = found
    assert scale == expected_scale
    assert all(t.count_nonzero() == 0 for t in moved.values()) == overflows
    assert_close(moved, expected, 0.0 if overflows else 0.02)


# Casts


class Casts(TorchDispatchMode):
    """Counts the casts of tensors with as many rows as there are tokens. Those inside a product that a CPU without
    16-bit instructions takes in float32, block by block, are the product's."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.count, self.in_product = tokens, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype and not self.in_product:
            self.count += out.numel() >= self.tokens * 16
        return out

    def blocked(self, *arguments: Any, **named: Any) -> Tensor:
        self.in_product = True
        try:
            return BLOCKED(*arguments, **named)
        finally:
            self.in_product = False


def tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


def step(model: nn.Module, ids: Tensor, dtype: torch.dtype | None = None) -> None:
    with autocast(dtype):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def casts(model: nn.Module, dtype: torch.dtype | None) -> int:
    ids = tokens(96)
    counted = Casts(ids.numel())
    with pytest.MonkeyPatch.context() as patch, counted:
        patch.setattr(matmul, "_blocked", counted.blocked)
        step(model, ids, dtype)
    return counted.count


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("rank", [1.0, 0.25], ids=["exact", "low rank"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_float32_adapters_over_a_16_bit_base_cast_no_activation(dtype: torch.dtype | None, rank: float) -> None:
    """The casts that are left are those of the model without adapters, trained in full: its norms' and its loss's."""
    model, other, bare = built(torch.bfloat16), built(torch.bfloat16), llama(torch.bfloat16).train()
    loge.apply(model, rank)
    least, ours, theirs = (casts(each, dtype) for each in (bare, model, other))
    assert 0 < ours <= least
    assert theirs > 3 * least, "PEFT casts what every adapter reads and writes"


@pytest.mark.usefixtures("either_processor")
def test_autocast_from_float32_casts_less_than_peft() -> None:
    model, other = built(torch.float32), built(torch.float32)
    loge.apply(model, 0.25)
    assert casts(model, torch.bfloat16) < 0.7 * casts(other, torch.bfloat16)


# Memory


# dtype, autocast's, checkpointed, dropout, without 16-bit instructions
STACKS: dict[str, tuple[torch.dtype, torch.dtype | None, bool, float, bool]] = {
    "float32": (torch.float32, None, False, 0.0, False),
    "float32, dropout": (torch.float32, None, False, 0.1, False),
    "bfloat16": (torch.bfloat16, None, False, 0.0, False),
    "bfloat16, dropout": (torch.bfloat16, None, False, 0.1, False),
    "bfloat16 in blocks, dropout": (torch.bfloat16, None, False, 0.1, True),
    "autocast": (torch.float32, torch.bfloat16, False, 0.0, False),
    "autocast in blocks": (torch.float32, torch.bfloat16, False, 0.0, True),
    "checkpointed": (torch.float32, None, True, 0.0, False),
    "checkpointed, bfloat16": (torch.bfloat16, None, True, 0.1, False),
}


def peak(model: nn.Module, checkpointed: bool, dtype: torch.dtype | None) -> int:
    """Bytes that a step, not the first, holds at most beyond the model and its factors."""
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    ids = tokens(128)
    step(model, ids, dtype)
    model.zero_grad()
    return with_peak_memory(lambda: step(model, ids, dtype), torch.device("cpu"))[1]


# Of two that take the same way through the op, one is a slow test.
AGAIN = ("float32, dropout", "bfloat16 in blocks, dropout", "autocast in blocks", "checkpointed, bfloat16")


@pytest.mark.parametrize(
    "stack", [pytest.param(stack, marks=[pytest.mark.slow] if stack in AGAIN else []) for stack in STACKS]
)
def test_peak_memory_is_at_most_pefts(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors and 8-bit copies were there before."""
    # On a CPU some products work through blocks of a fixed size, which is larger than these whole models.
    monkeypatch.setattr("loge_kernels.numerics.eight_bit._SLAB", 1 << 12)
    for name in ("_RESIDENT", "_STREAMED"):
        monkeypatch.setattr(matmul, name, 1 << 12)
    base, dtype, checkpointed, dropout, slow = STACKS[stack]
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: slow and dtype.itemsize == 2)
    most = peak(lora(llama(base), lora_dropout=dropout).train(), checkpointed, dtype)
    policies: tuple[dict[str, Any], ...] = ({}, {"exact_dtype": "int8"}, {"rank": 0.25})
    for policy in policies:
        model = lora(llama(base), lora_dropout=dropout).train()
        loge.apply(model, **policy)
        assert peak(model, checkpointed, dtype) <= most, policy
