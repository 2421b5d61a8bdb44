"""What a layer with factors does where an engine holds its weight: FSDP2 works, others are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..factors.factors import Factors
from ..numerics.eight_bit import EightBitWeight

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ShardedLinear(nn.Linear):
    """The part of `LoGELinear` that is about engines."""

    eight_bit: EightBitWeight | None
    factors: Factors | None
    gather: Callable[[], None] | None  # brings a weight that `fully_shard` sharded and a checkpoint reads in backward
    path: str  # in the model that was applied
    recomputed: bool  # whether a checkpoint computes this forward again, from the weight that `gather` brings
    shard_sums: Tensor | None  # of this rank's part of a weight that `fully_shard` sharded
    handed_out: bool  # whether a state dict has that part since then, into which a checkpoint may be read

    def invalidate(self) -> None:
        """Declare the weight changed in a way that torch does not count."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Recompute the factors, if any, from the weight as it is now."""
        raise NotImplementedError

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds this layer's parameters, or a tensor-parallel plan its weight."""
        managed = getattr(self, "_is_fsdp_managed_module", False)  # torch's mark, of FSDP1 and FSDP2
        return managed or hasattr(self._parameters.get("weight"), "placements")

    def follow_shards(self, factors: Factors) -> None:
        """Take the weight as FSDP gathered it for the one that the factors are of; ValueError where it is another."""
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

    def give_values(self, factors: Factors) -> None:
        """Compute factors that are on the meta device, where Accelerate moves a model before it shards it, from the
        weight as FSDP gathered it; ValueError for those that do not follow from it alone."""
        if factors.method != "svd":
            raise ValueError(
                f"factors of subspace={factors.method!r} lost their values on the meta device, to which Accelerate's "
                "cpu_ram_efficient_loading moves a model: set fsdp_cpu_ram_efficient_loading to false, or apply "
                "without calibration"
            )
        self.refresh()

    def _refuse_parts(self) -> None:
        """Raise ValueError where the weight is not whole."""
        if hasattr(self.weight, "placements"):
            raise ValueError(
                f"the weight {tuple(self.weight.shape)} of layer {self.path!r} is a DTensor with placements "
                f"{self.weight.placements}: FSDP gathers weights in the forward of the modules that it shards, and "
                "tensor parallelism is not supported: leave the layer out of the plan or out of targets="
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if hasattr(param, "placements") and not self.sharded:
            # As torch's ColwiseParallel and RowwiseParallel do. FSDP puts its DTensors in by another way.
            raise ValueError(
                f"layer {self.path!r}, which loge_kernels.apply has converted, cannot be split by a tensor-parallel "
                "plan: leave it out of the plan or out of targets=, or shard the model by FSDP2 instead"
            )
        super().register_parameter(name, param)

    def note_shard(self) -> None:
        """Remember what this rank's part of a sharded weight holds: a later load of other values is then seen, also one
        into the tensors of `state_dict()`, as distributed checkpoints do it."""
        stands_in = self.factors is not None or self.eight_bit is not None
        self.shard_sums = _sums(self.weight) if stands_in and self.sharded and not self.weight.is_meta else None
        self.handed_out = False

    def follow_shard(self) -> None:
        """Declare the weight changed where other values were read into the tensors of a state dict, and never loaded:
        a distributed checkpoint that fails half way leaves them so."""
        if self.handed_out and hasattr(self.weight, "placements"):
            self.handed_out = False
            if self.shard_sums is not None and not torch.equal(self.shard_sums, _sums(self.weight)):
                self.invalidate()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        if self.shard_sums is None:
            self.note_shard()  # sharded by torch's own `fully_shard`
        parent._save_to_state_dict(*args, **kwargs)
        self.handed_out = self.shard_sums is not None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        if self.shard_sums is None:
            self.note_shard()
        before = self.shard_sums
        parent._load_from_state_dict(*args, **kwargs)
        if before is not None and not torch.equal(before, _sums(self.weight)):
            self.invalidate()

    def gather_weight(self) -> None:
        """Have a sharded weight brought, where a checkpoint computes the layer again in backward; ValueError where it
        stays in parts, before an op that would wait for the other ranks."""
        if self.gather is not None:
            self.recomputed = computed_again()
            if in_backward() and hasattr(self.weight, "placements"):
                self.gather()
        if type(self.weight) is not nn.Parameter:
            self._refuse_parts()

    def refuse_partitioned(self) -> None:
        """Raise ValueError for a weight that DeepSpeed ZeRO-3 has partitioned."""
        if hasattr(self.weight, "ds_id"):
            raise ValueError(
                f"the weight of layer {self.path!r}, which has factors, is partitioned by DeepSpeed ZeRO-3, whose "
                "backward gathers whole weights: apply exact layers (no rank=), or use ZeRO stage 1 or 2, or "
                "loge_kernels.fully_shard"
            )


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def computed_again() -> bool:
    """Whether the forward under way is one that a checkpoint computes again in backward, or that computation itself."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return in_backward() or not torch.is_grad_enabled()  # a reentrant one, whose first pass records nothing
    return getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _sums(weight: Any) -> Tensor:
    """Two sums over this rank's part of a weight, which tell it from another: float64 [2]."""
    mine = (weight.to_local() if hasattr(weight, "to_local") else weight).detach().contiguous().flatten()
    # Bits: packed numbers of fewer bits, kept as floating ones, may be NaN.
    mine = mine.view(torch.uint8).view(_INTEGERS[mine.element_size()]).double()
    return torch.stack([mine.sum(), mine @ torch.arange(1, mine.numel() + 1, dtype=mine.dtype, device=mine.device)])
