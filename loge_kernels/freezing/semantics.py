"""How far a hidden state is from its label: against the semantic bases of a model's output head.

The head maps a state h to logits W h, W [V, H]. The basis of label v is column v of pinv(W), the smallest state whose
logits are closest to one-hot(v); the semantic logits of h are its cosines with the bases of all labels.

The basis of v is P W_v with P = (Wᵀ W)⁺ [H, H], so

    cos(h, basis_v) = W_v · (P h) / (‖h‖ ‖P W_v‖)

is the head applied to P h: no [V, H] matrix but the head's own is ever held, whatever the vocabulary.

Source: Gu et al., arXiv 2406.11753, and their latent semantics of vocabulary-defined bases.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics.autocast import without_autocast

_CHUNK = 8192  # labels at a time: 128 MiB of float32 at 4096 wide


class SemanticBases:
    """The bases of the labels of a head with this weight [V, H], in float32 on its device. Raises ValueError for a
    weight that is not finite or zero."""

    @torch.no_grad()
    @without_autocast
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        labels, width = weight.shape
        R = torch.zeros(0, width, device=weight.device)
        for chunk in self._chunks():
            # A QR of all rows, some at a time: unlike sums of W_cᵀ W_c it does not square the condition number.
            R = torch.linalg.qr(torch.cat([R, chunk]), mode="r").R
        if not torch.isfinite(R).all() or not R.any():
            raise ValueError(f"the output head's weight {tuple(weight.shape)} is zero, or contains NaN or inf")
        _, S, Vt = torch.linalg.svd(R, full_matrices=False)
        kept = max(labels, width) * torch.finfo(torch.float32).eps * S[0] < S  # as torch.linalg.pinv
        self._whitening = Vt[kept].t() / S[kept]  # [H, r]: W · whitening has orthonormal columns
        norms = [(chunk @ self._whitening @ self._whitening.t()).norm(dim=1) for chunk in self._chunks()]
        self._inverse_norms = torch.cat(norms).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()  # [V]

    @property
    def labels(self) -> int:
        return self._weight.shape[0]

    @torch.no_grad()
    @without_autocast
    def vectors(self, labels: Tensor) -> Tensor:
        """The bases [T, H] of `labels` [T]: rows of pinv(W)ᵀ."""
        return self._weight[labels].float() @ self._whitening @ self._whitening.t()

    @torch.no_grad()
    @without_autocast
    def cosine(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """1 − cosine of each state [T, H] with the basis of its label [T]: [T], from 0 to 2."""
        return 1.0 - torch.nn.functional.cosine_similarity(hidden.float(), self.vectors(labels), dim=-1)

    @torch.no_grad()
    @without_autocast
    def cross_entropy(self, hidden: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Cross-entropy [T] of softmax(semantic logits / temperature) of states [T, H] with `labels` [T]."""
        directions = torch.nn.functional.normalize(hidden.float(), dim=-1)
        probes = directions @ self._whitening @ self._whitening.t()  # P h / ‖h‖  [T, H]
        total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        start = 0
        for chunk in self._chunks():
            logits = probes @ chunk.t() * self._inverse_norms[start : start + len(chunk)]  # [T, chunk]
            total = torch.logaddexp(total, torch.logsumexp(logits / temperature, dim=-1))
            start += len(chunk)
        of_label = (probes * self._weight[labels].float()).sum(-1) * self._inverse_norms[labels]
        return total - of_label / temperature

    def _chunks(self) -> Iterator[Tensor]:
        return (chunk.float() for chunk in self._weight.split(_CHUNK))
