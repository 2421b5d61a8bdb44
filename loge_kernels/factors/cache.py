"""Factors on disk: a safetensors file per weight, keyed by the weight's content.

The decomposition of a model takes minutes and depends on nothing but the weights, so it is kept (`files.cache_dir`).
Files are written whole or not at all, readable by their owner alone; a damaged one is ignored with a warning and
written anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import DAMAGED, cache_dir, make_private, replacing
from .factors import Factors, factorize, resolve_rank

logger = logging.getLogger("loge_kernels")

_FORMAT = "loge_kernels factors 1"


def cached_factors(weight: Tensor, rank: int | float) -> Factors:
    """`factorize(weight, rank)`, from the cache where this content was factorised before; factors without values of a
    weight without values, on the meta device."""
    if weight.is_meta:
        return Factors.to_come(weight, resolve_rank(rank, *weight.shape))
    directory = cache_dir()
    if directory is None or not torch.isfinite(weight).all():
        return factorize(weight, rank)
    R = resolve_rank(rank, *weight.shape)
    path = directory / "factors" / f"{fingerprint(weight)}-svd-{R}.safetensors"
    factors = _load(path, weight, R)
    if factors is None:
        factors = factorize(weight, R)
        _store(path, factors)
    return factors


def fingerprint(weight: Tensor) -> str:
    """SHA-256, in hexadecimal, of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    for part in weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).split(1 << 24):
        digest.update(part.clone().numpy().data)  # a copy: FSDP cannot free storage that numpy has seen
    return digest.hexdigest()


def _load(path: Path, weight: Tensor, R: int) -> Factors | None:
    N, K = weight.shape
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})["loge"])
            left, right = file.get_tensor("left"), file.get_tensor("right")
        if header["format"] != _FORMAT or left.shape != (N, R) or right.shape != (R, K):
            raise ValueError(f"holds {header.get('format')!r}, {tuple(left.shape)} and {tuple(right.shape)}")
        if {left.dtype, right.dtype} != {weight.dtype} or not all(t.isfinite().all() for t in (left, right)):
            raise ValueError(f"holds {left.dtype} and {right.dtype}, or numbers that are not finite")
        energy = float(header["energy"])
        if not 0.0 <= energy <= 1.001:  # of rounding
            raise ValueError(f"its energy is {energy}")
    except DAMAGED as error:
        logger.warning("ignoring the damaged cache file %s (%s); computing its factors again", path, error)
        return None
    return Factors(left.to(weight.device), right.to(weight.device), "svd", energy).bind(weight)


def _store(path: Path, factors: Factors) -> None:
    """A cache that cannot be written costs time, not results, so the reason is logged and the work goes on."""
    header = json.dumps({"format": _FORMAT, "energy": factors.energy})
    tensors = {"left": factors.left.detach().cpu(), "right": factors.right.detach().cpu()}
    try:
        make_private(path.parent)
        with replacing(path, private=True) as temporary:
            save_file(tensors, temporary, metadata={"loge": header})
    except (OSError, SafetensorError) as error:
        logger.warning("could not keep factors in %s: %s", path.parent, error)
