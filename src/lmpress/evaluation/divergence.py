"""A reference's distribution, and how far another one is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceChunk:
    """A reference's distribution over a chunk of positions, computed once for all models.

    Attributes:
        log_p: log-probabilities, float32 (positions, vocabulary).
        p: their exponentials.
        top: the most likely token of each position, (positions,).
        known: where there is one, bool (positions,).
    """

    log_p: Tensor
    p: Tensor
    top: Tensor
    known: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> ReferenceChunk:
        """From float32 logits (positions, vocabulary)."""
        log_p = torch.log_softmax(logits, dim=-1)
        return cls(log_p, log_p.exp(), logits.argmax(dim=-1), has_top(logits))

    def to(self, device: torch.device) -> ReferenceChunk:
        """The same on another device."""
        if self.log_p.device == device:
            return self
        parts = self.log_p, self.p, self.top, self.known
        return ReferenceChunk(*(part.to(device) for part in parts))


def has_top(logits: Tensor) -> Tensor:  # (positions, vocabulary) -> bool (positions,)
    """Where logits are a distribution: the largest is finite. Tokens may be ruled out (-inf)."""
    return torch.isfinite(logits.amax(dim=-1))  # which is NaN where any is


def divergence(reference: ReferenceChunk, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) at every position, nats, (positions,).

    Args:
        log_q: the model's log-probabilities, float32 (positions, vocabulary).
    """
    # the difference first: where p is large it is small, so that little is lost to cancellation
    difference = reference.log_p - log_q
    found = torch.linalg.vecdot(reference.p, difference)
    if bool(found.isnan().any()):
        # a token that both rule out (logit -inf) adds nothing, where 0 * (-inf - -inf) adds NaN
        difference.masked_fill_(reference.p == 0, 0.0)
        found = torch.linalg.vecdot(reference.p, difference)
    return torch.as_tensor(found)
