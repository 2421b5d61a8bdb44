"""`bench collectives`: the committed counts are the sums on paper, keep what the docs promise, and can be counted
again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loge_kernels.__main__ import app
from loge_kernels.bench.collectives import DEFAULTS, LORA_RANK, MODEL, TOKENS
from loge_kernels.bench.paper.collectives import held, traffic
from loge_kernels.bench.policies import parse

COUNTED = json.loads((Path(__file__).resolve().parents[2] / "bench" / "results" / "collectives.json").read_text())
ROWS: list[dict[str, Any]] = COUNTED["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['policy']}-{row['ranks']}-{row['checkpointing']}")
def test_what_is_counted_is_what_paper_says(row: dict[str, Any]) -> None:
    block = held(MODEL, parse(row["policy"]).on_paper(), "H200", TOKENS, LORA_RANK, adapter=2)
    expected = traffic(block, "fsdp2", row["checkpointing"])
    assert row["forward_bytes"] == MODEL.layers * expected.forward
    assert row["backward_bytes"] == MODEL.layers * expected.backward
    assert row["reduced_bytes"] == MODEL.layers * expected.reduced * 2  # in float32


def test_the_rows() -> None:
    assert {(row["policy"], row["ranks"], row["checkpointing"]) for row in ROWS} == {
        (policy, ranks, again) for policy in DEFAULTS for ranks in (2, 4) for again in (False, True)
    }


def test_what_is_promised() -> None:
    for row in ROWS:
        low, eight = row["policy"] == "rank=1/8", row["policy"].startswith("exact_dtype=")
        limit = 1.0 if row["checkpointing"] else 0.2 if low else 0.51 if eight else 1.0
        assert row["backward_over_peft"] <= limit


def test_a_rank_holds_pefts_share_and_its_own() -> None:
    """PEFT's, or half of its weights, plus a rank's part of factors and copies; FSDP pads rows that do not divide."""
    for row in ROWS:
        peft = next(r for r in ROWS if r["policy"] == "peft" and r["ranks"] == row["ranks"])
        block, whole = (
            held(MODEL, parse(policy).on_paper(), "H200", TOKENS, LORA_RANK) for policy in (row["policy"], "peft")
        )
        added = MODEL.layers * (block.weights - whole.weights + block.factors + block.copies) / row["ranks"]
        assert row["held_bytes"] == pytest.approx(peft["held_bytes"] + added, rel=1e-3)


def test_a_step_holds_at_most_pefts_and_its_own() -> None:
    """PEFT's peak, a rank's part of factors and copies, and what one layer's copy takes while it is made or read."""
    largest = max(N * K for N, K in MODEL.linears())
    for row in ROWS:
        peft = next(
            r for r in ROWS if r["policy"] == "peft" and all(r[k] == row[k] for k in ("ranks", "checkpointing"))
        )
        added = row["held_bytes"] - peft["held_bytes"]
        assert row["peak_bytes"] <= peft["peak_bytes"] + added + 2 * largest


@pytest.mark.slow
def test_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "collectives.json"
    typed = "--policy", "exact_dtype=int8", "--policy", "rank=1/8", "--ranks", "2"
    result = CliRunner().invoke(app, ["bench", "collectives", *typed, "--json", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    now = json.loads(file.read_text())["rows"]
    names = "policy", "ranks", "checkpointing", "forward_bytes", "backward_bytes", "reduced_bytes", "held_bytes"
    committed = [{name: row[name] for name in names} for row in ROWS]
    assert len(now) == 6
    for row in now:
        assert {name: row[name] for name in names} in committed


def test_bad_options() -> None:
    result = CliRunner().invoke(app, ["bench", "collectives", "--ranks", "1"])
    assert result.exit_code == 1
    assert "--ranks 1: give at least 2" in result.output
