"""The vectors of one adapter matrix: those in use, the candidates that wait, whose turn it is, and who is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .law import fill_


class Pool:
    """Of one matrix, seen as r vectors of some length: rows of A, or columns of B.

    candidates: [P, length]; what is written back is kept here.   held: of each slot, the candidate in use there.
    slot, candidate: where the round robin goes on.   frozen_until: of each slot, the step from which it is free.
    """

    def __init__(self, vectors: Tensor, size: int, slot: int, device: torch.device, start: tuple[float, int, str]):
        """`vectors`: [r, length], as in `exchange`.   size: P.   start: deviation, seed and name of the candidates."""
        r = vectors.shape[0]
        self._start = start
        self.candidates = torch.empty(size, vectors.shape[1], dtype=vectors.dtype, device=device)
        self._written = False
        self.held = list(range(r))
        self.slot = slot
        self.candidate = r % size
        self.frozen_until = [0] * r
        self._draw()

    def choose(self, count: int, step: int, other: Pool) -> list[tuple[int, int]]:
        """The next `count` slots, each with its new candidate, now taken: slots frozen here or in `other`, the matrix
        of the counterparts, are passed over. Fewer where fewer candidates wait."""
        r, size = len(self.held), len(self.candidates)
        count = min(count, size - r)  # as many as wait: no candidate is taken twice
        chosen: list[tuple[int, int]] = []
        for _ in range(r):
            if len(chosen) == count:
                break
            slot, self.slot = self.slot, (self.slot + 1) % r
            if max(self.frozen_until[slot], other.frozen_until[slot]) > step:
                continue
            while self.candidate in self.held:
                self.candidate = (self.candidate + 1) % size
            chosen.append((slot, self.candidate))
            self.candidate = (self.candidate + 1) % size
        return chosen

    def exchange(self, vectors: Tensor, chosen: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Write the vectors of the chosen slots back to their candidates and put the new ones in: in `vectors`
        [r, length], a view of the matrix. Returns the old and the new ones, [q, length] each."""
        if vectors.is_cuda and self.candidates.device.type == "cpu" and not self.candidates.is_pinned():
            self.candidates = self.candidates.pin_memory()  # here: the model may move before
        slots = torch.tensor([slot for slot, _ in chosen], device=vectors.device)
        old = vectors.index_select(0, slots)
        new = torch.empty_like(old)
        for i, (slot, candidate) in enumerate(chosen):
            # Row by row: a row of pinned memory is itself pinned, so nothing waits for the copies.
            new[i].copy_(self.candidates[candidate], non_blocking=True)
            self.candidates[self.held[slot]].copy_(old[i], non_blocking=True)
            self.held[slot] = candidate
        vectors.index_copy_(0, slots, new)
        self._written = True
        return old, new

    def freeze(self, slots: list[int], until: int) -> None:
        for slot in slots:
            self.frozen_until[slot] = until

    def frozen(self, step: int) -> list[int]:
        """The slots that get no gradient at this step."""
        return [slot for slot, until in enumerate(self.frozen_until) if until > step]

    def state_dict(self) -> dict[str, Any]:
        """Candidates only where some were written back: the others follow from the seed."""
        self._settle()
        return {
            "candidates": self.candidates if self._written else None,
            "size": len(self.candidates),
            "held": list(self.held),
            "slot": self.slot,
            "candidate": self.candidate,
            "frozen_until": list(self.frozen_until),
        }

    def why_not(self, state: dict[str, Any]) -> str | None:
        """Why `state` cannot be taken over, or None."""
        mine = len(self.held), len(self.candidates)
        given = len(state["held"]), state["size"]
        return None if given == mine else f"{given[0]} vectors of {given[1]} in the state, {mine[0]} of {mine[1]} here"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._settle()
        if state["candidates"] is not None:
            self.candidates.copy_(state["candidates"])
        elif self._written:
            self._draw()
        self._written = state["candidates"] is not None
        self.held = list(state["held"])
        self.slot, self.candidate = state["slot"], state["candidate"]
        self.frozen_until = list(state["frozen_until"])

    def _settle(self) -> None:
        """Wait for vectors that are on their way from a GPU."""
        if self._written and self.candidates.is_pinned():
            torch.cuda.synchronize()

    def _draw(self) -> None:
        fill_(self.candidates, *self._start)
