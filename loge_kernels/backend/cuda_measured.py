"""The shapes for which the CUDA kernels are measured to be faster than Triton's, from a table that ships.

`cuda_measured.json` holds rows such as

    {"device": "NVIDIA H200", "dtype": "bfloat16", "M": [4096, 16384], "N": 4096, "K": 4096, "R": 256, "P": 16,
     "speedup": 1.12, "source": "bench/results/..."}

where M is a range, its ends included. Of a device, dtype or shape without a row nothing is known.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from .problem import BackwardProblem

_TABLE = Path(__file__).with_suffix(".json")


@functools.cache
def _rows() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(_TABLE.read_text())["faster_than_triton"])


def faster_than_triton(p: BackwardProblem) -> bool:
    """Whether a row of the table holds this problem, on the GPU that its tensors are on."""
    if not _rows() or p.left is None or p.right is None or not p.dy.is_cuda:
        return False
    device = torch.cuda.get_device_name(p.dy.device)
    dtype = str(p.dy.dtype).removeprefix("torch.")
    (M, N), (R, K) = p.dy.shape, p.right.shape
    shape = {
        "device": device,
        "dtype": dtype,
        "N": N,
        "K": K,
        "R": R,
        "P": 0 if p.lora_B is None else p.lora_B.shape[1],
    }
    return any(
        all(row[name] == value for name, value in shape.items()) and row["M"][0] <= M <= row["M"][1] for row in _rows()
    )
