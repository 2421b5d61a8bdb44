"""What is measured and what came out: a case of the microbenchmark and the row of each of its candidates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from loge_kernels.check.accuracy import Verdict

from ..measure.shapes import Shape


@dataclass(frozen=True, slots=True)
class Case:
    """One shape, M, P and dtype, with the ranks to measure on it."""

    shape: Shape
    M: int
    P: int
    dtype: str
    ranks: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{self.shape.name}: M={self.M} N={self.shape.N} K={self.shape.K} P={self.P} {self.dtype}"


@dataclass(slots=True)
class Row:
    """The measurement of one candidate of one case; `status` is "ok", "wrong result" or "not run"."""

    case: Case
    candidate: str
    kind: str
    rank: int | None
    status: str
    note: str
    runs: int = 0
    mode: str = "eager"  # or "graph": what `seconds` and all that follows from it are of
    seconds: float | None = None  # median
    eager_seconds: float | None = None
    graph_seconds: float | None = None  # a replay of a CUDA graph
    graph_note: str = ""  # why there is no graph
    predicted_seconds: float | None = None  # by the cost model, of a backward on a GPU
    p10: float | None = None
    p90: float | None = None
    tflops: float | None = None
    gbytes_per_second: float | None = None
    roofline: float | None = None  # share of the roofline of this formula
    ceiling: float | None = None  # what the flops allow over the dense products
    speedup: dict[str, float] = field(default_factory=dict)  # over each baseline, by its kind
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    peak_bytes: int | None = None
    factor_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the case's fields first."""
        case, row = self.case, asdict(self)
        del row["case"]
        shape = {"shape": case.shape.name, "M": case.M, "N": case.shape.N, "K": case.shape.K, "P": case.P}
        return {**shape, "dtype": case.dtype, **row}
