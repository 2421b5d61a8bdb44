"""`bench linear --on-paper`, and predictions beside what is measured."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loge_kernels.bench.linear import on_paper, run
from loge_kernels.bench.linear.rows import Row
from loge_kernels.bench.measure.output import print_case
from loge_kernels.triton_kernels.rates import KNOWN

H200 = "NVIDIA H200"
OPTIONS = {"shapes": ("8192,4096,4096",), "ranks": (256, 512), "device": "cpu"}


def predict(**changes: object) -> tuple[dict, str]:
    text = StringIO()
    options = run.MicroOptions(**(OPTIONS | {"on_paper": "H200"} | changes))
    return run.run(options, Console(file=text, width=200)), text.getvalue()


def test_each_candidate_is_predicted_by_phase(tmp_path: Path) -> None:
    report, text = predict(json=tmp_path / "paper.json")
    assert report == json.loads((tmp_path / "paper.json").read_text())
    assert report["device"] == H200
    assert {row["R"] for row in report["rows"]} == {None, 256, 512}
    for row in report["rows"]:
        assert row["us"] == pytest.approx(sum(float(text.split()[0]) for text in row["phases"].values()), abs=0.5)
    cuda = {row["R"]: row for row in report["rows"] if row["candidate"] == "cuda sm90"}
    assert list(cuda[512]["phases"]) == ["project", "expand", "small"]
    torch_row = next(row for row in report["rows"] if row["candidate"] == "torch" and row["R"] == 256)
    assert cuda[256]["speedup"] == pytest.approx(torch_row["us"] / cuda[256]["us"], rel=1e-2)
    # dY, x and dX, the factors and the adapter once at 4.16 TB/s.
    moved = 2 * (8192 * 3 * 4096 + (256 + 2 * 16) * 8192)
    assert cuda[256]["roofline"] == pytest.approx(moved / 4.16e6 / cuda[256]["us"], rel=0.05)
    assert "cuda sm90" in text
    assert "walk N 35.7 l2" in text


def test_a_gpu_is_named_by_a_part_of_its_name() -> None:
    assert on_paper.gpu_named("h200") == H200
    with pytest.raises(ValueError, match=r"on_paper='B200' is not a GPU that the cost model knows; choose from NVIDIA"):
        predict(on_paper="B200")


def test_measured_rows_stand_beside_what_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: H200)
    case = run.plan(run.MicroOptions(**OPTIONS), torch.device("cpu"))[0]
    made = [("loge cuda R=256", "loge", 256), ("loge triton R=256", "loge", 256), ("exact", "exact", None)]
    made += [("exact float8 triton", "loge", None), ("peft", "peft", None), ("unfused R=256", "unfused", 256)]
    rows = [Row(case, name, kind, R, "ok", "", seconds=1e-4, eager_seconds=1e-4) for name, kind, R in made]
    on_paper.add_predictions(rows, torch.device("cuda", 0))
    found = {row.candidate: row.predicted_seconds for row in rows}
    low_rank = {c.form: c.predicted_us for c in on_paper.explained(case, 256, H200).candidates}
    exact = {c.name: c.predicted_us for c in on_paper.explained(case, None, H200).candidates}
    assert found == {
        "loge cuda R=256": pytest.approx(1e-6 * low_rank["cuda sm90"]),
        "loge triton R=256": pytest.approx(1e-6 * min(low_rank["one_launch"], low_rank["two_launch"])),
        "exact": pytest.approx(1e-6 * exact["torch 16-bit"]),
        "exact float8 triton": pytest.approx(1e-6 * exact["fused float8 fast"]),
        "peft": None,
        "unfused R=256": None,
    }
    text = StringIO()
    print_case(Console(file=text, width=200), "a case", "backward", rows)
    assert "predicted" in text.getvalue()


def test_every_gpu_that_is_known_can_be_predicted() -> None:
    for name in KNOWN:
        assert predict(on_paper=name)[0]["rows"]


RESULTS = Path(__file__).parents[2] / "bench" / "results" / "predicted"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*-linear.json")), ids=lambda file: file.stem)
def test_committed_predictions_are_those_of_the_model(file: Path) -> None:
    """`bench linear M,N,K ... --on-paper GPU --rank 64,128,256,512 --json FILE` writes them anew."""
    kept = json.loads(file.read_text())
    first = kept["rows"][0]
    shape = ",".join(str(first[key]) for key in ("M", "N", "K"))
    now, _ = predict(on_paper=kept["device"], shapes=(shape,), ranks=(64, 128, 256, 512))
    assert kept["rates"] == now["rates"]
    assert kept["rows"][: len(now["rows"])] == now["rows"]
    measured = {(row["N"], row["K"], row["M"], row["R"]) for row in kept["rows"]}
    assert len(measured) == 4 * 3 * 5
