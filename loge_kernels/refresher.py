"""Subspaces that follow the gradient: now and then one step of training brings them up to date.

In the step that is watched, up to ROWS rows z of each layer's dY are kept. With Y = z W the rows of dX [q, K], scaled
to ‖Y‖² = 1, V [R, K] the directions in use and λ [R] the shares of E‖dX‖² along them, the running statistics are

    G = decay · Vᵀ diag(λ) V + (1 - decay) · Yᵀ Y            [K, K], never formed

and one step of subspace iteration from V, with its Rayleigh quotient, gives the new V and λ: V ← orth(V G). Nothing
else is kept from one refresh to the next. Flops of a layer: 2 q N K + 2 N K R and smaller ones, against the step's own
4 M N K forward and backward: with 512 rows, every 100 steps, well under 1 %. Memory: in the watched step up to 1024
rows of dY of each layer in its dtype (2048 N bytes in 16 bits: 8 MiB for N = 4096, 28 MiB for 14336); after it, of one
layer at a time, W, Y, V and the new factors in float32, 4 (N K + 1024 K + 3 R K + N R) bytes, 112 MiB for a 4096²
layer and R = 512; between refreshes the R shares alone, 8 R bytes.

Source: incremental PCA by orthogonal iteration; Mitliagkas, Caramanis and Jain, "Memory limited, streaming PCA",
NeurIPS 2013.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from .autocast import without_autocast
from .collectives import Group, mean_over_ranks
from .decompositions import one_thread
from .factors import projection
from .linear import LoGELinear
from .ops import in_cheap_backward
from .watching import Watcher

logger = logging.getLogger("loge_kernels")

ROWS = 512  # of dY, kept of each layer in a watched step
DECAY = 0.5


class Refresher:
    """Keeps the "gradient" factors of some layers up to date.

    `every`: an optimizer step in so many is watched, or None: those asked for by `watch`. `due` says whether the step
    under way is, `refreshes` how many there have been. `group`: the process group whose ranks train together, None for
    the default one.
    """

    def __init__(self, layers: Iterable[tuple[str, LoGELinear]], every: int | None, group: Group = None) -> None:
        self._group = group
        self._layers = [(name, weakref.ref(layer)) for name, layer in layers]
        # The same ones at every refresh, or a compiled model would be compiled anew for each.
        self._watchers = {name: _watcher(weakref.ref(self), name) for name, _ in self._layers}
        self.every = every
        self.due = False
        self.refreshes = 0
        self._rows: dict[str, list[Tensor]] = {}
        self._warned = False

    def prepare(self, step: int) -> None:
        """Before optimizer step `step` (from 0): watch it if it is its turn."""
        if self.every is not None and step % self.every == self.every - 1:
            self.watch()

    def watch(self) -> None:
        """Watch the step under way; after it the subspaces are brought up to date."""
        if self.due:
            return
        self.due = True
        for name, layer in self._named():
            layer.watcher = self._watchers[name]

    def finish_step(self) -> None:
        """After the optimizer step: new subspaces from the rows seen, if any."""
        if not self.due:
            return
        self.detach()
        if not self._rows and not self._warned:
            self._warned = True
            logger.warning(
                "a refresh saw no gradient (no backward pass since the last optimizer step?): the subspaces stay as "
                "they are"
            )
        self.refreshes += bool(self._rows)
        for name, layer in self._named():
            self._refresh(layer, self._rows.pop(name, None))
        self._rows.clear()

    def detach(self) -> None:
        """Stop watching."""
        self.due = False
        for _, layer in self._named():
            layer.watcher = None

    def state_dict(self) -> dict[str, Tensor]:
        """The directions in use and their shares, by layer."""
        state = {}
        for name, layer in self._named():
            assert layer.factors is not None
            state[f"{name}|right"] = layer.factors.right.detach().clone()
            state[f"{name}|shares"] = _shares(layer).clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError where it does not fit; nothing is changed then."""
        self.check_state(state)
        for name, layer in self._named():
            right, shares = state[f"{name}|right"], state[f"{name}|shares"]
            weight = layer.dense_weight()
            self._take(layer, weight, right.to(weight.device), shares.to(weight.device))

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError where `state` does not fit these layers."""
        for name, layer in self._named():
            assert layer.factors is not None
            right, shares = state.get(f"{name}|right"), state.get(f"{name}|shares")
            if right is None or shares is None or right.shape != layer.factors.right.shape:
                given = "nothing" if right is None else f"directions {tuple(right.shape)}"
                want = tuple(layer.factors.right.shape)
                raise ValueError(f"state has {given} of layer {name!r}, whose factors have {want}")

    def keep(self, name: str, dy: Tensor) -> None:
        """Some rows of a layer's dY, evenly spaced."""
        if in_cheap_backward():
            return  # the exact pass over the same graph follows
        rows = dy.detach().reshape(-1, dy.shape[-1])
        kept = self._rows.setdefault(name, [])
        kept.append(rows[:: max(1, -(-len(rows) // ROWS))].clone())
        if sum(map(len, kept)) > 2 * ROWS:
            kept[:] = [torch.cat(kept)[::2]]

    def _named(self) -> Iterable[tuple[str, LoGELinear]]:
        for name, reference in self._layers:
            layer = reference()
            if layer is not None:
                yield name, layer

    @torch.no_grad()
    def _refresh(self, layer: LoGELinear, rows: list[Tensor] | None) -> None:
        factors = layer.factors
        assert factors is not None
        weight = layer.dense_weight()
        V = factors.right.detach().float()  # [R, K]
        self._take(layer, weight, *_turned(weight, V, _shares(layer).to(V), rows, self._group))

    @staticmethod
    def _take(layer: LoGELinear, weight: Tensor, right: Tensor, shares: Tensor) -> None:
        assert layer.factors is not None
        fresh = projection(weight, right, layer.factors.method, shares.sum())
        layer.factors.become(fresh, weight)
        layer.factors.bind(layer.weight)  # which `weight` may have been dequantised from
        layer.factors.shares = shares.double()


@without_autocast
def _turned(
    weight: Tensor, V: Tensor, shares: Tensor, rows: list[Tensor] | None, group: Group
) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration: the directions [R, K] and shares [R] that follow V and `shares`, for a weight
    [N, K] and rows of dY [., N]."""
    Y = torch.cat(rows).float() @ weight.float() if rows else V.new_zeros(1, V.shape[1])  # [q, K]
    norm = torch.linalg.matrix_norm(Y)
    # A layer without a gradient, or with a broken one, keeps what it has. On the device: nothing waits for it.
    usable = torch.isfinite(norm) & (norm > 0)
    Y = torch.where(usable, Y / norm, 0.0)

    def mean(tensor: Tensor) -> Tensor:
        return mean_over_ranks([tensor], group)[0]

    def times_g(U: Tensor) -> Tensor:  # U G for rows U [., K]
        before, seen = (U @ V.t()) * shares @ V, (U @ Y.t()) @ Y
        return mean(DECAY * before + (1.0 - DECAY) * seen)

    with one_thread():
        basis = torch.linalg.qr(times_g(V).t()).Q.t()  # [R, K]
        quotient = times_g(basis) @ basis.t()
        values, vectors = torch.linalg.eigh((quotient + quotient.t()) / 2)
    new = vectors.t().flip(0) @ basis
    usable = mean(usable.float()) > 0
    shares = torch.where(usable, values.flip(0).clamp_min(0), shares)
    return torch.where(usable, new, V), shares


def _shares(layer: LoGELinear) -> Tensor:
    factors = layer.factors
    assert factors is not None
    if factors.shares is not None:
        return factors.shares
    return torch.full((factors.rank,), factors.energy / max(1, factors.rank), dtype=torch.float64)


def _watcher(refresher: weakref.ref[Refresher], name: str) -> Watcher:
    """What sends a layer's dY to a refresher, without keeping it alive."""

    def keep(dy: Tensor) -> None:
        receiver = refresher()
        if receiver is not None:
            receiver.keep(name, dy)

    return Watcher(keep)
