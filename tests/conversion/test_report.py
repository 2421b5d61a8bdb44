"""The report as a table, as data, as one line."""

from __future__ import annotations

import json

import pytest

from loge_kernels import LayerReport, Report

REPORT = Report(
    (
        LayerReport("a.q_proj", (64, 32), "fused", "rank 16", 16, 0.8125, "", 0.25),
        LayerReport("a.k_proj", (64, 64), "base", "rank 16 in int8", 16, 0.5, "2 active adapters", 0.5),
        LayerReport("a.v_proj", (32, 32), "plain", "float32", None, None, "dense is cheaper", 0.0),
        LayerReport("b.q_proj", (64, 32), "frozen", "-", None, None, "frozen prefix", 1.0),
        LayerReport("lm_head", (999, 64), "skipped", "-", None, None, "output head", 0.0),
    ),
    4,
)
WEIGHTS = {"a.q_proj": 64 * 32, "a.k_proj": 64 * 64, "a.v_proj": 32 * 32, "b.q_proj": 64 * 32, "lm_head": 999 * 64}


def test_shares_count_weights_by_their_size() -> None:
    total = sum(WEIGHTS.values())
    saved = 64 * 32 * 0.25 + 64 * 64 * 0.5 + 64 * 32
    assert REPORT.flops_saved == pytest.approx(saved / total)
    assert [layer.name for layer in REPORT.converted] == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert REPORT.share_converted == pytest.approx(sum(WEIGHTS[layer.name] for layer in REPORT.converted) / total)
    assert (Report(()).flops_saved, Report(()).share_converted) == (0.0, 0.0)
    experts = LayerReport("experts", (4, 64, 32), "skipped", "-", None, None, "", 0.0)
    assert experts.numbers == 4 * 64 * 32


def test_dict_is_plain_data() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["layers"][0] == {
        "name": "a.q_proj",
        "shape": [64, 32],
        "path": "fused",
        "dx": "rank 16",
        "rank": 16,
        "energy": 0.8125,
        "reason": "",
        "flops_saved": 0.25,
    }
    assert [layer["path"] for layer in data["layers"]] == ["fused", "base", "plain", "frozen", "skipped"]
    del data["layers"]
    assert data == {
        "exact_every": 4,
        "share_converted": REPORT.share_converted,
        "flops_saved": REPORT.flops_saved,
        "summary": REPORT.summary(),
    }


def test_table_has_a_line_a_layer() -> None:
    lines = str(REPORT).splitlines()
    assert REPORT.summary() in " ".join(str(REPORT).split())
    rows = (
        ["64 x 32", "fused", "rank 16", "0.812", "25%"],
        ["64 x 64", "base", "rank 16 in int8", "0.500", "50%", "2 active adapters"],
        ["32 x 32", "plain", "float32", "dense is cheaper"],
        ["64 x 32", "frozen", "100%", "frozen prefix"],
        ["999 x 64", "skipped", "output head"],
    )
    for layer, cells in zip(REPORT.layers, rows, strict=True):
        (line,) = [line for line in lines if layer.name in line]
        assert all(cell in line for cell in cells), line
    for path in ("fused:", "base:", "plain:", "frozen:", "skipped:"):
        assert any(line.strip().startswith(path) for line in lines), "each path is explained"
    plain = str(Report(REPORT.layers[2:3]))
    assert "fused:" not in plain
    assert not any(line != line.rstrip() for line in lines)


def test_summary() -> None:
    assert REPORT.summary() == (
        "5 linear layers: 1 fused, 1 base, 1 plain, 1 frozen, 1 skipped (10% of their weights converted); dX: 1 in "
        "rank 16, 1 in rank 16 in int8, 1 in float32, exact in one forward of 4; 6% of the dense dX flops saved"
    )
    exact = Report((LayerReport("a", (64, 32), "fused", "int8", None, None, "faster", 0.0),) * 2)
    assert exact.summary() == "2 linear layers: 2 fused (100% of their weights converted); dX: 2 in int8"


def test_long_names_are_not_cut() -> None:
    name = ".".join(["base_model", "model", "model", "layers", "31", "self_attn", "a_rather_long_name"] * 2)
    text = str(Report((LayerReport(name, (64, 32), "plain", "rank 16", 16, 0.8, "", 0.25),)))
    folded = "".join(character for character in text if not character.isspace())
    assert "…" not in text
    assert all(part in folded for part in ("base_model", "a_rather_long_name"[:8]))
