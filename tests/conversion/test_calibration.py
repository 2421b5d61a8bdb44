"""`calibrate`: sums against brute force, memory, files, refusals; and a model that is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import QUERY, UP, batches, by_hand
from models import llama, lora, tokens
from situations import checkpointed
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.conversion.calibrate import SCORED
from loge_kernels.factors.second_moment import SecondMoment
from loge_kernels.factors.statistics import LayerStatistics


def test_the_sums_are_those_of_every_batch() -> None:
    model = lora()
    statistics = loge.calibrate(model, batches())
    assert (statistics.batches, statistics.tokens) == (3, 72)
    assert len(statistics.layers) == 14
    for name in (QUERY, UP):
        layer, seen = statistics.layers[name], by_hand(model, name)
        dy = torch.cat([one.flatten(0, 1) for one, _ in seen])
        weight = model.get_submodule(name).base_layer.weight.detach()
        assert layer.of_dx == (name == UP)
        rows = dy @ weight if layer.of_dx else dy
        torch.testing.assert_close(layer.moment.matrix, rows.t() @ rows)
        torch.testing.assert_close(layer.importance, dy.square().sum(0))
        assert layer.tokens == len(dy)


def test_scores_are_the_weight_gradient_along_each_singular_pair() -> None:
    model = lora()
    layer = loge.calibrate(model, batches(), scores=True).layers[QUERY]
    weight = model.get_submodule(QUERY).base_layer.weight.detach()
    U, _, Vt = torch.linalg.svd(weight, full_matrices=False)
    samples = [one.t() @ x for dy, x_all in by_hand(model, QUERY) for one, x in zip(dy, x_all, strict=True)]
    g = torch.stack([torch.einsum("nj,nk,jk->j", U, gradient, Vt) for gradient in samples])
    assert layer.scores is not None
    torch.testing.assert_close(layer.scores, torch.stack([g.sum(0), g.abs().sum(0), g.square().sum(0)]))
    assert loge.calibrate(model, batches()).layers[QUERY].scores is None
    assert SCORED == 1024


def test_the_model_is_as_it_was() -> None:
    model = lora(lora_dropout=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 3.0)
    loge.calibrate(model, batches(), scores=True)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None if not p.requires_grad else bool((p.grad == 3.0).all())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_frozen_model_without_adapters_is_calibrated_too() -> None:
    plain, adapted = llama(), lora()
    plain.requires_grad_(False)
    plain.train()
    for p in adapted.parameters():
        p.data = torch.zeros_like(p) if p.requires_grad else p.data
    found = loge.calibrate(plain, batches())
    expected = loge.calibrate(adapted, batches())
    for name, layer in found.layers.items():
        torch.testing.assert_close(layer.moment.matrix, expected.layers[f"base_model.model.{name}"].moment.matrix)


def test_checkpointed_models() -> None:
    model = lora()
    expected = loge.calibrate(model, batches())
    found = loge.calibrate(checkpointed(model, True), batches())
    for name, layer in found.layers.items():
        torch.testing.assert_close(layer.moment.matrix, expected.layers[name].moment.matrix)


def test_a_loss_and_a_loader_of_ones_own() -> None:
    model = lora()
    loader = torch.utils.data.DataLoader([{"input_ids": batch["input_ids"][0]} for batch in batches()], batch_size=1)
    found = loge.calibrate(model, loader, loss=lambda model, batch: model(**batch).logits.square().mean())
    assert found.batches == 3


def test_a_loader_without_a_length() -> None:
    class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter([{name: ids[0] for name, ids in batch.items()} for batch in batches()])

    assert loge.calibrate(lora(), torch.utils.data.DataLoader(Stream(), batch_size=1)).batches == 3


def test_a_layer_that_is_called_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32).requires_grad_(False)

        def forward(self, input: Tensor) -> Tensor:
            return self.inner(input=input)

    x = {"x": torch.randn(4, 32)}
    found = loge.calibrate(Named(), [x], ["inner"], scores=True, loss=lambda model, batch: model(batch["x"]).sum())
    scores = found.layers["inner"].scores
    assert scores is not None
    assert scores.any()


def test_a_layer_that_works_in_place_after_a_frozen_one() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 32)).requires_grad_(False)
    found = loge.calibrate(model, [{"x": torch.randn(4, 32)}], loss=lambda model, batch: model(batch["x"]).sum())
    assert found.layers["0"].importance.any()


class Experts(nn.Module):
    """Two experts, of which no token reaches the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.experts = nn.ModuleList(nn.Linear(128, 160) for _ in range(2)).requires_grad_(False)
        self.norm = nn.BatchNorm1d(160)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.experts[0](x))


