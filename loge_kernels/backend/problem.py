"""The values that travel between the op and a backend: operands in, a backward problem, its gradients out.

Names are those of `naive.py` and of the kernels: M tokens, N out features, K in features, R factor rank, P adapter
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..numerics.eight_bit import from_bits
from ..numerics.exact_dtypes import weight_copy
from ..numerics.rotation import block_of

# What the frozen path's part of dX is: dY · left · right; the same with dense rows among them; dY · W; and that in
# 8 bits or 4.
Kind = Literal["low-rank", "mixed", "dense", "dense, rounded"]


class Need(NamedTuple):
    """Which gradients are wanted, in the order in which backward gives them."""

    dx: bool
    dweight: bool
    dbias: bool
    dA: bool
    dB: bool


class Operands(NamedTuple):
    """What one call of the op is given. The operators' schemas, what is saved for backward and the order of the
    gradients follow from these fields; nothing else writes their order down.

    Tensors first. 8-bit tensors travel as uint8 (`eight_bit.as_bits`). What a step does not need is None.
    """

    x: Tensor | None  # [M, K]
    weight: Tensor | None  # [N, K]
    left: Tensor | None = None  # [N, R]
    right: Tensor | None = None  # [R, K]
    rows: Tensor | None = None  # int64 [Q]
    residual: Tensor | None = None  # [Q, K]
    dense: Tensor | None = None  # [N, K] in 8 bits, or in 4, [N / 2, K]
    dense_scale: Tensor | None = None  # float32 [K]; of 4 bits the blocks' in uint8 (`four_bit.FourBitWeight`)
    dense_whole: Tensor | None = None  # float32 [], of nvfp4
    weight_scale: Tensor | None = None  # float32 [N, 1], of dense where that is the weight, which has no other form
    left_scale: Tensor | None = None  # float32 [R]
    right_scale: Tensor | None = None  # float32 [K]
    spare: Tensor | None = None  # [N, K], the weight that backward has where FSDP has not gathered what stands for it
    bias: Tensor | None = None  # [N]
    lora_A: Tensor | None = None  # [P, K]
    lora_B: Tensor | None = None  # [N, P]
    seed: Tensor | None = None  # int64 [2]
    x_bits: Tensor | None = None  # [M, K], x in 8 bits, for a forward in them
    x_scale: Tensor | None = None  # float32 [M, 1]
    scaling: float = 1.0
    dropout: float = 0.0
    exact_fraction: float = 0.0
    backend: str = "auto"
    quantize: str = ""  # of `EXACT_DTYPES`: dense is made of the weight in it, where backward has that

    @property
    def kind(self) -> Kind:
        """What the frozen path's part of dX is."""
        return kind_of(self.left, self.dense, self.exact_fraction)

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K)."""
        weight = self.dense if self.weight is None else self.weight
        assert weight is not None
        return weight.shape[0], weight.shape[1]

    def with_dense_copy(self) -> Operands:
        """These with `dense` made of the weight, where `quantize` asks for it."""
        if not self.quantize or self.weight is None:
            return self
        return self._replace(weight=None, **weight_copy(self.quantize).operands(self.weight))

    def gathered(self, dtype: torch.dtype) -> Operands:
        """These, or the weight in `dtype` alone where FSDP has gathered it in the place of what stands for it."""
        if not any(map(_is_freed, (self.left, self.dense))):
            return self
        changed: dict[str, Any] = _NO_FROZEN_PATH | {"exact_fraction": 0.0}
        if self.spare is not None and self.weight_scale is not None:
            changed |= {"dense": self.spare, "weight_scale": self.weight_scale}
        elif self.spare is not None:
            changed["weight"] = self.spare.to(dtype)
        return self._replace(**changed)

    @property
    def stand_ins(self) -> tuple[Tensor | None, ...]:
        """The tensors that stand for the weight in dX, which the layer owns."""
        return _stand_ins(self)

    def kept(self, need: Need) -> Operands:
        """What backward reads and nothing else: x where a gradient needs it, never a frozen weight that factors or a
        copy stand for."""
        dropped = dict(_FORWARD_ONLY)  # for a single `_replace`, which costs 2 us
        if not (need.dweight or need.dA):
            dropped["x"] = None
        if not (need.dx or need.dA):
            dropped["lora_A"] = None
            if not need.dB:
                dropped["lora_B"] = None
        if not need.dx:
            dropped |= _NO_FROZEN_PATH
        elif self.kind == "low-rank":
            dropped |= _NO_DENSE
            if self.spare is not None:
                dropped["weight_scale"] = self.weight_scale
        elif self.dense is not None:
            dropped["weight"] = None
        return self._replace(**dropped)

    def wanted(self) -> Need:
        """The gradients wanted of the op, from a truth value for each operand, as autograd has them."""
        return Need(*map(bool, (self.x, self.weight, self.bias, self.lora_A, self.lora_B)))


_DENSE = ("dense", "dense_scale", "dense_whole", "weight_scale")
STAND_INS = ("left", "right", "rows", "residual", *_DENSE, "left_scale", "right_scale")
_stand_ins = attrgetter(*STAND_INS)
_NO_FROZEN_PATH: dict[str, Any] = dict.fromkeys(("weight", "spare", *STAND_INS))
_NO_DENSE: dict[str, Any] = dict.fromkeys(("weight", *_DENSE))
_FORWARD_ONLY: dict[str, Any] = dict.fromkeys(("bias", "x_bits", "x_scale"))
# One tuple of None for every operand: `_replace` gives those that have a gradient.
NO_GRADIENTS = Operands(*(None,) * len(Operands._fields))  # type: ignore[arg-type]


def _is_freed(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def kind_of(left: Tensor | None, dense: Tensor | None, exact_fraction: float) -> Kind:
    """The kind of a frozen path. Factors are not given at all to a step that is exact."""
    if left is None:
        return "dense" if dense is None else "dense, rounded"
    return "mixed" if exact_fraction > 0.0 else "low-rank"


def in_four_bits(dense_scale: Tensor | None) -> bool:
    """Whether a copy of the weight with these scales is in 4 bits."""
    return dense_scale is not None and dense_scale.dtype == torch.uint8


@dataclass(slots=True)  # not frozen: one is made at every call, and freezing costs 3 us of it
class BackwardProblem:
    """Everything a backend needs for one backward pass of `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`.

    All tensors are 2-D (biases, scales and indices excepted) on one device, with any strides. `dy`, `x`, `xa`,
    `weight`, `left`, `right` and `residual` share one dtype; `lora_A` and `lora_B` have that dtype or float32, and
    their gradients come back in theirs. `left` and `right` are both in 8 bits where they have scales. A tensor that
    the needed gradients do not read may be None.
    """

    dy: Tensor  # [M, N]
    x: Tensor | None  # [M, K]
    xa: Tensor | None  # [M, P], x Aᵀ as the forward left it (after dropout)
    weight: Tensor | None  # [N, K], only for the exact products, and not where dense stands for it
    left: Tensor | None  # [N, R]; None: the frozen path is the dense product with weight
    right: Tensor | None  # [R, K]
    lora_A: Tensor | None  # [P, K]
    lora_B: Tensor | None  # [N, P]
    scaling: float
    dropout: float  # probability of the adapter's input dropout; 0: none
    seed: Tensor | None  # int64 [2] (seed, offset) on dy's device; with dropout only
    exact_fraction: float  # share of the rows, heaviest first, whose frozen path is dense
    need_dx: bool
    need_dweight: bool
    need_dbias: bool
    need_dA: bool
    need_dB: bool
    deterministic: bool  # no atomics: the same bits from run to run
    rows: Tensor | None = None  # int64 [Q], unique: rows of the weight that the factors' residual corrects
    residual: Tensor | None = None  # [Q, K]; `choice.run_backward` adds its part to every backend's dX
    dense: Tensor | None = None  # [N, K] in 8 bits, or uint8 [N / 2, K]: the weight's copy for the exact products
    dense_scale: Tensor | None = None  # float32 [K], with dense; uint8, with dense in 4 bits
    dense_whole: Tensor | None = None  # float32 [], with dense in nvfp4
    weight_scale: Tensor | None = None  # float32 [N, 1], in its place where dense is the weight itself
    left_scale: Tensor | None = None  # float32 [R], with left in 8 bits
    right_scale: Tensor | None = None  # float32 [K], with right in 8 bits

    @classmethod
    def of(cls, dy: Tensor, xa: Tensor | None, need: Need, operands: Operands) -> BackwardProblem:
        """The problem of dY [M, N] and xa [M, P] for what `Operands.kept` kept."""
        o = operands
        left, right, dense = o.left, o.right, o.dense
        if o.left_scale is not None and left is not None and right is not None:
            left, right = from_bits(left), from_bits(right)
        return cls(
            dy,
            o.x,
            xa,
            o.weight,
            left,
            right,
            o.lora_A,
            o.lora_B,
            o.scaling,
            o.dropout,
            o.seed,
            o.exact_fraction,
            need.dx,
            need.dweight,
            need.dbias,
            need.dA,
            need.dB,
            torch.are_deterministic_algorithms_enabled(),
            rows=o.rows,
            residual=o.residual,
            dense=dense if dense is None or in_four_bits(o.dense_scale) else from_bits(dense),
            dense_scale=o.dense_scale,
            dense_whole=o.dense_whole,
            weight_scale=o.weight_scale,
            left_scale=o.left_scale,
            right_scale=o.right_scale,
        )

    @property
    def kind(self) -> Kind:
        """What the frozen path's part of dX is."""
        return kind_of(self.left, self.dense, self.exact_fraction)

    @property
    def rotation(self) -> int:
        """Of dense: in blocks of how many columns it is rotated; 1: it is not."""
        if self.weight_scale is None or self.dense is None:
            return 1
        return block_of(self.dense.dtype, self.dense.shape[1])

    @property
    def in_four_bits(self) -> bool:
        """Whether dense is."""
        return in_four_bits(self.dense_scale)


@dataclass(slots=True)
class Gradients:
    """What a backend returns; None where the problem did not ask."""

    dx: Tensor | None = None  # [M, K]
    dweight: Tensor | None = None  # [N, K]
    dbias: Tensor | None = None  # [N]
    dA: Tensor | None = None  # [P, K]
    dB: Tensor | None = None  # [N, P]


class Prepared(NamedTuple):
    """What a kernel made of one read of dY for an exact backward pass; `reference.backward` does the rest."""

    T_P: Tensor | None = None  # [M, P] in dY's dtype: s · dY B
    dB: Tensor | None = None  # [N, P]
    dbias: Tensor | None = None  # [N]
    q: Tensor | None = None  # [M, N], dY in 8 bits
    scale: Tensor | None = None  # float32 [M, 1], of its rows
