"""What `apply` did to a model, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from ..terminal import as_text

LayerPath = Literal["fused", "base", "plain", "frozen", "skipped"]

_PATHS = {
    "fused": "frozen weight and adapter in one op",
    "base": "frozen weight in our op, adapter as PEFT computes it",
    "plain": "frozen weight in our op, no adapter",
    "frozen": "runs without autograd: no dX at all",
    "skipped": "not converted",
}


_MOST_RANKS = 4  # that a summary names one by one


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer. `shape` is (N, K), or (experts, N, K).

    dx: what its dX is computed in: "rank 256", "float8", "int8", the weight's dtype, or "-" where it is not ours.
    rank, energy: of the factors, None without.   flops_saved: the share of the dense dX flops (2·M·N·K) that the
    backward pass no longer spends, on average over the forwards; 8 bits save time and no flops.
    """

    name: str
    shape: tuple[int, ...]
    path: LayerPath
    dx: str
    rank: int | None
    energy: float | None
    reason: str
    flops_saved: float

    @property
    def numbers(self) -> int:
        """How many numbers the weight holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Report:
    """The layers, in the model's order. `exact_every`: one training forward in so many has an exact backward, or None.
    `str()` gives a table, `to_dict()` plain data."""

    layers: tuple[LayerReport, ...]
    exact_every: int | None = None

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.path not in ("skipped", "frozen"))

    @property
    def share_converted(self) -> float:
        """The share of all frozen linear weights, in numbers, whose backward is ours."""
        return sum(layer.numbers for layer in self.converted) / max(1, sum(layer.numbers for layer in self.layers))

    @property
    def flops_saved(self) -> float:
        """The share of the dense dX flops of all frozen linear weights that is saved."""
        saved = sum(layer.numbers * layer.flops_saved for layer in self.layers)
        return saved / max(1, sum(layer.numbers for layer in self.layers))

    def summary(self) -> str:
        """One line: how many layers on which path, and what their dX is computed in."""
        paths = ", ".join(f"{count} {path}" for path, count in Counter(layer.path for layer in self.layers).items())
        kinds = ", ".join(f"{count} in {dx}" for dx, count in Counter(map(self._kind, self.converted)).items())
        line = f"{len(self.layers)} linear layers: {paths} ({self.share_converted:.0%} of their weights converted)"
        if kinds:
            line += f"; dX: {kinds}"
        if self.exact_every is not None:
            line += f", exact in one forward of {self.exact_every}"
        return line + (f"; {self.flops_saved:.0%} of the dense dX flops saved" if self.flops_saved > 0 else "")

    def _kind(self, layer: LayerReport) -> str:
        """What its dX is in; of many ranks, as a pair gives, their range."""
        ranks = {each.rank for each in self.converted if each.rank is not None}
        if layer.rank is None or len(ranks) <= _MOST_RANKS:
            return layer.dx
        return layer.dx.replace(f"rank {layer.rank}", f"ranks {min(ranks)} to {max(ranks)}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "exact_every": self.exact_every,
            "share_converted": self.share_converted,
            "flops_saved": self.flops_saved,
            "summary": self.summary(),
        }

    def __str__(self) -> str:
        used = dict.fromkeys(layer.path for layer in self.layers)
        legend = "\n".join(f"{path}: {_PATHS[path]}" for path in used)
        table = Table(
            title=self.summary(), caption=legend, title_justify="left", caption_justify="left", pad_edge=False
        )
        for heading in ("layer", "N x K", "path", "dX in", "energy", "flops saved", "reason"):
            right = heading in ("N x K", "energy", "flops saved")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name,
                " x ".join(map(str, layer.shape)),
                layer.path,
                layer.dx,
                "-" if layer.energy is None else f"{layer.energy:.3f}",
                f"{layer.flops_saved:.0%}" if layer.flops_saved > 0 else "-",
                layer.reason,
            )
        return as_text(table)
