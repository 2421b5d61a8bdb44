"""`LoGELinear`: `torch.nn.Linear` with a low-rank activation gradient and, on request, a LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.choice import check_name, requested
from ..factors.cache import cached_factors
from ..factors.factors import Factors
from ..numerics.exact_dtypes import weight_copy, why_not
from ..op.arguments import probability, share
from ..op.linear import linear, waits_for_host
from .exact_every import ExactEvery
from .sharded import ShardedLinear


class LoGELinear(ShardedLinear):
    """A drop-in `torch.nn.Linear`: the same forward and state dict, a cheaper backward.

    `factors` stands for the weight in the activation gradient (None: the exact dense product). They follow a frozen
    weight: when it has changed under them (a loaded state dict, a merged adapter), the next training forward computes
    them anew. For a trainable weight, which changes at every step, the layer warns once; call `refresh()` when they
    should follow. `exact_dtype` ("float8", "int8" or None; "nvfp4" and "mxfp4" are experimental) is what the frozen
    path's dense products run in; the copy of the weight in it is made at its first use, and anew whenever the weight
    has changed. `exact_every`, shared by the layers of a model, says in which training forwards the factors are not
    used.

    `LoGELinear(in_features, out_features)` alone is an exact layer without adapter; `from_linear` makes one from a
    pre-trained layer.
    """

    chosen_by_auto: bool  # whether exact_dtype is "auto"'s choice
    exact_every: ExactEvery | None
    _added: tuple[str, ...]  # the attributes that `convert_` gave it
    _was_frozen: bool  # the weight, when `apply` came
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
        shape, own = tuple(linear.weight.shape), (linear.out_features, linear.in_features)
        if shape != own or not linear.weight.is_floating_point():
            raise TypeError(
                f"linear is a {type(linear).__name__} whose weight is {shape} in {linear.weight.dtype}, not {own} in a "
                "floating-point dtype; layers that a library quantised are converted by loge_kernels.apply(model)"
            )
        if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank!r}; give an int, 0 for no adapter")
        factors = None if rank is None else cached_factors(linear.weight, rank)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        layer._adopt(None if factors is None else factors.bind(layer.weight), exact_fraction, backend, exact_dtype)
        layer.lora_dropout = probability("lora_dropout", lora_dropout)
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
        self.chosen_by_auto = False
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling = 1.0
        self.lora_dropout = 0.0
        self.exact_fraction = share("exact_fraction", exact_fraction)
        self.exact_every = None
        self.backend = None if backend is None else check_name(backend, "backend")
        self.gather = None
        self.path = ""
        self.recomputed = False
        self.shard_sums = None
        self.handed_out = False
        self.holds_adapter = False

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
        before = set(vars(linear))
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._adopt(factors, exact_fraction, backend, exact_dtype)
        linear._was_frozen = not linear.weight.requires_grad
        linear._added = (*(set(vars(linear)) - before), "lora_A", "lora_B", "_added")

    def revert_(self) -> None:
        """Undo `convert_`."""
        for name in self._added:
            delattr(self, name)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def converted(self) -> bool:
        """Whether this layer was an `nn.Linear` before `convert_`."""
        return hasattr(self, "_added")

    @property
    def exact_dtype(self) -> str | None:
        """What the frozen path's dense products run in: one of `EXACT_DTYPES`, or None for the weight's own dtype."""
        return None if self.eight_bit is None else self.eight_bit.dtype

    @exact_dtype.setter
    def exact_dtype(self, name: str | None) -> None:
        if name != self.exact_dtype:
            self.eight_bit = None if name is None else weight_copy(name)

    @property
    def base_dtype(self) -> str | None:
        """What the weight is kept in, alone: "float8", "int8", or None for its own dtype."""
        return None

    @property
    def row_scale(self) -> Tensor | None:
        """The row scales of a weight that is kept in 8 bits alone."""
        return None

    @contextmanager
    def edited(self) -> Iterator[None]:
        """A block in which others write `weight` as a floating one, through `.data`, which torch does not count."""
        try:
            yield
        finally:
            self.invalidate()

    def invalidate(self) -> None:
        """Declare the weight changed in a way that torch does not count (through `.data`)."""
        if self.factors is not None:
            self.factors.made_of.invalidate()
        if self.eight_bit is not None:
            self.eight_bit.invalidate()

    def reads_dense(self) -> bool:
        """Whether the backward of the forward under way takes the dense product: with the weight or its 8-bit copy."""
        return self.exact_fraction > 0.0 or not self.reads_factors()

    def reads_factors(self) -> bool:
        """Whether it reads the factors. It does not where a checkpoint has the sharded weight gathered anyway."""
        if self.factors is None or self.recomputed or self.exact_fraction == 1.0 or self._thawed():
            return False
        if torch.compiler.is_compiling() and self.factors.made_of.invalid:
            return False  # a graph cannot make them anew
        return self.exact_every is None or not self.exact_every.is_exact()

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
            self.eight_bit.moved()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a copy or a pickle, whose factors came with its weight: a change before its first forward is to be seen.
        if self.factors is not None and not (self.factors.made_of.bound or self.factors.made_of.invalid):
            self.factors.bind(self.weight)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # A compiled graph would not see that its copy or factors are of another weight.
        if self.sharded or self.weight.is_meta:
            return
        self.prepare()
        if self.factors is not None and self.factors.made_of.changed(self.weight):
            self.factors.made_of.invalidate()

    def prepare(self) -> None:
        """Make the copy of the weight, if there is to be one: a compiled graph cannot keep what it makes."""
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
                self.factors.take_values(cached_factors(weight, self.factors.rank), weight)
            else:
                self.factors.refresh(weight)
            self.factors.bind(self.weight)  # which `weight` was made from

    def current_factors(self) -> Factors | None:
        """The factors that this forward's backward uses, made anew first when a frozen weight has changed under them;
        None for an exact one."""
        factors = self.factors
        self.gather_weight()
        if factors is None or not self.reads_factors():
            return None
        if torch.compiler.is_compiling():
            return factors
        if not torch.is_grad_enabled():
            return None if factors.without_values else factors
        if torch._C._are_functorch_transforms_active():
            return factors  # the op refuses them
        self.refuse_partitioned()
        made_of = factors.made_of
        if factors.without_values and not self.weight.is_meta:
            self.give_values(factors)
        if not made_of.changed(self.weight):
            if not made_of.bound:
                factors.bind(self.weight)
        elif self.sharded:
            self.follow_shards(factors)
        elif factors.follows_from_weight and (not self.weight.requires_grad or made_of.is_other(self.weight)):
            self.refresh()
        if factors.left.device != self.weight.device:  # FSDP moves parameters by itself
            factors.apply_(lambda tensor: tensor.to(self.weight.device))
        return factors

    def forward(self, input: Tensor) -> Tensor:
        dropout = self.lora_dropout if self.training else 0.0
        return self.run(input, self.lora_A, self.lora_B, self.scaling, dropout)

    def run(
        self, input: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        """The forward with this adapter in the place of the layer's own; arguments as in `loge_kernels.linear`."""
        factors = self.current_factors()  # before the weight is read, which it may gather
        copy = self.eight_bit
        if copy is not None and self.chosen_by_auto and not copy.gathered_apart:
            # 8 bits are chosen by the weight's shape, for many tokens.
            copy = None if waits_for_host(input, self.weight, requested(self.backend)) else copy
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
            exact_dtype=copy,
            weight_scale=self.row_scale,
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
