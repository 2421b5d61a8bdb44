"""What `linear` asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend.problem import Operands
from ..numerics.eight_bit import refuse_float64

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    dropout: float,
    exact_fraction: float,
) -> None:
    """Raise ValueError or TypeError for an argument of `linear` of the wrong shape, dtype, device or range; the message
    names it, its value and what would work. `x` has any number of dimensions."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; supported are float32, float16, bfloat16 and float64")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected two dimensions [N, K]")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be K = {K}, as in weight [{N}, {K}]")
    if weight_scale is None:
        _same("weight", weight, x, (N, K))
    else:
        _check_eight_bits(x, weight, weight_scale)
    if bias is not None:
        _same("bias", bias, x, (N,))
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B go together: give both or neither")
    if lora_A is not None and lora_B is not None:
        P = lora_A.shape[0] if lora_A.dim() == 2 else 0
        float32_too = x.dtype in (torch.float16, torch.bfloat16)
        _same("lora_A", lora_A, x, (P, K), float32_too)
        _same("lora_B", lora_B, x, (N, P), float32_too)
    probability("dropout", dropout)
    share("exact_fraction", exact_fraction)


def check_factors(x: Tensor, weight: Tensor, operands: Operands) -> None:
    """The same for what stands for the weight [N, K]."""
    (N, K), left, right = weight.shape, operands.left, operands.right
    if left is not None and right is not None:
        R = right.shape[0] if right.dim() == 2 else 0
        _same("factors.left", left, x, (N, R))
        _same("factors.right", right, x, (R, K))
    if operands.rows is not None and operands.residual is not None:
        _same("factors.residual", operands.residual, x, (operands.rows.shape[0], K))


def _check_eight_bits(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Of a weight in 8 bits alone."""
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"weight has dtype {weight.dtype}; with weight_scale expected float8_e4m3fn or int8")
    refuse_float64("weight_scale", "given", x.dtype)
    shape = (weight.shape[0], 1)
    if scale.shape != shape or scale.dtype != torch.float32:
        raise ValueError(f"weight_scale is {scale.dtype} {tuple(scale.shape)}; expected torch.float32 {shape}")
    if weight.device != x.device or scale.device != x.device:
        raise ValueError(f"weight is on {weight.device}, weight_scale on {scale.device}; expected {x.device}, as x")


def probability(name: str, value: float) -> float:
    """`value`; ValueError, which calls it `name`, outside [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is not a probability in [0, 1)")
    return float(value)


def share(name: str, value: float, what: str = "rows") -> float:
    """`value`; ValueError, which calls it `name`, outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} is not a share of the {what} in [0, 1]")
    return float(value)


def _same(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], float32_too: bool = False) -> None:
    if tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.device:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.dtype != x.dtype and not (float32_too and tensor.dtype == torch.float32):
        also = " or torch.float32" if float32_too else ""
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {x.dtype}{also}, for x is {x.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