def of_experts(factor: float = 1.0) -> dict[str, Any]:
    return {
        "batches": [{"x": torch.randn(40, 128)}],
        "loss": lambda model, batch: (model(batch["x"]) * factor * torch.linspace(-1, 1, 40)[:, None]).sum(),
    }


@pytest.mark.parametrize("subspace", ["gradient", "salience"])
def test_an_expert_without_tokens_takes_its_weights_own_directions(
    subspace: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Experts()
    statistics = loge.calibrate(model, scores=subspace == "salience", **of_experts())
    report = loge.apply(model, 8, subspace=subspace, calibration=statistics)
    assert "no token at 1 of 2 layers" in caplog.text
    assert caplog.text.rstrip().endswith("experts.1")
    unseen, svd = model.experts[1].factors, loge.factorize(model.experts[1].weight, 8)
    torch.testing.assert_close(unseen.left @ unseen.right, svd.left @ svd.right, rtol=1e-4, atol=1e-5)
    assert report.layers[1].energy == pytest.approx(svd.energy)
    # Orthonormal, as a weight that changes is projected onto them.
    torch.testing.assert_close(unseen.right @ unseen.right.t(), torch.eye(8), rtol=0, atol=1e-5)


def test_no_token_anywhere_and_a_zero_gradient_stay_errors() -> None:
    model = Experts()
    statistics = loge.calibrate(model, **of_experts())
    with pytest.raises(ValueError, match="no gradient at any of the 1 layers: no token"):
        loge.apply(model, 8, calibration=statistics, targets=r"experts\.1")
    zero = loge.calibrate(model, **of_experts(0.0))
    with pytest.raises(ValueError, match=r"layer 'experts\.0': calibration saw no gradient .* its tokens was zero"):
        loge.apply(model, 8, calibration=zero)
    with pytest.raises(ValueError, match="loss of batch 0 is nan"):
        loge.calibrate(model, **of_experts(torch.nan))


def test_running_statistics_stay_as_they_are() -> None:
    model = Experts()
    model(torch.randn(9, 128) + 3.0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loge.calibrate(model, **of_experts())
    assert before.keys() == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_inside_autocast_the_sums_stay_in_float32() -> None:
    model = lora()
    with torch.autocast("cpu", torch.bfloat16):
        found = loge.calibrate(model, batches())
    for layer in found.layers.values():
        if not layer.of_dx:  # the trace of dYᵀ dY, added up in another order
            torch.testing.assert_close(layer.moment.matrix.diagonal(), layer.importance, rtol=1e-5, atol=0.0)


# Sketches


def test_a_sketch_gives_the_leading_part_back() -> None:
    scale = torch.logspace(0, -4, 300)
    rows = torch.randn(2000, 300) * scale
    whole, sketch = SecondMoment(300), SecondMoment(300, whole=False)
    assert sketch.matrix.shape == (300, 300)
    for part in rows.split(500):
        whole.add(part)
        sketch.add(part)
    for moment in (whole, sketch):
        root = moment.root()
        torch.testing.assert_close(root.t() @ root, rows.t() @ rows, rtol=1e-2, atol=2.0)


def test_wide_layers_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loge_kernels.factors.second_moment.WHOLE_UP_TO", 40)
    monkeypatch.setattr("loge_kernels.factors.second_moment.WIDTH", 24)
    model = lora()
    statistics = loge.calibrate(model, batches())
    layer = statistics.layers[QUERY]
    assert layer.moment.matrix.shape == (64, 24)
    assert layer.nbytes == 4 * (64 * 24 + 64)
    report = loge.apply(model, 16, calibration=statistics)
    assert all(row.energy is not None and 0.3 < row.energy <= 1.0 for row in report.converted)


def test_the_stated_bound_of_memory() -> None:
    """On the meta device: no memory is taken."""
    for shape, size in (((4096, 14336), 4 * 4096**2), ((14336, 16384), 4096 * 14336), ((16384, 16384), 64 << 20)):
        layer = LayerStatistics.empty(shape, "meta")
        assert layer.moment.matrix.nbytes == size <= 64 << 20
        assert layer.nbytes <= size + 4 * (shape[0] + 4096)
        assert layer.moment.whole == (min(shape) <= 4096)
    wide = SecondMoment(14336, "meta")
    wide.add(torch.empty(8, 14336, device="meta"))
    assert wide.matrix.shape == (14336, 1024)


def test_a_sketch_of_more_than_4096_is_one() -> None:
    """The first size that is sketched, for rows of rank 3: what 1024 columns hold exactly."""
    rows = torch.randn(20, 3) @ torch.randn(3, 4097)
    moment = SecondMoment(4097)
    assert not moment.whole
    moment.add(rows)
    root = moment.root()
    some = torch.randn(4, 4097) @ rows.t() / 20 @ rows
    expected = (some @ rows.t()).square().sum()
    torch.testing.assert_close((some @ root.t()).square().sum(), expected, rtol=1e-2, atol=0.0)


# Files

HEADER = b'{"__metadata__":{"loge":"[]"}}'
LISTED = len(HEADER).to_bytes(8, "little") + HEADER  # metadata that is JSON, but no dict


def assert_equal(found: loge.Statistics, expected: loge.Statistics) -> None:
    assert (found.batches, found.tokens, found.layers.keys()) == (
        expected.batches,
        expected.tokens,
        expected.layers.keys(),
    )
    for name, layer in found.layers.items():
        other = expected.layers[name]
        assert layer.shape == other.shape
        torch.testing.assert_close(layer.moment.matrix, other.moment.matrix)
        torch.testing.assert_close(layer.importance, other.importance)
        assert layer.tokens == other.tokens
        torch.testing.assert_close(layer.scores, other.scores)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = lora()
    statistics = loge.calibrate(model, batches(), scores=True)
    statistics.save(tmp_path / "statistics.safetensors")
    assert_equal(loge.Statistics.load(tmp_path / "statistics.safetensors"), statistics)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    assert "14 layers, 3 batches, 72 tokens" in str(statistics)
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"statistics.safetensors' holds no statistics of loge_kernels\.calibrate: "):
        loge.Statistics.load(path)


def test_an_interrupted_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loge_kernels.conversion.calibrate._SAVE_EVERY", -1.0)
    model = lora()
    file = tmp_path / "statistics.safetensors"

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from batches()[:2]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        loge.calibrate(model, broken(), file=file)
    assert loge.Statistics.load(file).batches == 2
    assert_equal(loge.calibrate(model, batches(), file=file), loge.calibrate(model, batches()))
    assert loge.Statistics.load(file).batches == 3
    with pytest.raises(ValueError, match="statistics of other layers or scores"):
        loge.calibrate(model, batches(), scores=True, file=file)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 500, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", LISTED])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"holds no statistics of loge_kernels\.calibrate"):
        loge.Statistics.load(path)


# Refusals


def nan_loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss * torch.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": [tokens()]}, "batch 0 is a Tensor; expected a dict"),
        ({"batches": [{"input_ids": tokens()}]}, r"batch 0 gives no loss \(no 'labels'\): it has 'input_ids'"),
        ({"loss": nan_loss}, "the loss of batch 0 is nan"),
        ({"loss": lambda model, batch: torch.tensor(1.0)}, "the loss of batch 0 has no gradient"),
        ({"loss": lambda model, batch: model(**batch).logits}, "the loss of batch 0 is .*expected a scalar"),
        ({"file": "no/such/folder/x.safetensors"}, "there is no folder 'no/such/folder'"),
        ({"targets": ["nothing"]}, r"targets=\['nothing'\] matches no linear layer"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    model = lora()
    with pytest.raises((ValueError, TypeError), match=message):
        loge.calibrate(model, **{"batches": batches(), **arguments})
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_eval_mode_and_converted_models_are_refused() -> None:
    model = lora()
    model.eval()
    with pytest.raises(ValueError, match=r"eval mode.*model\.train\(\)"):
        loge.calibrate(model, batches())
    model.train()
    loge.apply(model, 16)
    with pytest.raises(ValueError, match=r"converted already; call loge_kernels\.remove"):
        loge.calibrate(model, batches())


def test_an_optimizer_within_backward_is_not_run() -> None:
    model = lora()
    name, adapter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    handle = adapter.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    with pytest.raises(ValueError, match=f"{name} has a hook that acts on its gradient"):
        loge.calibrate(model, batches())
    handle.remove()
    loge.calibrate(model, batches())


def test_a_gradient_that_is_not_finite_is_named_and_kept_out_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loge_kernels.conversion.calibrate._SAVE_EVERY", -1.0)
    model, file = lora(), tmp_path / "statistics.safetensors"

    def overflow(model: Any, batch: Any) -> Tensor:
        value = model(**batch).loss
        if torch.equal(batch["input_ids"], batches()[1]["input_ids"]):
            value.register_hook(lambda gradient: gradient * torch.inf)
        return value

    with pytest.raises(ValueError, match=r"the gradient of batch 1 at layer .* contains NaN or inf"):
        loge.calibrate(model, batches(), loss=overflow, file=file)
    assert loge.Statistics.load(file).batches == 1
    assert torch.isfinite(loge.Statistics.load(file).layers[UP].importance).all()
