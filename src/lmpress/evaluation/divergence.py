"""What one chunk of logits tells: negative log-likelihood, KL divergence and agreement with a reference.

Perplexity = exp(mean negative log-likelihood of the next token). The divergence is
KL(p || q) = sum_v p_v (log p_v - log q_v), in nats a predicted token, with p the reference's distribution
and q the model's, averaged over positions. Agreement is the share of positions where both have the same
most likely token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tally:
    """Sums over predicted tokens, in float64; `divergence` and `agreed` stay 0 without a reference."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0


@dataclass(frozen=True)
class ReferenceChunk:
    """A reference's distribution over a chunk of positions, computed once for all models.

    Attributes:
        log_p: log-probabilities, float32 (positions, vocabulary).
        p: their exponentials.
        top: the most likely token of each position, (positions,).
    """

    log_p: Tensor
    p: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> ReferenceChunk:
        """From float32 logits (positions, vocabulary)."""
        log_p = torch.log_softmax(logits, dim=-1)
        return cls(log_p, log_p.exp(), logits.argmax(dim=-1))

    def to(self, device: torch.device) -> ReferenceChunk:
        """The same on another device."""
        if self.log_p.device == device:
            return self
        return ReferenceChunk(self.log_p.to(device), self.p.to(device), self.top.to(device))


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
    tally.agreed += int((logits.argmax(dim=-1) == reference.top).sum())
