"""`FreezePlan`: how many layers to freeze, the trace and gains that say so, as a table and as a picture."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..terminal import as_text


@dataclass(frozen=True, slots=True)
class FreezePlan:
    """The boundary that `plan_freezing` found. `str()` gives a table, `to_dict()` plain data, `plot()` a PNG.

    deviation, gain: how they were taken.   tokens: how many labels the trace is a mean over.
    trace: of N + 1 latent spaces, the embedding's output first.   gains: of the N layers.
    boundary: layers to freeze, the one of the largest gain and all before it.
    """

    deviation: str
    gain: str
    tokens: int
    trace: tuple[float, ...]
    gains: tuple[float, ...]
    boundary: int

    @property
    def layers(self) -> int:
        return len(self.gains)

    @property
    def share(self) -> float:
        """The frozen share f of the layers."""
        return self.boundary / self.layers

    @property
    def predicted_time(self) -> float:
        """Time of a LoRA training step over that without freezing, 1 − f/2: with frozen weights the backward of a layer
        takes what its forward takes. The head and attention, whose backward takes more, are left out."""
        return 1.0 - self.share / 2.0

    def summary(self) -> str:
        """One line: the boundary and the predicted saving."""
        return (
            f"freeze the embedding and {self.boundary} of {self.layers} layers: a LoRA step is predicted to take "
            f"{self.predicted_time:.0%} of its time, {1 / self.predicted_time:.2f}x as fast; deviation "
            f"{self.deviation}, gain {self.gain}, {self.tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": self.layers, "predicted_time": self.predicted_time}

    def __str__(self) -> str:
        table = Table(pad_edge=False)
        for heading in ("layer", "deviation", "gain", ""):
            table.add_column(heading, justify="left" if heading == "" else "right")
        table.add_row("embedding", f"{self.trace[0]:.4f}", "", "frozen")
        for number, (deviation, gain) in enumerate(zip(self.trace[1:], self.gains, strict=True), 1):
            state = "trains" if number > self.boundary else "frozen"
            if number == self.boundary:
                state += ", the largest gain"
            table.add_row(str(number), f"{deviation:.4f}", f"{gain:+.4f}", state)
        return f"{self.summary()}\n{as_text(table)}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Trace and gains by depth, the frozen part shaded. PNG; needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(1, 2)
        above.plot(range(self.layers + 1), self.trace, marker=".", color="C0")
        above.set(ylabel=f"deviation: {self.deviation}", title="how far each latent space is from the labels")
        colours = ["C1" if number == self.boundary else "C0" for number in range(1, self.layers + 1)]
        below.bar(range(1, self.layers + 1), self.gains, color=colours)
        below.set(ylabel=f"gain: {self.gain}", title="what each layer gains")
        for axes in (above, below):
            axes.axvspan(-0.5, self.boundary + 0.5, color="grey", alpha=0.15, label="frozen")
            axes.set(xlabel="layer (0: the embedding)", xlim=(-0.5, self.layers + 0.5))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")
        figure.suptitle(self.summary(), fontsize="small")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
