"""What errors in an embedding or a head cost, by what the head sees, what is looked up and what occurs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.families import Layout
from lmpress.statistics import InputStatistics

TOKENS = "token_probabilities"
"""What the probabilities of the tokens are called among the sensitivities."""

HEAD = "head_hessian"
"""What the Hessian of the head's input is called among the sensitivities."""

LOOKED_UP = "embedding_gradient"
"""What the mean squared gradients by the components of an embedding are called among the sensitivities."""


@dataclass(frozen=True)
class TableMetric:
    """What errors in an embedding or a head cost.

    Attributes:
        probability: of each token, (vocabulary,).
        statistics: with the Hessian of an error in a row, (width, width).
    """

    probability: Tensor
    statistics: InputStatistics

    def to(self, device: torch.device) -> TableMetric:
        """The same on another device."""
        return TableMetric(self.probability.to(device), self.statistics.to(device))


def table_metric(
    name: str, layout: Layout, sensitivity: Mapping[str, Tensor], tokens: int
) -> TableMetric | None:
    """Of the embedding or the head of that name: of both, if one table is both; None where nobody looked."""
    if TOKENS not in sensitivity:
        return None
    head, gradient = sensitivity[HEAD], sensitivity[LOOKED_UP]
    hessian = torch.zeros_like(head) if name == layout.embedding and not layout.tied else head.clone()
    if name == layout.embedding and gradient.shape[0] == hessian.shape[0]:
        hessian.diagonal().add_(gradient)
    if not bool(hessian.any()):
        hessian.diagonal().fill_(1.0)  # rows that are projected before the first block: all alike
    diagonal = hessian.diagonal().clone()
    statistics = InputStatistics(tokens, torch.zeros_like(diagonal), diagonal, None, hessian)
    return TableMetric(sensitivity[TOKENS], statistics)


def multiplier(outer: Any, layout: Layout) -> float:
    """What rows of the embedding are multiplied by once they are looked up: Gemma does."""
    return float(getattr(outer.get_submodule(layout.embedding), "scalar_embed_scale", None) or 1.0)
