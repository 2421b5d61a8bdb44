"""Low-rank backward over quantised frozen weights (QLoGE).

The forward is the quantisation library's own, bit for bit. The backward sends dY through factors that were computed
once from the dequantised weight, so it neither dequantises nor reads the quantised weight:

    y  = library(x) + s · drop(x) Aᵀ Bᵀ
    dX = dY · left · right + s · (dY B) A          products in the dtype that the library multiplies in

Exact steps, exact rows and layers without factors do need the weight: it is dequantised in their backward, one layer at
a time, and dropped again. `exact_dtype` then quantises that transient copy anew; nothing is kept.

A library's layer is changed in place to a class that stands before the library's own: names, parameters and state dict
stay as they are. Supported are bitsandbytes' 4-bit and 8-bit layers (`bnb_layers`) and torchao's weight-only tensors
(`torchao_layers`).

Source: QLoGE, Zhang et al., Applied Sciences 2025, 15(1), 82, section 4.4.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .autocast import autocast_dtype, without_autocast
from .backends import requested, run_backward
from .dropout import draw_seed
from .eight_bit import DTYPES, announce, quantize_columns, why_not
from .factors import Factors, as_buffers
from .linear import LoGELinear
from .problem import BackwardProblem, Gradients
from .reference import add_adapter


class QuantizedLinear(LoGELinear):
    """A quantised linear layer: its library's forward, a low-rank activation gradient.

    A subclass stands before the library's class in its bases and fills in the static methods, which are asked of the
    library's layers before they are converted, too. Only `convert_` makes instances.
    """

    _library_class: type[nn.Linear]

    @staticmethod
    def label(layer: Any) -> str:
        """What the weight is, for reports: "NF4 base"."""
        raise NotImplementedError

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Why this layer of the library cannot be converted, or None."""
        raise NotImplementedError

    @staticmethod
    def factor_dtype(layer: Any) -> torch.dtype:
        """The dtype that factors are kept in, and that the weight is dequantised to for them."""
        raise NotImplementedError

    @staticmethod
    def dequantize(layer: Any, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`, a new tensor."""
        raise NotImplementedError

    def product_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype in which the library multiplies `input`, and the backward dY."""
        return autocast_dtype(input) or input.dtype

    def library_forward(self, input: Tensor) -> Tensor:
        """The forward of the class that stands behind this one's."""
        return super(LoGELinear, self).forward(input)

    @classmethod
    def convert_(cls, linear: nn.Linear, factors: Factors | None, *args: Any, **kwargs: Any) -> None:
        """Make a layer of the library one of these, in place; `factors` are of its dequantised weight."""
        library_class = type(linear)
        super().convert_(linear, factors, *args, **kwargs)
        assert isinstance(linear, cls)
        linear._library_class = library_class
        if factors is not None:
            factors.bind(linear.weight)

    def revert_(self) -> None:
        library_class = self._library_class
        del self._library_class
        super().revert_()
        self.__class__ = library_class  # type: ignore[assignment]

    def prepare(self) -> None:
        """Nothing: the 8-bit copy of a dequantised weight is never kept."""

    def dense_weight(self) -> Tensor:
        return self.dequantize(self, self.factor_dtype(self))

    def adapter_obstacle(self, dtype: torch.dtype, input: Tensor | None = None) -> str | None:
        if input is None:
            return None if dtype.is_floating_point else f"adapter is {dtype}"
        seen, inside = autocast_dtype(input) or input.dtype, self.product_dtype(input)
        if seen != inside:
            return f"activations are {seen} and the base multiplies in {inside}"
        return None if dtype in (inside, torch.float32) else f"adapter is {dtype} over products in {inside}"

    @torch.compiler.disable(reason="quantised layers run outside compiled graphs")
    def run(
        self, input: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        trained = [t for t in (input, self.bias, lora_A, lora_B) if t is not None and t.requires_grad]
        if lora_A is None and not (trained and torch.is_grad_enabled()):
            return self.library_forward(input)
        if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"a quantised layer ({self.label(self)}) is inside torch.jit.trace or a transform of torch.func, which "
                "cannot take its gradient: call loge_kernels.remove(model)"
            )
        factors = None if self.exact_fraction == 1.0 else self.current_factors()
        call = _Call(
            layer=self,
            dtype=self.product_dtype(input),
            scaling=float(scaling),
            dropout=float(dropout) if lora_A is not None else 0.0,
            exact_fraction=float(self.exact_fraction),
            backend=requested(self.backend),
        )
        seed = draw_seed(input.device) if call.dropout > 0.0 else None
        return _Quantized.apply(input, self.bias, *_frozen_operands(factors, input), lora_A, lora_B, seed, call)

    def exact_operands(self, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """For the dense product with dY [M, N]: the weight [N, K] in its dtype, or its 8-bit copy and scales [K]."""
        weight = self.dequantize(self, dy.dtype)
        name = self.exact_dtype
        if name is None:
            return weight, None, None
        reason = why_not(name, weight.device, *weight.shape)
        if reason is not None:
            announce("exact_dtype", name, reason, dy.dtype)
            return weight, None, None
        return None, *quantize_columns(weight, DTYPES[name])


def layer_class(module: nn.Module) -> type[QuantizedLinear] | None:
    """What a quantised linear layer becomes; None for any other module.

    A library that is not loaded has no layers, so none is imported here for the first time.
    """
    if "bitsandbytes" in sys.modules:
        from .bnb_layers import CLASSES

        found = CLASSES.get(type(module))
        if found is not None:
            return found
    if "torchao" in sys.modules:
        from .torchao_layers import LoGETorchaoLinear, holds

        if holds(module):
            return LoGETorchaoLinear
    return None


def _frozen_operands(factors: Factors | None, x: Tensor) -> tuple[Tensor | None, ...]:
    """left, right, rows, residual, left_scale and right_scale of a backward problem."""
    if factors is None:
        return (None,) * 6
    copies = factors.in_eight_bits(x)
    if copies is None:
        return factors.left, factors.right, factors.rows, factors.residual, None, None
    (left, left_scale), (right, right_scale) = copies
    return left, right, factors.rows, factors.residual, left_scale, right_scale


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of the op is given beside tensors."""

    layer: QuantizedLinear
    dtype: torch.dtype
    scaling: float
    dropout: float
    exact_fraction: float
    backend: str


class _Quantized(torch.autograd.Function):
    """x [..., K] -> y [..., N]; keeps no weight, and x only for an adapter's dA."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        rows: Tensor | None,
        residual: Tensor | None,
        left_scale: Tensor | None,
        right_scale: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        seed: Tensor | None,
        call: _Call,
    ) -> Tensor:
        y = call.layer.library_forward(x)
        adapter_input, xa = None, None
        if lora_A is not None and lora_B is not None:
            y = y.reshape(-1, y.shape[-1])
            adapter_input = x.reshape(-1, x.shape[-1]).to(call.dtype)
            y, xa = _add_adapter(y, adapter_input, lora_A, lora_B, call.scaling, call.dropout, seed)
            y = y.view(*x.shape[:-1], y.shape[-1])
        as_buffers(left, right, rows, residual, left_scale, right_scale)
        need = ctx.needs_input_grad
        need_dx, need_dA, need_dB = need[0], need[8], need[9]
        ctx.save_for_backward(
            adapter_input if need_dA else None,
            xa if need_dB else None,
            left if need_dx else None,
            right if need_dx else None,
            rows if need_dx else None,
            residual if need_dx else None,
            left_scale if need_dx else None,
            right_scale if need_dx else None,
            lora_A if need_dx or need_dA else None,
            lora_B if need_dx or need_dA or need_dB else None,
            seed,
        )
        ctx.set_materialize_grads(False)
        ctx.call, ctx.x_like, ctx.bias_dtype = call, (x.shape, x.dtype), None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 12
        if torch.is_grad_enabled():  # only create_graph=True runs backward so
            raise RuntimeError("a quantised layer has no second derivative: call backward without create_graph=True")
        need = ctx.needs_input_grad
        g = _differentiate(dy, ctx.saved_tensors, ctx.call, (need[0], need[1], need[8], need[9]))
        shape, dtype = ctx.x_like
        dx = None if g.dx is None else g.dx.view(shape).to(dtype)
        dbias = None if g.dbias is None else g.dbias.to(ctx.bias_dtype)
        return dx, dbias, *(None,) * 6, g.dA, g.dB, None, None


@without_autocast
def _add_adapter(*arguments: Any) -> tuple[Tensor, Tensor]:
    return add_adapter(*arguments)


@without_autocast
def _differentiate(
    dy: Tensor, saved: tuple[Tensor | None, ...], call: _Call, need: tuple[bool, bool, bool, bool]
) -> Gradients:
    x, xa, left, right, rows, residual, left_scale, right_scale, lora_A, lora_B, seed = saved
    need_dx, need_dbias, need_dA, need_dB = need
    dy = dy.reshape(-1, dy.shape[-1]).to(call.dtype)
    fraction = 0.0 if left is None else call.exact_fraction
    if left_scale is None:
        left, right = (None if t is None else t.to(dy.dtype) for t in (left, right))
    weight, dense, dense_scale = None, None, None
    if need_dx and (left is None or fraction > 0.0):
        weight, dense, dense_scale = call.layer.exact_operands(dy)
    problem = BackwardProblem(
        dy=dy,
        x=x,
        xa=xa,
        weight=weight,
        left=left,
        right=right,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=call.scaling,
        dropout=call.dropout,
        seed=seed,
        exact_fraction=fraction,
        need_dx=need_dx,
        need_dweight=False,
        need_dbias=need_dbias,
        need_dA=need_dA,
        need_dB=need_dB,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rows=rows,
        residual=None if residual is None else residual.to(dy.dtype),
        dense=dense,
        dense_scale=dense_scale,
        left_scale=left_scale,
        right_scale=right_scale,
    )
    return run_backward(problem, call.backend)
