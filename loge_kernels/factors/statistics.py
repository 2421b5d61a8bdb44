"""What calibration gathers of each linear layer, and how it is kept on disk.

Per layer, with q the number of scored singular directions (0 unless salience is wanted), in float32:

    moment       of dY [M, N] where N ≤ K, of dX = dY W [M, K] where K < N: `SecondMoment`, at most 64 MiB whole
    importance   [N]      Σ_t dY_tn²
    scores       [3, q]   sums over samples of g_j, |g_j| and g_j², g_j = u_jᵀ (∂L/∂W) v_j = Σ_t (dY_t · u_j)(x_t · v_j)
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..collectives import Group
from ..files import DAMAGED, replacing
from .second_moment import SecondMoment

_FORMAT = "loge_kernels statistics 2"


@dataclass(slots=True)
class LayerStatistics:
    """One linear layer's; shapes in the module's docstring. `shape` is (N, K), `tokens` how many reached it."""

    shape: tuple[int, int]
    moment: SecondMoment
    importance: Tensor
    scores: Tensor | None = None
    tokens: int = 0

    @staticmethod
    def empty(shape: tuple[int, int], device: torch.device | str, scored: int = 0) -> LayerStatistics:
        """Statistics of no tokens, with room for `scored` singular directions."""
        N, K = shape
        scores = torch.zeros(3, scored, device=device) if scored else None
        return LayerStatistics(shape, SecondMoment(min(N, K), device), torch.zeros(N, device=device), scores=scores)

    @property
    def unseen(self) -> bool:
        """Whether no token reached the layer."""
        return self.tokens == 0

    @property
    def of_dx(self) -> bool:
        """Whether `moment` is that of dX = dY W, not of dY."""
        return self.shape[1] < self.shape[0]

    @property
    def nbytes(self) -> int:
        tensors = [self.moment.matrix, self.importance] + ([] if self.scores is None else [self.scores])
        return sum(t.nbytes for t in tensors)


@dataclass(slots=True)
class Statistics:
    """What `calibrate` gathered: `layers` by the names that `apply` reports, and how many batches and tokens it saw."""

    layers: dict[str, LayerStatistics]
    batches: int = 0
    tokens: int = 0

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def __str__(self) -> str:
        scored = "" if all(layer.scores is None for layer in self.layers.values()) else ", with gradient scores"
        size = f"{self.nbytes / 2**20:.0f} MiB"
        return f"{len(self.layers)} layers, {self.batches} batches, {self.tokens} tokens, {size}{scored}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to `path`, a safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        header = {}
        for name, layer in self.layers.items():
            header[name] = [*layer.shape, layer.moment.whole, layer.tokens]
            parts = {"moment": layer.moment.matrix, "importance": layer.importance}
            parts |= {} if layer.scores is None else {"scores": layer.scores}
            tensors |= {f"{name}|{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
        about = {"format": _FORMAT, "batches": self.batches, "tokens": self.tokens, "layers": header}
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"loge": json.dumps(about)})

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Statistics:
        """What `save` wrote, on `device`. Raises ValueError for a file that is none or is damaged."""
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {}).get("loge", "{}"))
                if about.get("format") != _FORMAT:
                    raise ValueError(f"its format is {about.get('format')!r}, not {_FORMAT!r}")
                names = set(file.keys())
                layers = {}
                for name, (N, K, whole, tokens) in about["layers"].items():
                    matrix = file.get_tensor(f"{name}|moment")
                    moment = SecondMoment(min(N, K), device, whole)
                    if moment.matrix.shape != matrix.shape:
                        raise ValueError(f"the moment of {name} has shape {tuple(matrix.shape)}")
                    moment.matrix = matrix
                    scores = file.get_tensor(f"{name}|scores") if f"{name}|scores" in names else None
                    importance = file.get_tensor(f"{name}|importance")
                    layers[name] = LayerStatistics((N, K), moment, importance, scores, tokens)
                return Statistics(layers, about["batches"], about["tokens"])
        except OSError:
            raise
        except DAMAGED as error:
            raise ValueError(f"{os.fspath(path)!r} holds no statistics of loge_kernels.calibrate: {error}") from error

    def check_batch(self, number: int) -> None:
        """Raise ValueError where the gradient of the batch of this number, the last one seen, was not finite."""
        for name, layer in self.layers.items():
            if not torch.isfinite(layer.importance).all():
                raise ValueError(f"the gradient of batch {number} at layer {name!r} contains NaN or inf")

    def check(self) -> None:
        """Raise ValueError where statistics are not finite."""
        for name, layer in self.layers.items():
            sums = [layer.moment.matrix, layer.importance] + ([] if layer.scores is None else [layer.scores])
            if not all(torch.isfinite(t).all() for t in sums):
                raise ValueError(f"the statistics of layer {name!r} contain NaN or inf: its gradient did")

    def sum_over_ranks(self, device: torch.device, group: Group = None) -> None:
        """Add up every rank's statistics, on every rank of `group` (None: the default one); `device` is one that its
        backend can send from."""
        import torch.distributed as dist

        def total(tensor: Tensor) -> Tensor:
            sent = tensor.to(device, copy=True)
            dist.all_reduce(sent, group=group)
            return sent.to(tensor.device)

        self.batches, self.tokens = total(torch.tensor([self.batches, self.tokens])).tolist()
        for layer in self.layers.values():
            layer.moment.matrix = total(layer.moment.matrix)
            layer.importance = total(layer.importance)
            layer.scores = None if layer.scores is None else total(layer.scores)
            layer.tokens = int(total(torch.tensor(layer.tokens)))
