"""`LoGELinear`: `torch.nn.Linear` with a low-rank activation gradient and, on request, a LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backends import check_name
from .cache import cached_factors
from .eight_bit import EightBitWeight, why_not
from .exact_every import ExactEvery
from .factors import Factors
from .ops import linear

_ADDED = (
    "factors",
    "eight_bit",
    "lora_A",
    "lora_B",
    "scaling",
    "lora_dropout",
    "exact_fraction",
    "exact_every",
    "backend",
    "gather",
    "shard_sums",
)


class LoGELinear(nn.Linear):
    """A drop-in `torch.nn.Linear`: the same forward and state dict, a cheaper backward.

    `factors` stands for the weight in the activation gradient (None: the exact dense product). They follow a frozen
    weight: when it has changed under them (a loaded state dict, a merged adapter), the next training forward computes
    them anew. For a trainable weight, which changes at every step, the layer warns once; call `refresh()` when they
    should follow. `exact_dtype` ("float8", "int8" or None) is what the frozen path's dense products run in; the 8-bit
    copy of the weight is made at its first use, and anew whenever the weight has changed. `exact_every`, shared by the
    layers of a model, says in which training forwards the factors are not used.

    `LoGELinear(in_features, out_features)` alone is an exact layer without adapter; `from_linear` makes one from a
    pre-trained layer.
    """

    factors: Factors | None
    eight_bit: EightBitWeight | None
    exact_every: ExactEvery | None
    _converted: bool
    _was_frozen: bool  # the weight, when `apply` came
    gather: Callable[[], None] | None  # brings a sharded weight that a checkpoint reads in backward
    shard_sums: Tensor | None  # of this rank's part of a weight that `fully_shard` sharded
    lora_A: nn.Parameter | None  # [P, K]
    lora_B: nn.Parameter | None  # [N, P]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adopt(None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int | float | None = 256,
        lora_rank: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        exact_fraction: float = 0.0,
        backend: str | None = None,
        exact_dtype: str | None = None,
    ) -> LoGELinear:
        """A layer that shares the storage of `linear`'s weight and bias, both frozen, with factors and an adapter.

        Args:
            linear: the pre-trained layer [N, K]; left as it is.
            rank: the factors' rank (an int up to min(N, K), or a share in (0, 1]); None for the exact gradient.
            lora_rank: the adapter's rank P; 0 for no adapter.
            lora_alpha: the adapter is scaled by lora_alpha / lora_rank.
            lora_dropout, exact_fraction, backend, exact_dtype: as in `loge_kernels.linear`.

        Raises:
            ValueError, TypeError: with the argument, its value and what would work.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected a torch.nn.Linear")
        if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank!r}; give an int, 0 for no adapter")
        factors = None if rank is None else cached_factors(linear.weight, rank)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        layer._adopt(None if factors is None else factors.bind(layer.weight), exact_fraction, backend, exact_dtype)
        layer.lora_dropout = _probability("lora_dropout", lora_dropout)
        if lora_rank > 0:
            layer._add_adapter(lora_rank, lora_alpha)
        layer.train(linear.training)
        return layer

    def _adopt(
        self,
        factors: Factors | None,
        exact_fraction: float = 0.0,
        backend: str | None = None,
        exact_dtype: str | None = None,
    ) -> None:
        """The attributes that this class has beyond `nn.Linear`, without an adapter."""
        self.factors = factors
        self.eight_bit = None
        self.exact_dtype = exact_dtype
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling = 1.0
        self.lora_dropout = 0.0
        self.exact_fraction = _share("exact_fraction", exact_fraction)
        self.exact_every = None
        self.backend = None if backend is None else check_name(backend, "backend")
        self.gather = None
        self.shard_sums = None

    def _add_adapter(self, lora_rank: int, lora_alpha: float) -> None:
        # As PEFT does: float32 adapters over a 16-bit base, A uniform (Kaiming), B zero.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        options: dict[str, Any] = {"dtype": dtype, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(lora_rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, lora_rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = lora_alpha / lora_rank

    @classmethod
    def convert_(
        cls,
        linear: nn.Linear,
        factors: Factors | None,
        exact_fraction: float = 0.0,
        backend: str | None = None,
        exact_dtype: str | None = None,
    ) -> None:
        """Make a plain `nn.Linear` one of these, in place: same object, same parameters, hooks and names."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._adopt(factors, exact_fraction, backend, exact_dtype)
        linear._converted = True
        linear._was_frozen = not linear.weight.requires_grad

    def revert_(self) -> None:
        """Undo `convert_`."""
        for name in (*_ADDED, "_converted", "_was_frozen"):
            delattr(self, name)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def converted(self) -> bool:
        """Whether this layer was an `nn.Linear` before `convert_`."""
        return getattr(self, "_converted", False)

    @property
    def exact_dtype(self) -> str | None:
        """What the frozen path's dense products run in: "float8", "int8", or None for the weight's own dtype."""
        return None if self.eight_bit is None else self.eight_bit.dtype

    @exact_dtype.setter
    def exact_dtype(self, name: str | None) -> None:
        if name != self.exact_dtype:
            self.eight_bit = None if name is None else EightBitWeight(name)

    def invalidate(self) -> None:
        """Declare the weight changed in a way that torch does not count (through `.data`)."""
        if self.factors is not None:
            self.factors.made_of.invalidate()
        if self.eight_bit is not None:
            self.eight_bit.invalidate()

    def reads_weight(self) -> bool:
        """Whether the backward of the forward under way reads the dense weight."""
        if self.factors is None or self.exact_fraction > 0.0 or self._thawed():
            return True
        return self.exact_every is not None and self.exact_every.is_exact()

    def _thawed(self) -> bool:
        """Whether the weight was frozen when `apply` came and trains now, as in a copy that PEFT makes for
        `modules_to_save`: its factors could not follow."""
        # Under FSDP1 it is no parameter but a view of a flat one, which trains wherever one of its parts does.
        trains = self.weight.requires_grad and isinstance(self.weight, nn.Parameter)
        return trains and getattr(self, "_was_frozen", False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoGELinear:
        super()._apply(fn, recurse)
        if self.factors is not None:
            self.factors.apply_(fn)
        if self.eight_bit is not None:
            self.eight_bit.invalidate()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a copy or a pickle, whose factors came with its weight: a change before its first forward is to be seen.
        if self.factors is not None and not (self.factors.made_of.bound or self.factors.made_of.invalid):
            self.factors.bind(self.weight)

    def prepare(self) -> None:
        """Make the 8-bit copy of the weight, if there is to be one: a compiled graph cannot keep what it makes."""
        copy = self.eight_bit
        if copy is not None and why_not(copy.dtype, self.weight.device, *self.weight.shape) is None:
            copy.current(self.weight)

    def dense_weight(self) -> Tensor:
        """The weight [N, K] in a floating dtype."""
        return self.weight

    def refresh(self) -> None:
        """Recompute the factors, if any, from the weight as it is now."""
        if self.eight_bit is not None:
            self.eight_bit.invalidate()
        if self.factors is not None:
            weight = self.dense_weight()
            if self.factors.method == "svd":
                self.factors.become(cached_factors(weight, self.factors.rank), weight)
            else:
                self.factors.refresh(weight)
            self.factors.bind(self.weight)  # which `weight` was made from

    def current_factors(self) -> Factors | None:
        """The factors that this forward's backward uses, made anew first when a frozen weight has changed under them;
        None for an exact one."""
        factors = self.factors
        if self.gather is not None and hasattr(self.weight, "placements"):
            self.gather()
        if factors is None or self.exact_fraction == 1.0 or self._thawed():
            return None
        if self.exact_every is not None and self.exact_every.is_exact():
            return None
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return factors
        if torch._C._are_functorch_transforms_active():
            return factors  # the op refuses them
        if hasattr(self.weight, "ds_id"):
            raise ValueError(
                f"the weight of this {tuple(factors.left.shape[:1] + factors.right.shape[1:])} layer with factors is "
                "partitioned by DeepSpeed ZeRO-3, whose backward gathers whole weights: use ZeRO stage 1 or 2, or "
                "loge_kernels.fully_shard"
            )
        made_of = factors.made_of
        if not made_of.changed(self.weight):
            if not made_of.bound:
                factors.bind(self.weight)
        elif self.sharded:
            self._follow_shards(factors)
        elif factors.follows_from_weight and (not self.weight.requires_grad or made_of.is_other(self.weight)):
            self.refresh()
        if factors.left.device != self.weight.device:  # FSDP moves parameters by itself
            factors.apply_(lambda tensor: tensor.to(self.weight.device))
        return factors

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds this layer's parameters, or a tensor-parallel plan its weight."""
        managed = getattr(self, "_is_fsdp_managed_module", False)  # torch's mark, of FSDP1 and FSDP2
        return managed or hasattr(self._parameters.get("weight"), "placements")

    def _follow_shards(self, factors: Factors) -> None:
        """Take the weight as FSDP gathered it for the one that the factors are of; ValueError where it is another."""
        if hasattr(self.weight, "placements"):
            raise ValueError(
                f"the weight {tuple(self.weight.shape)} of this layer is a DTensor with placements "
                f"{self.weight.placements}: FSDP gathers weights in the forward of the modules that it shards, and "
                "tensor parallelism is not supported"
            )
        if not isinstance(self.weight, nn.Parameter):
            raise ValueError(
                "a layer with factors is inside a FullyShardedDataParallel (FSDP1), which flattens its parameters: "
                "use loge_kernels.fully_shard (FSDP2)"
            )
        if factors.made_of.invalid:
            raise ValueError(
                "the weight of a layer has changed since it was sharded, and its factors cannot follow: load or merge "
                "weights before the model is sharded"
            )
        factors.bind(self.weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if hasattr(param, "placements") and not self.sharded and getattr(self, "factors", None) is not None:
            # As torch's ColwiseParallel and RowwiseParallel do. FSDP puts its DTensors in by another way.
            raise ValueError(
                "a layer with factors cannot be split by a tensor-parallel plan: leave it out of the plan, or shard "
                "the model by loge_kernels.fully_shard"
            )
        super().register_parameter(name, param)

    def note_shard(self) -> None:
        """Remember what this rank's part of a sharded weight holds: a later load of other values is then seen, also one
        into the tensors of `state_dict()`, as distributed checkpoints do it."""
        self.shard_sums = _sums(self.weight) if self.sharded and self.factors is not None else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        if self.shard_sums is None:
            self.note_shard()  # sharded by torch's own `fully_shard`
        before = self.shard_sums
        parent._load_from_state_dict(*args, **kwargs)
        if before is not None and not torch.equal(before, _sums(self.weight)):
            self.invalidate()

    def forward(self, input: Tensor) -> Tensor:
        dropout = self.lora_dropout if self.training else 0.0
        return self.run(input, self.lora_A, self.lora_B, self.scaling, dropout)

    def run(
        self, input: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        """The forward with this adapter in the place of the layer's own; arguments as in `loge_kernels.linear`."""
        factors = self.current_factors()  # before the weight is read, which it may gather
        return linear(
            input,
            self.weight,
            factors,
            bias=self.bias,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            dropout=dropout,
            exact_fraction=self.exact_fraction,
            backend=self.backend,
            exact_dtype=self.eight_bit,
        )

    def why_not_adapter(self, dtype: torch.dtype, input: Tensor | None = None) -> str | None:
        """Why an adapter in `dtype` cannot be given to `run`, with this input or ever (None), or None when it can."""
        if dtype in (self.weight.dtype, torch.float32):
            return None
        return f"adapter is {dtype} over a {self.weight.dtype} base"

    def extra_repr(self) -> str:
        adapter = "" if self.lora_A is None else f", lora_rank={self.lora_A.shape[0]}, scaling={self.scaling:g}"
        factors = "" if self.factors is None else f", {self.factors}"
        return super().extra_repr() + adapter + factors


def _sums(weight: Any) -> Tensor:
    """Two sums over this rank's part of a weight, which tell it from another: float64 [2]."""
    mine = (weight.to_local() if hasattr(weight, "to_local") else weight).detach().double().flatten()
    return torch.stack([mine.sum(), mine @ torch.arange(1, mine.numel() + 1, dtype=mine.dtype, device=mine.device)])


def _probability(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is not a probability in [0, 1)")
    return float(value)


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} is not a share of the rows in [0, 1]")
    return float(value)
