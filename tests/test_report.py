"""The report as a table, as data, as one line."""

from __future__ import annotations

import json

import pytest

from loge_kernels import LayerReport, Policy, Report

REPORT = Report(
    (
        LayerReport("a.q_proj", (64, 32), 16, 0.8125, "fused", "", 0.25),
        LayerReport("a.k_proj", (64, 64), 16, 0.5, "base", "2 active adapters", 0.5),
        LayerReport("a.v_proj", (32, 32), None, None, "exact", "dense is cheaper", 0.0),
        LayerReport("lm_head", (999, 64), None, None, "skipped", "output head", 0.0),
    ),
    Policy(4.0, "int8", 0.5, 0.3),
)


def test_flops_saved_counts_converted_layers_by_size() -> None:
    dense = 64 * 32 + 64 * 64 + 32 * 32
    assert REPORT.flops_saved == pytest.approx((64 * 32 * 0.25 + 64 * 64 * 0.5) / dense)
    assert [layer.name for layer in REPORT.converted] == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert Report((), REPORT.policy).flops_saved == 0.0


def test_dict_is_plain_data() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["flops_saved"] == REPORT.flops_saved
    assert data["layers"][0] == {
        "name": "a.q_proj",
        "shape": [64, 32],
        "rank": 16,
        "energy": 0.8125,
        "path": "fused",
        "reason": "",
        "flops_saved": 0.25,
    }
    assert data["policy"] == {
        "exact_every": 4.0,
        "exact_dtype": "int8",
        "correction": 0.5,
        "cost": 0.3,
        "low_rank_dtype": None,
    }
    assert [layer["path"] for layer in data["layers"]] == ["fused", "base", "exact", "skipped"]


def test_table_has_a_line_a_layer() -> None:
    lines = str(REPORT).splitlines()
    assert REPORT.summary() in " ".join(str(REPORT).split())
    for layer, cells in zip(
        REPORT.layers,
        (
            ["64 x 32", "16", "0.812", "fused", "25%"],
            ["64 x 64", "16", "0.500", "base", "50%", "2 active adapters"],
            ["32 x 32", "-", "exact", "0%", "dense is cheaper"],
            ["999 x 64", "-", "skipped", "0%", "output head"],
        ),
        strict=True,
    ):
        (line,) = [line for line in lines if layer.name in line]
        assert all(cell in line for cell in cells), line
    for path in ("fused:", "base:", "exact:", "skipped:"):
        assert any(line.strip().startswith(path) for line in lines), "each path is explained"
    assert not any(line.strip().startswith("plain:") for line in lines)
    assert not any(line != line.rstrip() for line in lines)


def test_summary() -> None:
    text = REPORT.summary()
    for part in (
        "4 linear layers",
        "1 fused",
        "1 base",
        "1 exact",
        "1 skipped",
        f"{REPORT.flops_saved:.0%}",
        "one step in 4 exact in int8",
    ):
        assert part in text


def test_long_names_are_not_cut() -> None:
    name = ".".join(["base_model", "model", "model", "layers", "31", "self_attn", "a_rather_long_name"] * 2)
    text = str(Report((LayerReport(name, (64, 32), 16, 0.8, "plain", "", 0.25),), REPORT.policy))
    folded = "".join(character for character in text if not character.isspace())
    assert "…" not in text
    assert all(part in folded for part in ("base_model", "a_rather_long_name"[:8]))
