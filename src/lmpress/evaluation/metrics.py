"""What is measured at every predicted token, a record a figure; means over a text with standard errors.

Perplexity = exp(mean negative log-likelihood of the next token). The divergence is
KL(p || q) = sum_v p_v (log p_v - log q_v), in nats a predicted token, with p the reference's distribution
and q the model's, averaged over positions. Agreement is the share of positions where both have the same
most likely token. Where the logits of either are not finite there is neither, and no average over them.

Neighbouring tokens are no independent draws, so errors are those of the windows: with s_w the sum over window
w and n_w its tokens, the mean m = sum s / sum n has the error sqrt(W / (W - 1) sum (s_w - m n_w)^2) / sum n.
What is measured against a reference is paired: the difference is taken at every token, before it is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmpress.evaluation.divergence import ReferenceChunk, divergence, has_top


@dataclass(frozen=True)
class Estimate:
    """A mean over a text.

    Attributes:
        mean: over all predicted tokens; NaN where one of them has no value.
        error: its standard error, from the differences between windows; None where there is one window alone.
    """

    mean: float
    error: float | None


@dataclass(frozen=True)
class Seen:
    """A chunk of positions under one model.

    Attributes:
        logits: the model's, float32 (positions, vocabulary).
        targets: the tokens that really follow, int64 (positions,).
        reference: the reference over the same positions; None where nothing is compared.
    """

    logits: Tensor
    targets: Tensor
    reference: ReferenceChunk | None = None

    @cached_property
    def log_q(self) -> Tensor:
        """Log-probabilities, (positions, vocabulary)."""
        return torch.log_softmax(self.logits, dim=-1)

    @cached_property
    def known(self) -> Tensor:
        """Where the model has a most likely token, bool (positions,)."""
        return has_top(self.logits)

    @property
    def against(self) -> ReferenceChunk:
        """The reference. ValueError where there is none."""
        if self.reference is None:
            raise ValueError("there is no reference to compare with")
        return self.reference

    def compared(self, values: Tensor) -> Tensor:
        """Values (positions,), NaN where the model or the reference has no most likely token."""
        return values.masked_fill(~(self.known & self.against.known), math.nan)


def _loss(seen: Seen) -> Tensor:
    return -seen.log_q.gather(-1, seen.targets[:, None])[:, 0]


def _excess_loss(seen: Seen) -> Tensor:
    return _loss(seen) + seen.against.log_p.gather(-1, seen.targets[:, None])[:, 0]


def _divergence(seen: Seen) -> Tensor:
    return seen.compared(divergence(seen.against, seen.log_q))


def _agreement(seen: Seen) -> Tensor:
    return seen.compared((seen.logits.argmax(dim=-1) == seen.against.top).float())


@dataclass(frozen=True)
class Metric:
    """A figure: to add one, write a function of `Seen`, and a line in `METRICS`.

    Attributes:
        key: what JSON calls its mean.
        each: its value at every position of a chunk, (positions,).
        higher_is_better: for whoever ranks by it.
        compares: whether it takes a reference.
        label: of its row in tables; None for what is told in another row.
        style: how tables format a value.
    """

    key: str
    each: Callable[[Seen], Tensor]
    higher_is_better: bool = False
    compares: bool = False
    label: str | None = None
    style: str = ".4f"


# One line a figure.
METRICS: tuple[Metric, ...] = (
    Metric("loss", _loss),
    Metric("excess_loss", _excess_loss, compares=True),
    Metric("kl", _divergence, compares=True, label="KL to dense, nats"),
    Metric("top1_agreement", _agreement, True, compares=True, label="same top token", style=".1%"),
)


class Tally:
    """Sums over the predicted tokens of a text, window by window, in float64.

    Args:
        windows: how many there are.

    Attributes:
        not_finite: positions at which the model has no most likely token.
    """

    def __init__(self, windows: int) -> None:
        self._counts = torch.zeros(windows, dtype=torch.float64)
        self._sums: dict[str, Tensor] = {}
        self.not_finite = 0

    @property
    def tokens(self) -> int:
        """Predicted so far."""
        return int(self._counts.sum())

    def add(self, seen: Seen, windows: Tensor) -> None:
        """Add a chunk of positions.

        Args:
            windows: the window of each position, int64 (positions,).
        """
        windows = windows.cpu()
        self._counts.index_add_(0, windows, torch.ones(len(windows), dtype=torch.float64))
        self.not_finite += int((~seen.known).sum())
        for metric in METRICS:
            if seen.reference is not None or not metric.compares:
                sums = self._sums.setdefault(metric.key, torch.zeros_like(self._counts))
                sums.index_add_(0, windows, metric.each(seen).double().cpu())

    def estimates(self) -> dict[str, Estimate]:
        """The mean of every metric that was measured, by its key."""
        return {key: self._estimate(sums) for key, sums in self._sums.items()}

    def _estimate(self, sums: Tensor) -> Estimate:
        tokens, windows = float(self._counts.sum()), int((self._counts > 0).sum())
        mean = float(sums.sum()) / tokens
        if windows < 2:
            return Estimate(mean, None)
        squares = float((sums - mean * self._counts).square().sum())
        return Estimate(mean, math.sqrt(windows / (windows - 1) * squares) / tokens)
