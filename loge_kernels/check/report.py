"""What the harness found, and how it is printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from .accuracy import Verdict
from .cases import Case, describe


@dataclass(slots=True)
class Row:
    """All cases of one backend, dtype and result: how many were run, how many failed, the worst error / allowed error,
    and how many the backend declines."""

    backend: str
    dtype: str
    result: str
    cases: int = 0
    failed: int = 0
    declined: int = 0
    worst: float = 0.0
    worst_case: Case | None = None

    def add(self, verdict: Verdict, case: Case) -> None:
        self.cases += 1
        self.failed += not verdict.passed
        if verdict.ratio >= self.worst:
            self.worst, self.worst_case = verdict.ratio, case


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The rows, and why backends declined cases, with counts."""

    rows: list[Row] = field(default_factory=list)
    declined: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was run and nothing failed."""
        return any(row.cases for row in self.rows) and all(row.failed == 0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "rows": [asdict(row) for row in self.rows], "declined": self.declined}

    def print(self, console: Console) -> None:
        table = Table(title="error / allowed error, against float64 dense autograd", title_justify="left")
        for heading in ("backend", "dtype", "result", "cases", "failed", "declined", "worst", "verdict"):
            numeric = heading in ("cases", "failed", "declined", "worst")
            table.add_column(heading, justify="right" if numeric else "left")
        for row in self.rows:
            verdict = "[red]FAILED[/red]" if row.failed else "[green]ok[/green]"
            counts = (str(row.cases), str(row.failed), str(row.declined), f"{row.worst:.2f}")
            table.add_row(row.backend, row.dtype, row.result, *counts, verdict)
        console.print(table)
        for reason, count in self.declined.items():
            console.print(f"declined {count} times: {reason}")
        for row in self.rows:
            if row.failed and row.worst_case is not None:
                console.print(f"worst {row.backend} {row.dtype} {row.result}: {describe(row.worst_case)}")
