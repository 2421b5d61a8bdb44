"""The adapter's dropout mask as a pure function of (seed, offset, row, column).

No mask is stored: every backend regenerates the same bits from two int64 numbers, in forward, in backward and under
activation checkpointing. The function is a 32-bit integer hash, six operations an element where Philox takes ten
rounds of wide multiplications; a memory-bound kernel can afford the first, and dropout needs no more.

    mix(h): h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16
    key        = mix(lo(seed) ^ mix(hi(seed) ^ mix(lo(offset) ^ mix(hi(offset) ^ 0x9E3779B9))))
    row_key[m] = mix(m ^ key)
    col_key[k] = mix(k ^ 0x85EBCA6B)
    keep(m, k) = mix(row_key[m] ^ col_key[k]) >= floor(p * 2^32)          (unsigned, wrapping)
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_COLUMN_SALT = 0x85EBCA6B
_KEY_SALT = 0x9E3779B9
# Rows are hashed in slabs of about this many elements, so that the int32 temporaries stay in cache.
_SLAB = 1 << 18


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word (torch's uint32 has no arithmetic)."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _mix_(h: Tensor) -> Tensor:
    """`mix` in place on int32 lanes; the shift must be logical, so the sign's copies are masked off."""
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(0x7FEB352D)
    h ^= (h >> 15) & 0x1FFFF
    h *= _signed(0x846CA68B)
    h ^= (h >> 16) & 0xFFFF
    return h


def draw_seed(device: torch.device) -> Tensor:
    """A fresh (seed, offset) pair, int64 [2], from the device's own generator: no host synchronisation, and
    checkpointing, which restores that generator, draws the same pair again."""
    return torch.randint(-(1 << 62), 1 << 62, (2,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, rows: int, columns: int, probability: float) -> Tensor:
    """The mask of kept elements, bool [rows, columns], on the seed's device.

    `seed` is int64 [2] (seed, offset); `probability` in [0, 1) is the chance of dropping an element.
    """
    device = seed.device
    # Words as int64 scalars on the device: reading them on the host would wait for a GPU.
    words = torch.stack([seed[1] >> 32, seed[1], seed[0] >> 32, seed[0]]) & _WORD
    key = torch.full((1,), _signed(_KEY_SALT), dtype=torch.int32, device=device)
    for word in words:
        key = _mix_(key ^ torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32))
    row_key = _mix_(torch.arange(rows, dtype=torch.int32, device=device) ^ key)
    col_key = _mix_(torch.arange(columns, dtype=torch.int32, device=device) ^ _signed(_COLUMN_SALT))
    # Unsigned comparison through signed lanes: flipping the top bit maps one order onto the other.
    threshold = int(probability * (1 << 32)) - (1 << 31)
    keep = torch.empty(rows, columns, dtype=torch.bool, device=device)
    slab = max(1, _SLAB // max(columns, 1)) if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, slab):
        h = _mix_(row_key[start : start + slab, None] ^ col_key)
        h ^= -(1 << 31)
        torch.ge(h, threshold, out=keep[start : start + slab])
    return keep


def drop(x: Tensor, seed: Tensor | None, probability: float) -> Tensor:
    """`x` [M, K] with dropped elements zeroed and kept ones divided by `1 - probability`; x itself where none are."""
    if seed is None or probability == 0.0:
        return x
    keep = keep_mask(seed, x.shape[0], x.shape[1], probability)
    return torch.where(keep, x / (1.0 - probability), 0.0)
