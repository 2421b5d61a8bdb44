"""`plan_freezing`: bases against torch's pinv, the trace against hidden states by hand, gains, boundary, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrating
import pytest
import torch
from models import llama, lora, tokens
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.freezing import semantics
from loge_kernels.freezing.gains import fitted_power_law, marginal, power_law
from loge_kernels.freezing.semantics import SemanticBases


def batches() -> list[dict[str, Tensor]]:
    found = [batch["input_ids"] for batch in calibrating.batches()]
    return [{"input_ids": ids, "labels": ids.masked_fill(ids < 10, -100)} for ids in found]


# Semantics


@pytest.mark.parametrize(("labels", "width", "chunk"), [(50, 16, 7), (50, 16, 8192), (5, 16, 2), (40, 16, 16)])
def test_bases_are_the_rows_of_the_pseudo_inverse(
    labels: int, width: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantics, "_CHUNK", chunk)
    weight = torch.randn(labels, width) * torch.logspace(0, -2, width)  # condition number 100 and more
    bases = SemanticBases(weight)
    expected = torch.linalg.pinv(weight.double()).t()
    torch.testing.assert_close(bases.vectors(torch.arange(labels)).double(), expected, rtol=1e-3, atol=1e-3)
    hidden, wanted = torch.randn(9, width), torch.randint(labels, (9,))
    cosines = torch.nn.functional.cosine_similarity(hidden.double()[:, None], expected[None], dim=-1)
    reference = torch.nn.functional.cross_entropy(cosines / 0.1, wanted, reduction="none")
    torch.testing.assert_close(bases.cross_entropy(hidden, wanted, 0.1).double(), reference, rtol=1e-3, atol=1e-3)
    by_cosine = 1 - cosines[torch.arange(9), wanted]
    torch.testing.assert_close(bases.cosine(hidden, wanted).double(), by_cosine, rtol=1e-3, atol=1e-3)


def test_a_head_of_deficient_rank() -> None:
    weight = torch.randn(30, 3) @ torch.randn(3, 8)
    expected = torch.linalg.pinv(weight.double(), rtol=1e-5).t()
    found = SemanticBases(weight).vectors(torch.arange(30))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_no_matrix_as_large_as_a_large_head_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantics, "_CHUNK", 16)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != own:
                largest = max(largest, result.numel())
            return result

    weight = torch.randn(4096, 8)
    own = weight.untyped_storage().data_ptr()
    with Watch():
        SemanticBases(weight).cross_entropy(torch.randn(5, 8), torch.arange(5), 0.1)
    assert largest == 4096  # the norms: of [4096, 8] there is none


@pytest.mark.parametrize("weight", [torch.zeros(5, 4), torch.full((5, 4), torch.nan)])
def test_a_head_without_bases_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the output head's weight \(5, 4\) is zero, or contains NaN"):
        SemanticBases(weight)


# Gains


def test_marginal_gains() -> None:
    assert marginal([5.0, 3.0, 2.5, 2.75]) == [2.0, 0.5, -0.25]


def test_the_power_law_is_found_and_what_goes_beyond_it_gains() -> None:
    law = [4.0 * (1 + l) ** -0.7 + 1.5 for l in range(12)]
    torch.testing.assert_close(fitted_power_law(law), law, rtol=1e-3, atol=1e-3)
    assert max(map(abs, power_law(law))) < 1e-3
    bent = [d - (0.5 if l >= 8 else 0.0) for l, d in enumerate(law)]
    gains = power_law(bent)
    assert max(range(11), key=gains.__getitem__) == 7  # the 8th layer; the marginal gain is largest at the first
    assert marginal(bent)[0] == max(marginal(bent))


def test_a_trace_that_rises_has_a_flat_law() -> None:
    assert fitted_power_law([1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]


# The plan


def by_hand(model: Any, temperature: float) -> list[float]:
    """Cross-entropy of the semantic logits of every hidden state, the norm applied, with the next token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inverse = torch.linalg.pinv(base.lm_head.weight.detach().double()).t()
    layers = base.model.layers
    seen: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    handles = [layers[0].register_forward_pre_hook(lambda module, inputs: seen[0].append(inputs[0]))]
    for number, layer in enumerate(layers, 1):
        handles.append(layer.register_forward_hook(lambda m, i, output, n=number: seen[n].append(output)))
    model.eval()
    wanted = []
    for batch in batches():
        with torch.no_grad():
            model(**batch)
        wanted.append(batch["labels"])
    for handle in handles:
        handle.remove()
    labels = torch.cat(wanted)[:, 1:]
    found = []
    for states in seen:
        hidden = base.model.norm(torch.cat(states))[:, :-1].detach().double()
        cosines = torch.nn.functional.cosine_similarity(hidden[..., None, :], inverse, dim=-1)
        losses = torch.nn.functional.cross_entropy((cosines / temperature).flatten(0, 1), labels.flatten())
        found.append(losses.item())
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_the_trace_is_that_of_the_hidden_states(adapted: bool) -> None:
    model: Any = lora(lora_dropout=0.5) if adapted else llama()
    model.train()
    plan = loge.plan_freezing(model, batches(), temperature=0.3)
    assert model.training
    assert plan.trace == pytest.approx(by_hand(model, 0.3), rel=1e-4)
    assert plan.gains == pytest.approx(marginal(plan.trace))
    assert plan.tokens == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches())
    assert plan.deviation == "cross_entropy at 0.3"


