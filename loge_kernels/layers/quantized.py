"""Low-rank backward over quantised frozen weights (QLoGE).

The forward is the quantisation library's own, bit for bit. The backward sends dY through factors that were computed
once from the dequantised weight, so it neither dequantises nor reads the quantised weight:

    y  = library(x) + s · drop(x) Aᵀ Bᵀ
    dX = dY · left · right + s · (dY B) A          products in the dtype that the library multiplies in

Exact steps, exact rows and layers without factors do need the weight: it is dequantised in their backward, one layer at
a time, and dropped again. `exact_dtype` then quantises that transient copy anew; nothing is kept.

A library's layer is changed in place to a class that stands before the library's own: names, parameters and state dict
stay as they are. Supported are bitsandbytes' 4-bit and 8-bit layers (`bnb`) and torchao's weight-only tensors
(`torchao`).

Source: QLoGE, Zhang et al., Applied Sciences 2025, 15(1), 82, section 4.4.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.choice import requested, run_backward
from ..backend.problem import BackwardProblem, Gradients, Need, Operands
from ..backend.reference import add_adapter
from ..factors.factors import Factors, as_buffers
from ..numerics.autocast import autocast_dtype, without_autocast
from ..numerics.dropout import draw_seed
from ..numerics.eight_bit import announce
from ..numerics.exact_dtypes import weight_copy, why_not
from ..op.autograd import restore, save
from ..op.linear import factors_in_eight_bits, stand_ins
from .linear import LoGELinear


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

    def why_not_sharded(self) -> str | None:
        """Why FSDP2 cannot shard the weight, or None."""
        return f"FSDP2 cannot split a {type(self.weight).__name__}"

    def before_sharding(self) -> None:
        """Keep what the forward reads beside the weight: FSDP makes a plain parameter of it."""

    def product_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype in which the library multiplies `input`, and the backward dY."""
        return autocast_dtype(input) or input.dtype

    def library_forward(self, input: Tensor) -> Tensor:
        """The forward of the class that stands behind this one's."""
        return super(LoGELinear, self).forward(input)

    @classmethod
    def convert_(cls, linear: nn.Linear, factors: Factors | None, *args: Any, **kwargs: Any) -> None:
        """Make a layer of the library one of these, in place; `factors` are of its dequantised weight."""
        _outside_graphs()
        library_class = type(linear)
        super().convert_(linear, factors, *args, **kwargs)
        assert isinstance(linear, cls)
        linear._library_class = library_class
        if factors is not None:
            factors.bind(linear.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _outside_graphs()  # of a pickle, in a process that has converted nothing
        super().__setstate__(state)

    def revert_(self) -> None:
        library_class = self._library_class
        del self._library_class
        super().revert_()
        self.__class__ = library_class  # type: ignore[assignment]

    def prepare(self) -> None:
        """Nothing: the 8-bit copy of a dequantised weight is never kept."""

    def dense_weight(self) -> Tensor:
        return self.dequantize(self, self.factor_dtype(self))

    def why_not_adapter(self, dtype: torch.dtype, input: Tensor | None = None) -> str | None:
        if input is None:
            return None if dtype.is_floating_point else f"adapter is {dtype}"
        seen, inside = autocast_dtype(input) or input.dtype, self.product_dtype(input)
        if seen != inside:
            return f"activations are {seen} and the base multiplies in {inside}"
        return None if dtype in (inside, torch.float32) else f"adapter is {dtype} over products in {inside}"

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
        factors = self.current_factors()
        seed = draw_seed(input.device) if dropout > 0.0 and lora_A is not None else None
        operands = Operands(
            x=input,
            weight=None,
            bias=self.bias,
            lora_A=lora_A,
            lora_B=lora_B,
            seed=seed,
            scaling=float(scaling),
            dropout=0.0 if seed is None else float(dropout),
            exact_fraction=0.0 if factors is None else float(self.exact_fraction),
            backend=requested(self.backend),
            **(stand_ins(factors) | factors_in_eight_bits(factors, input)),
        )
        o = operands
        return _Quantized.apply(o.x, o.weight, o.bias, o.lora_A, o.lora_B, self, o)

    def exact_operands(self, dy: Tensor) -> dict[str, Any]:
        """For the dense product with dY [M, N]: the weight [N, K] in its dtype, or a copy in fewer bits and scales, by
        the operands' names."""
        weight = self.dequantize(self, dy.dtype)
        name = self.exact_dtype
        if name is None:
            return {"weight": weight}
        reason = why_not(name, weight.device, *weight.shape)
        if reason is not None:
            announce("exact_dtype", name, reason, dy.dtype)
            return {"weight": weight}
        return weight_copy(name).operands(weight)


@functools.cache
def _outside_graphs() -> None:
    """Keep `run` out of compiled graphs. Not by a decorator: it would import torch's compiler with this package, which
    takes seconds."""
    disable: Any = torch.compiler.disable(reason="quantised layers run outside compiled graphs")
    QuantizedLinear.run = disable(QuantizedLinear.run)  # type: ignore[method-assign]


class _Quantized(torch.autograd.Function):
    """x [..., K] -> y [..., N]; keeps no weight, and x only for an adapter's dA. Arguments as of `Linear`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        layer, o = given[-2:]
        x, y = o.x, layer.library_forward(o.x)
        ctx.layer, ctx.dtype = layer, layer.product_dtype(x)
        ctx.x_like, ctx.bias_dtype = (x.shape, x.dtype), None if o.bias is None else o.bias.dtype
        xa = None
        if o.lora_A is not None and o.lora_B is not None:
            o = o._replace(x=x.reshape(-1, x.shape[-1]).to(ctx.dtype))
            y, xa = _add_adapter(y.reshape(-1, y.shape[-1]), o)
            y = y.view(*x.shape[:-1], y.shape[-1])
        as_buffers(*o.stand_ins)
        save(ctx, o, Need(*ctx.needs_input_grad[:-2]), xa)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        if torch.is_grad_enabled():  # only create_graph=True runs backward so
            raise RuntimeError("a quantised layer has no second derivative: call backward without create_graph=True")
        g = _differentiate(ctx, dy.reshape(-1, dy.shape[-1]).to(ctx.dtype))
        shape, dtype = ctx.x_like
        dx = None if g.dx is None else g.dx.view(shape).to(dtype)
        dbias = None if g.dbias is None else g.dbias.to(ctx.bias_dtype)
        return dx, None, dbias, g.dA, g.dB, None, None


@without_autocast
def _add_adapter(y: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    return add_adapter(y, operands)


@without_autocast
def _differentiate(ctx: Any, dy: Tensor) -> Gradients:
    xa, o = restore(ctx)
    o = o.gathered(dy.dtype)
    if o.left_scale is None:
        left, right, residual = (None if t is None else t.to(dy.dtype) for t in (o.left, o.right, o.residual))
        o = o._replace(left=left, right=right, residual=residual)
    elif o.residual is not None:
        o = o._replace(residual=o.residual.to(dy.dtype))
    if ctx.need.dx and o.kind != "low-rank":
        o = o._replace(**ctx.layer.exact_operands(dy))
    return run_backward(BackwardProblem.of(dy, xa, ctx.need, o), o.backend)
