"""A matrix as a tensor train."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...numerics.autocast import autocast_dtype, without_autocast


class TensorTrain(nn.Module):
    """x [..., in] -> x L R (+ bias) [..., out]: a linear layer whose matrix is a tensor train.

    Cores G_j [r_{j-1}, k_j, r_j] with r_0 = r_d = 1 and one rank between; `in_modes` multiply to in, `out_modes` to
    out. L [in, r] is the product of the first cores and R [r, out] that of the others, so an application costs
    2 M r (in + out) flops for M rows; forming L and R, each from its outer end, costs 2 to 4 r² (in + out) once a call.
    `matrix()` is L R as `nn.Linear` has its weight.

    Cores start as N(0, 1) / √r_j · σ^(1/d) with σ² = 1 / (in + out), so that every element of the matrix has variance
    σ²; a bias starts at zero.

    Raises ValueError for a rank below 1 or above min(in, out): more would be no saving and no more freedom.

    Source: Yang et al., arXiv 2402.11417 (LoRETTA), section 3.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_modes: Sequence[int],
        out_modes: Sequence[int],
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = math.prod(in_modes), math.prod(out_modes)
        if not 1 <= rank <= min(self.in_features, self.out_features):
            raise ValueError(
                f"tensor_rank={rank} for a {self.in_features} x {self.out_features} matrix; give 1 to "
                f"{min(self.in_features, self.out_features)}"
            )
        self.rank = rank
        self.in_modes, self.out_modes = tuple(in_modes), tuple(out_modes)
        modes = (*in_modes, *out_modes)
        for j, mode in enumerate(modes):
            shape = (1 if j == 0 else rank, mode, 1 if j == len(modes) - 1 else rank)
            self.register_parameter(f"core_{j}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the cores anew."""
        cores = self.cores
        sigma = (self.in_features + self.out_features) ** -0.5
        for core in cores:
            nn.init.normal_(core, std=sigma ** (1 / len(cores)) / math.sqrt(core.shape[2]))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def cores(self) -> list[Tensor]:
        """The cores in order, [r_{j-1}, k_j, r_j]."""
        return [getattr(self, f"core_{j}") for j in range(len(self.in_modes) + len(self.out_modes))]

    def suited(self, x: Tensor) -> Tensor:
        """`x` in a dtype that can be applied to: the cores', or its own where autocast sees to that."""
        return x if autocast_dtype(x) is not None else x.to(self.cores[0].dtype)

    def halves(self) -> tuple[Tensor, Tensor]:
        """L [in, r] and R [r, out], in the cores' dtype, autocast or not."""
        cores, boundary = self.cores, len(self.in_modes)
        return _left(*cores[:boundary]), _right(*cores[boundary:])

    def matrix(self) -> Tensor:
        """(L R)ᵀ [out, in], in the cores' dtype."""
        return _transposed_product(*self.halves())

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.halves()
        return nn.functional.linear(nn.functional.linear(x, left.T), right.T, self.bias)

    def frozen(self) -> TensorTrain:
        """A copy whose cores are buffers: in the state dict, out of every optimizer."""
        twin = copy.deepcopy(self)
        for name in [name for name, _ in twin.named_parameters()]:
            value = getattr(twin, name).detach()
            delattr(twin, name)
            twin.register_buffer(name, value)
        return twin

    def extra_repr(self) -> str:
        modes = "·".join(map(str, self.in_modes)), "·".join(map(str, self.out_modes))
        return f"{modes[0]} -> {modes[1]}, rank={self.rank}, bias={self.bias is not None}"


@without_autocast
def _left(*cores: Tensor) -> Tensor:
    """[1, k, r] ... [r, k, r] -> [in, r], from the left: every step is one product of a tall matrix and a core."""
    product = cores[0].flatten(0, 1)
    for core in cores[1:]:
        product = (product @ core.flatten(1)).view(-1, core.shape[2])
    return product


@without_autocast
def _right(*cores: Tensor) -> Tensor:
    """[r, k, r] ... [r, k, 1] -> [r, out], from the right."""
    product = cores[-1].flatten(1)
    for core in reversed(cores[:-1]):
        product = (core.flatten(0, 1) @ product).view(core.shape[0], -1)
    return product


@without_autocast
def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right).T