def test_the_last_layer_always_trains_and_the_largest_gain_freezes() -> None:
    model = llama()
    plan = loge.plan_freezing(model, batches(), gain=lambda trace: [0.0, 5.0])
    assert (plan.boundary, plan.layers, plan.share, plan.predicted_time) == (1, 2, 0.5, 0.75)
    assert "1 of 2 layers: a LoRA step is predicted to take 75% of its time, 1.33x as fast" in str(plan)
    assert "the largest gain" in str(plan)
    assert plan.to_dict()["predicted_time"] == 0.75


def test_the_pluggable_parts() -> None:
    model = llama()
    cosine = loge.plan_freezing(model, batches(), "cosine", "power_law")
    assert (cosine.deviation, cosine.gain) == ("cosine", "power_law")
    assert all(0.0 < value < 2.0 for value in cosine.trace)

    def squared(bases: SemanticBases, hidden: Tensor, labels: Tensor) -> Tensor:
        return bases.cosine(hidden, labels).square()

    own = loge.plan_freezing(model, batches(), squared)
    assert own.deviation == "squared"
    assert own.trace[0] > cosine.trace[0] ** 2 - 1e-6


def test_the_model_is_as_it_was() -> None:
    model = lora(lora_dropout=0.1)
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loge.plan_freezing(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_freezes_a_model() -> None:
    model = lora()
    plan = loge.plan_freezing(model, torch.utils.data.DataLoader([{k: v[0] for k, v in batches()[0].items()}]))
    report = loge.apply(model, 0.25, freeze_below=plan)
    assert sum(row.path == "frozen" for row in report.layers) == 7 * plan.boundary
    again = loge.plan_freezing(model, batches())  # a frozen and converted model has the same trace
    assert again.trace == pytest.approx(loge.plan_freezing(lora(), batches()).trace, rel=1e-5)


def test_the_picture(tmp_path: Path) -> None:
    plan = loge.plan_freezing(llama(), batches())
    plan.plot(tmp_path / "new" / "plan.png")
    assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "batches is empty: it gave no batch to plan with"),
        ({"batches": [tokens()]}, "batch 0 is a Tensor; expected a dict"),
        ({"batches": [{"input_ids": tokens()}]}, "batch 0 has no 'labels': it has 'input_ids'; add them"),
        ({"batches": [{"input_ids": tokens(), "labels": tokens() + 40}]}, r"up to \d+; expected integers .* below 50"),
        ({"batches": [{"input_ids": tokens(), "labels": tokens() * 0 - 100}]}, "no label to compare with: all"),
        ({"deviation": "distance"}, "deviation='distance' is unknown; choose one of 'cross_entropy', 'cosine'"),
        ({"deviation": lambda bases, hidden, labels: hidden}, r"deviation gave \(\d+, 64\), for \d+ states"),
        ({"deviation": lambda bases, hidden, labels: labels * torch.nan}, "the deviation of batch 0 is not finite"),
        ({"gain": "best"}, "gain='best' is unknown; choose one of 'marginal', 'power_law'"),
        ({"gain": lambda trace: trace}, "gain gave 3 values for 2 layers"),
        ({"temperature": 0.0}, "temperature=0.0 is not a positive number"),
        ({"head": nn.ReLU()}, "head is a ReLU; give a linear layer"),
        ({"model": nn.Linear(3, 3)}, r"this Linear has no torch\.nn\.ModuleList of layers"),
        ({"model": llama().model}, "neither output embeddings nor a classifier"),
        ({"model": 3}, "model is a int"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises((ValueError, TypeError), match=message):
        loge.plan_freezing(**{"model": model, "batches": batches(), **arguments})
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
