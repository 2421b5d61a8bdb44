"""`EightBitLinear`: a frozen weight kept in 8 bits alone, from which forward and dX both take their product.

    weight          [N, K]     float8_e4m3fn or int8
    weight_scale    [N, 1]     float32, what a row of it is multiplied by

A scale for each row leaves the forward's sum over K to the products that cuBLAS has, and in dX it goes to dY. Both are
in the state dict under these names, the channel-wise form of compressed-tensors, which serving engines read and
multiply as this forward does. float8 is kept in the layer as its bits in uint8, so that no cast of a module reaches it.
A 16-bit weight loads too, and is rounded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.autocast import autocast_dtype
from ..numerics.eight_bit import DTYPES, as_bits, dequantize, from_bits, quantize_weight
from .linear import LoGELinear

_SCALE = "weight_scale"
_WHOLE = (Tensor, nn.Parameter)  # not FSDP's


class EightBitLinear(LoGELinear):
    """A linear layer over a frozen weight in 8 bits (`numerics.eight_bit`).

    Only `convert_`, and `round_` after it, make instances. `weight` holds float8 as uint8;
    `dense_weight()` is what it stands for.
    """

    weight_scale: Tensor
    stands_for: torch.dtype  # that the weight had

    def round_(self, base_dtype: str) -> None:
        """The second half of `convert_`: put the weight in 8 bits in its own place."""
        weight = self.weight.detach()
        self.stands_for = weight.dtype
        bits, scale = self._quantize(weight, DTYPES[base_dtype])
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.register_buffer(_SCALE, scale)
        if self.factors is not None:
            self.factors.bind(self.weight)

    @staticmethod
    def _quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, scale = quantize_weight(weight, dtype)
        return as_bits(q), scale

    def revert_(self) -> None:
        raise NotImplementedError("restore_, which takes the weight that it had")

    def restore_(self, weight: Tensor) -> None:
        """Undo `convert_` with the weight [N, K] that it had."""
        restored = weight.detach().to(self.weight.device, self.stands_for, copy=True)
        frozen = self._was_frozen
        del self._buffers[_SCALE], self.stands_for
        self.weight = nn.Parameter(restored, requires_grad=not frozen)
        super().revert_()

    @property
    def base_dtype(self) -> str:
        """ "float8" or "int8"."""
        return "int8" if self.weight.dtype == torch.int8 else "float8"

    @property
    def row_scale(self) -> Tensor:
        return self.weight_scale

    def dense_weight(self) -> Tensor:
        return dequantize(from_bits(self.weight.detach()), self.weight_scale, self.stands_for)

    def why_not_adapter(self, dtype: torch.dtype, input: Tensor | None = None) -> str | None:
        seen = self.stands_for if input is None else autocast_dtype(input) or input.dtype
        return None if dtype in (seen, torch.float32) else f"adapter is {dtype} beside activations in {seen}"

    @contextmanager
    def edited(self) -> Iterator[None]:
        """As the base class's. The edited weight is rounded to 8 bits again."""
        bits, q = self.weight, from_bits(self.weight.detach())
        before = dequantize(q, self.weight_scale, torch.float32)
        self.weight = nn.Parameter(before.clone(), requires_grad=False)
        try:
            yield
        finally:
            after, self.weight = self.weight.detach(), bits
            if not torch.equal(before, after):
                warnings.warn(
                    f"merged into a weight in {self.base_dtype}, and rounded: for the exact result, and for a model "
                    "that from_pretrained reads, load the adapter over the 16-bit model and merge there",
                    stacklevel=4,
                )
                made, scale = self._quantize(after, q.dtype)
                with torch.no_grad():
                    bits.copy_(made)
                    self.weight_scale.copy_(scale)
            self.invalidate()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EightBitLinear:
        scale = self.weight_scale
        self.stands_for = fn(torch.empty(0, dtype=self.stands_for)).dtype  # what a cast of the module makes of a weight
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:  # a cast of the module is not for scales
            self._buffers[_SCALE] = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[f"{prefix}weight"]
        if type(weight) in _WHOLE:  # FSDP's parts stay bits
            destination[f"{prefix}weight"] = from_bits(weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name, dtype = f"{prefix}weight", DTYPES[self.base_dtype]
        weight, errors = state_dict.get(name), args[-1]
        if type(weight) in _WHOLE and weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
            bits, state_dict[f"{prefix}{_SCALE}"] = self._quantize(weight, dtype)
            state_dict[name] = bits
        elif isinstance(weight, Tensor) and as_bits(weight).dtype != self.weight.dtype:
            errors.append(f"{name} is {weight.dtype}, and the layer was applied with base_dtype={self.base_dtype!r}")
            return
        elif isinstance(weight, Tensor):
            state_dict[name] = as_bits(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base_dtype={self.base_dtype}"
