"""No page recommends a low-rank policy whose step is predicted to be slower than that of plain `loge.apply(model)`."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PAGES

from loge_kernels.bench.recommended import calls, slow_calls


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_call_on_a_page_is_predicted_slower(page: Path) -> None:
    assert slow_calls(page.read_text()) == []


PAGE = """
Exact with `loge.apply(model, exact_dtype="int8")`, or all of `loge.apply(model, …)`.
```python
report = loge.apply(
    model, 1 / 8,  # of min(N, K) (or 256)
    exact_layers=0.5, calibration=calibrate(model, batches),
)
loge.apply(model, rank=0.9)
loge.apply(model, rank=(1 / 8, 3 / 8))
loge.apply(model, rank=rank, budget=0.3)
loge.apply(model, rank=256, exact_every=1)
```
"""


def test_what_is_found() -> None:
    found = [policy.arguments for _, policy in calls(PAGE)]
    assert found == [
        {"exact_dtype": "int8"},
        {},
        {"rank": 0.125, "exact_layers": 0.5},
        {"rank": 0.9},
        {"rank": (0.125, 0.375)},
        {},
        {"rank": 256, "exact_every": 1},
    ]
    slow = slow_calls(PAGE)
    assert [line.partition(":")[0] for line in slow] == [
        "loge.apply(model, rank=0.9)",
        "loge.apply(model, rank=256, exact_every=1)",
    ]
