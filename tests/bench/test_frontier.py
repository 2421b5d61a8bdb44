"""`bench frontier`: reports of `bench fidelity` whose every number is made up, so that the table's are known."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loge_kernels.bench import frontier
from loge_kernels.bench.frontier import FrontierOptions
from loge_kernels.bench.measure.shapes import LLAMAS
from loge_kernels.bench.paper.run import PaperPolicy, step_seconds
from loge_kernels.bench.policies import parse

RESULTS = Path(__file__).parents[2] / "bench/results"
BASE = "base_dtype=float8"
LOW = "rank=1/8"
KERNELS = PaperPolicy("", kernels=True)
FROZEN = "exact_dtype=none,freeze_below=1"


def run_of(policy: str, seed: int, *losses: float, status: str = "ok") -> dict[str, Any]:
    """A run of 100 steps whose held-out loss was taken every 50."""
    curve = [
        {"step": 50 * (i + 1), "seconds": 1.0 + i, "cpu_seconds": 1.0 + i, "heldout": loss}
        for i, loss in enumerate(losses)
    ]
    return {"policy": policy, "seed": seed, "status": status, "curve": curve}


def save(path: Path, rows: list[dict[str, Any]], lr: float = 1e-3, **changes: Any) -> Path:
    settings = {"lr": lr, "steps": 100, "batch": 2, "seq": 64} | changes.pop("settings", {})
    report = {"benchmark": "fidelity", "version": 2, "model": "tiny", "settings": settings, "heldout_before": 3.0}
    report["sizes"] = {"layers": 4}
    path.write_text(json.dumps(report | {"rows": rows} | changes))
    return path


def table(*files: Path, **changes: Any) -> tuple[dict[str, dict[str, Any]], str]:
    printed = io.StringIO()
    result = frontier.run(FrontierOptions(files=files, **changes), Console(file=printed, width=200))
    return {row["policy"]: row for row in result["models"]["tiny"]}, printed.getvalue()


def test_steps_to_a_share_of_the_gain_and_what_follows(tmp_path: Path) -> None:
    # The gain is 1: 80 % of it are at 2.2. Between two points of a curve in proportion.
    rows = [run_of("peft", 0, 2.4, 2.0), run_of(BASE, 0, 2.2, 2.0), run_of(LOW, 0, 2.8, 2.3)]
    rows.append(run_of("exact", 0, 2.4, 2.0))
    found, printed = table(save(tmp_path / "a.json", rows), share=0.8)
    assert [found[policy]["steps"] for policy in ("peft", BASE)] == pytest.approx([75, 50])
    assert found[LOW]["steps"] is None
    assert found[LOW]["recovered"] == pytest.approx(0.7)
    for gpu in ("H100", "A100"):
        step = step_seconds(PaperPolicy("peft", peft=True), gpu, "LLaMA-3-8B", 8192)
        assert found["peft"]["predicted_seconds"][gpu] == pytest.approx(75 * step)
    ours = step_seconds(replace(parse(BASE).on_paper(), kernels=True), "H100", "LLaMA-3-8B", 8192)
    assert found[BASE]["predicted_seconds"]["H100"] == pytest.approx(50 * ours)
    assert found[BASE]["speedup"]["H100"] == pytest.approx(
        75 * step_seconds(PaperPolicy("peft", peft=True), "H100", "LLaMA-3-8B", 8192) / (50 * ours)
    )
    assert found[BASE]["predicted_seconds"]["A100"] is None, "an A100 has no float8"
    with_kernels = step_seconds(PaperPolicy("", kernels=True), "H100", "LLaMA-3-8B", 8192)
    assert found["exact"]["predicted_seconds"]["H100"] == pytest.approx(75 * with_kernels)
    assert "never" in printed


def test_4_bits(tmp_path: Path) -> None:
    rows = [run_of("peft", 0, 2.0), run_of("exact_dtype=nvfp4", 0, 2.0)]
    found, _ = table(save(tmp_path / "a.json", rows), gpus=("B200", "H100"))
    four = found["exact_dtype=nvfp4"]
    assert four["predicted_seconds"]["B200"] > found["peft"]["predicted_seconds"]["B200"], "no kernel quantises"
    assert four["predicted_seconds"]["H100"] is None
    assert four["gathered_bytes"] is None, "it cannot be sharded"
    assert not four["best"], "who knows?"


def test_bytes_are_those_of_fsdp2(tmp_path: Path) -> None:
    rows = [run_of(policy, 0, 2.0) for policy in ("peft", BASE, "exact_dtype=int8", "apply", FROZEN)]
    found, _ = table(save(tmp_path / "a.json", rows))
    linear = sum(N * K for N, K in LLAMAS["LLaMA-3-8B"].linears()) * LLAMAS["LLaMA-3-8B"].layers
    assert found["peft"]["gathered_bytes"] == pytest.approx(2 * 2 * linear, rel=0.05)
    assert found[BASE]["bytes_of_peft"] == pytest.approx(0.5, abs=0.02)
    assert found["exact_dtype=int8"]["bytes_of_peft"] == pytest.approx(0.75, abs=0.02)
    assert found["apply"]["bytes_of_peft"] == pytest.approx(0.75, abs=0.02), "with the kernels, as its time is"
    forward = found["peft"]["gathered_bytes"] / 2
    assert found[FROZEN]["gathered_bytes"] == pytest.approx((1 + 3 / 4) * forward), "1 layer of 4"
    unknown, _ = table(save(tmp_path / "b.json", rows, sizes=None))
    assert unknown[FROZEN]["gathered_bytes"] is None, "1 of how many layers?"


def test_each_policy_counts_at_its_best_learning_rate(tmp_path: Path) -> None:
    slow = save(tmp_path / "slow.json", [run_of("peft", 0, 2.5, 2.2), run_of(BASE, 0, 2.4, 2.1)], lr=1e-4)
    fast = save(tmp_path / "fast.json", [run_of("peft", 0, 2.4, 2.0), run_of(BASE, 0, 2.8, status="diverged")])
    found, printed = table(slow, fast)
    assert (found["peft"]["lr"], found[BASE]["lr"]) == (1e-3, 1e-4)
    assert found[BASE]["recovered"] == pytest.approx(0.9)
    assert "0.0001, 0.001" in printed


def test_seeds_are_paired(tmp_path: Path) -> None:
    rows = [run_of("peft", 0, 2.0), run_of("peft", 1, 1.0), run_of(BASE, 0, 2.1), run_of(BASE, 1, 1.4)]
    found, _ = table(save(tmp_path / "a.json", [*rows, run_of(BASE, 2, 1.0)]))
    assert found[BASE]["recovered_range"] == pytest.approx((0.8, 0.9))
    assert found[BASE]["seeds"] == 2
    found, _ = table(save(tmp_path / "a.json", rows), share=0.85)
    assert found[BASE]["steps"] is None, "one of its seeds did not get there"
    # Its one seed is one in which PEFT too needs 81 steps; the mean of PEFT's is 62.
    rows = [run_of("peft", 0, 2.9, 2.0), run_of("peft", 1, 2.2, 2.0), run_of("exact", 0, 2.9, 2.0)]
    found, _ = table(save(tmp_path / "a.json", rows), share=2 / 3)
    step = [step_seconds(policy, "H100", "LLaMA-3-8B", 8192) for policy in (PaperPolicy("", peft=True), KERNELS)]
    assert found["exact"]["speedup"]["H100"] == pytest.approx(step[0] / step[1])
    assert found["peft"]["speedup"]["H100"] == pytest.approx(1.0)


def test_learning_rates_are_compared_on_the_same_seeds(tmp_path: Path) -> None:
    slow = save(tmp_path / "slow.json", [run_of("peft", 0, 2.5), run_of("peft", 1, 1.0)], lr=1e-4)
    found, _ = table(slow, save(tmp_path / "fast.json", [run_of("peft", 0, 2.4)], lr=1e-3))
    assert found["peft"]["lr"] == 1e-3, "the other's mean is lower for its second seed"
    with pytest.raises(ValueError, match="peft: no seed was run at all of its learning rates"):
        table(slow, save(tmp_path / "fast.json", [run_of("peft", 2, 2.4)], lr=1e-3))


def test_the_best_in_their_way(tmp_path: Path) -> None:
    rows = [run_of("peft", 0, 2.0), run_of("exact", 0, 2.0), run_of(BASE, 0, 2.0), run_of(LOW, 0, 2.9)]
    found, _ = table(save(tmp_path / "a.json", rows))
    assert [policy for policy, row in found.items() if row["best"]] == [BASE]
    rows[2] = run_of(BASE, 0, 2.9)  # never there
    found, _ = table(save(tmp_path / "a.json", rows))
    assert [policy for policy, row in found.items() if row["best"]] == ["exact"]


def test_time_and_bytes_are_two_ways_to_be_best(tmp_path: Path) -> None:
    rows = [run_of("peft", 0, 2.0), run_of("exact_dtype=float8", 0, 2.0), run_of("rank=1/16", 0, 2.8, 2.0)]
    found, _ = table(save(tmp_path / "a.json", rows))
    assert [policy for policy, row in found.items() if row["best"]] == ["exact_dtype=float8", "rank=1/16"]


def test_what_diverged_has_no_figures(tmp_path: Path) -> None:
    rows = [run_of("peft", 0, 2.0), run_of(BASE, 0, status="diverged"), run_of(LOW, 0, 2.0)]
    found, _ = table(save(tmp_path / "a.json", rows))
    assert (found[BASE]["recovered"], found[BASE]["steps"], found[BASE]["best"]) == (None, None, False)


def test_the_file_holds_the_table(tmp_path: Path) -> None:
    out = tmp_path / "frontier.json"
    found, _ = table(save(tmp_path / "a.json", [run_of("peft", 0, 2.0)]), json=out)
    kept = json.loads(out.read_text())
    assert kept["models"]["tiny"][0]["steps"] == found["peft"]["steps"]
    assert kept["options"]["files"] == ["a.json"]


def test_the_committed_page_is_that_of_the_model() -> None:
    kept = json.loads((RESULTS / "predicted" / "frontier.json").read_text())
    files = [next(RESULTS.glob(f"cpu-*/{file}")) for file in kept["options"]["files"]]
    found = json.loads(json.dumps(frontier.run(FrontierOptions(files=files), Console(file=io.StringIO()))))
    assert found["models"] == kept["models"], "run `bench frontier` on the same files again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, r"--share 0: give a share in \(0, 1\]"),
        ({"gpus": ("B100",)}, r"--gpu='B100' is not known; choose from H100"),
        ({"gpus": ()}, r"--gpu: give at least one of H100"),
        ({"model": "GPT"}, r"--model='GPT' is not known; choose from LLaMA-3-8B"),
        ({"files": ()}, r"give at least one report of bench fidelity"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = save(tmp_path / "a.json", [run_of("peft", 0, 2.0)])
    with pytest.raises(ValueError, match=message):
        frontier.run(FrontierOptions(**{"files": (file,)} | changes))


def test_files_that_cannot_be_read_together(tmp_path: Path) -> None:
    good = save(tmp_path / "a.json", [run_of("peft", 0, 2.0)])
    other = save(tmp_path / "b.json", [run_of("peft", 0, 2.0)], settings={"batch": 4})
    with pytest.raises(ValueError, match="one report has batch = 4, another 2; only the learning rate may differ"):
        table(good, other)
    with pytest.raises(ValueError, match=r"b\.json: no report of bench fidelity, version 2 \(it has no run of peft\)"):
        table(save(tmp_path / "b.json", [run_of(BASE, 0, 2.0)]))
    with pytest.raises(ValueError, match="no report of bench fidelity, version 2"):
        table(save(tmp_path / "b.json", [], benchmark="step"))
    with pytest.raises(ValueError, match="every run of peft diverged"):
        table(save(tmp_path / "b.json", [run_of("peft", 0, status="diverged")]))
    with pytest.raises(ValueError, match="no report of bench fidelity"):
        table(tmp_path / "missing.json")
