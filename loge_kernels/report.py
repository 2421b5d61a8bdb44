"""What `apply` did to a model, layer by layer."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from .policy import Policy

LayerPath = Literal["fused", "base", "plain", "exact", "frozen", "skipped"]

_PATHS = {
    "fused": "frozen weight and adapter in one op, low-rank dX",
    "base": "frozen weight low-rank, adapter as PEFT computes it",
    "plain": "frozen weight low-rank, no adapter",
    "exact": "dense dX",
    "frozen": "runs without autograd: no dX at all",
    "skipped": "not converted",
}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer: `shape` is (N, K); `rank` and `energy` are None without factors; `flops_saved` is the share of
    the layer's dense dX flops (2·M·N·K) that the backward pass no longer spends, on average over the steps, with
    products in 8 bits counted half."""

    name: str
    shape: tuple[int, int]
    rank: int | None
    energy: float | None
    path: LayerPath
    reason: str
    flops_saved: float


@dataclass(frozen=True, slots=True)
class Report:
    """The layers that `apply` looked at, in the model's order, and when their frozen path is exact. `str()` gives a
    table, `to_dict()` plain data."""

    layers: tuple[LayerReport, ...]
    policy: Policy

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.path not in ("skipped", "frozen"))

    @property
    def flops_saved(self) -> float:
        """Share of the dense dX flops of the converted and the frozen layers that is saved."""
        counted = [layer for layer in self.layers if layer.path != "skipped"]
        dense = [layer.shape[0] * layer.shape[1] for layer in counted]
        saved = sum(cost * layer.flops_saved for cost, layer in zip(dense, counted, strict=True))
        return saved / sum(dense) if dense else 0.0

    def summary(self) -> str:
        """One line: how many layers on which path, and the flops saved."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.path] = counts.get(layer.path, 0) + 1
        paths = ", ".join(f"{count} {path}" for path, count in counts.items())
        saved = f"{self.flops_saved:.0%} of their dense dX flops saved"
        return f"{len(self.layers)} linear layers: {paths}; {saved}; {self.policy}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "policy": asdict(self.policy),
            "flops_saved": self.flops_saved,
        }

    def __str__(self) -> str:
        used = dict.fromkeys(layer.path for layer in self.layers)
        legend = "\n".join(f"{path}: {_PATHS[path]}" for path in used)
        table = Table(
            title=self.summary(), caption=legend, title_justify="left", caption_justify="left", pad_edge=False
        )
        for heading in ("layer", "N x K", "rank", "energy", "path", "flops saved", "reason"):
            right = heading in ("N x K", "rank", "energy", "flops saved")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name,
                f"{layer.shape[0]} x {layer.shape[1]}",
                "-" if layer.rank is None else str(layer.rank),
                "-" if layer.energy is None else f"{layer.energy:.3f}",
                layer.path,
                f"{layer.flops_saved:.0%}",
                layer.reason,
            )
        console = Console(file=io.StringIO(), width=160)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())
