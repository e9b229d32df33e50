"""What one chunk of logits tells: negative log-likelihood, KL divergence and agreement with a reference.

Perplexity = exp(mean negative log-likelihood of the next token). The divergence is
KL(p || q) = sum_v p_v (log p_v - log q_v), in nats a predicted token, with p the reference's distribution
and q the model's, averaged over positions. Agreement is the share of positions where both have the same
most likely token. Where the logits of either are not finite there is neither, and no average over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tally:
    """Sums over predicted tokens, in float64; without a reference the last three stay 0.

    Attributes:
        not_finite: positions at which the model has no most likely token: see `has_top`.
        compared: positions at which both have one.
    """

    tokens: int = 0
    loss: float = 0.0
    not_finite: int = 0
    divergence: float = 0.0
    agreed: int = 0
    compared: int = 0

    @property
    def kl(self) -> float:
        """Mean divergence, nats a token; NaN where a position could not be compared."""
        return self.divergence / self.tokens if self.compared == self.tokens else math.nan

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token; NaN where a position could not be compared."""
        return self.agreed / self.tokens if self.compared == self.tokens else math.nan


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


def add_chunk(tally: Tally, logits: Tensor, targets: Tensor, reference: ReferenceChunk | None) -> None:
    """Add a chunk of positions to `tally`.

    Args:
        logits: the model's, float32 (positions, vocabulary).
        targets: the tokens that really follow, int64 (positions,).
        reference: the reference over the same positions, or None.
    """
    log_q = torch.log_softmax(logits, dim=-1)
    loss = log_q.gather(-1, targets[:, None])
    tally.tokens += targets.numel()
    tally.loss -= float(loss.sum(dtype=torch.float64))
    known = has_top(logits)
    tally.not_finite += int((~known).sum())
    if reference is None:
        return
    # the difference first: where p is large it is small, so that little is lost to cancellation
    difference = log_q.neg_().add_(reference.log_p)
    divergence = torch.linalg.vecdot(reference.p, difference)  # (positions,)
    if bool(divergence.isnan().any()):
        # a token that both rule out (logit -inf) adds nothing, where 0 * (-inf - -inf) adds NaN
        difference.masked_fill_(reference.p == 0, 0.0)
        divergence = torch.linalg.vecdot(reference.p, difference)
    tally.divergence += float(divergence.sum(dtype=torch.float64))
    both = known & reference.known
    tally.compared += int(both.sum())
    tally.agreed += int((both & (logits.argmax(dim=-1) == reference.top)).sum())
