"""What exact dX products run in where `exact_dtype="auto"`: 8 bits where they are faster on this device.

On NVIDIA GPUs a cost model decides (`triton_kernels.dense`); nothing is measured inside a user's call. On CPUs the
table below does: int8 as `eight_bit.multiply` takes it against the product in the weight's dtype, M = 256 to 2048, on
an AMD EPYC (Zen 4, 2 cores, torch 2.13). Without integer dot products (VNNI, AMX) int8 is emulated, and loses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend.verified import is_verified
from ..numerics.eight_bit import cpu_multiplies_int8
from ..numerics.exact_dtypes import why_not
from ..numerics.four_bit import FORMATS
from ..triton_kernels.dense import faster_dtype

# Elements of the weight from which int8 is faster on a CPU: 2.7x at 576 x 576 over float32, and 1.25x at 576 x 1536,
# 1.6x at 2048 x 2048 and 1.7x at 4096 x 4096 over bfloat16, but 0.96x at 576 x 576.
_CPU_FROM = {torch.float32: 1 << 18, torch.bfloat16: 3 << 18, torch.float16: 3 << 18}
AUTO = "auto"


def choose(weight: Tensor, requested: str | None) -> tuple[str | None, str]:
    """The dtype of the exact products with a weight like this one (one of `EXACT_DTYPES`, or None for the weight's
    own), and why, in a few words. `requested` is "auto", which never is 4 bits, a dtype, or None."""
    own = str(weight.dtype).removeprefix("torch.")
    if requested is None:
        return None, ""
    N, K = weight.shape
    if requested != AUTO:
        reason = why_not(requested, weight.device, N, K)
        if reason is not None:
            return requested, f"{requested} cannot run ({reason}): {own}"
        emulated = requested in FORMATS and weight.device.type == "cpu"
        return requested, f"emulated, slower than {own}" if emulated else ""
    if weight.dtype not in _CPU_FROM:
        return None, f"{own} stays as it is"
    if weight.device.type == "cuda":
        for name in ("float8", "int8"):
            if why_not(name, weight.device, N, K) is None:
                return faster_dtype(N, K, name, weight.dtype, weight.device, _kernels_run(weight))
        return None, "no 8-bit products here"
    # Meta: the other ranks' part of Accelerate's cpu_ram_efficient_loading, whose rank 0 has its weights on the CPU.
    if weight.device.type not in ("cpu", "meta"):
        return None, f"no 8-bit products on {weight.device.type}"
    if not cpu_multiplies_int8():
        return None, "this CPU has no int8 products"
    if weight.numel() < _CPU_FROM[weight.dtype]:
        return None, f"too small for int8 to beat {own}"
    return "int8", f"faster than {own} on this CPU"


def _kernels_run(weight: Tensor) -> bool:
    """Whether "auto" takes our kernels for the exact products with a weight like this one."""
    return weight.dtype != torch.float32 and torch.cuda.is_available() and is_verified("triton", weight.device)
