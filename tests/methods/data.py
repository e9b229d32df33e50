"""Random weights and inputs for tests of the methods."""

from __future__ import annotations

import torch
from torch import Tensor

from lmpress.statistics import InputStatistics


def inputs(features: int, tokens: int, seed: int, mean: float = 0.3) -> Tensor:
    """Correlated activations of unequal sizes, (tokens, features), float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ (mix + torch.eye(features))
    return (x + mean) * torch.rand(features, generator=generator, dtype=torch.float64).add(0.1)


def statistics_of(x: Tensor, dtype: torch.dtype = torch.float64) -> InputStatistics:
    """The exact moments of x (tokens, features)."""
    x = x.double()
    count = x.shape[0]
    return InputStatistics(
        count,
        x.mean(0).to(dtype),
        x.square().mean(0).to(dtype),
        x.abs().mean(0).to(dtype),
        (x.T @ x / count).to(dtype),
    )


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns), float64, with rows and columns of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (
        w
        * torch.rand(rows, 1, generator=generator).add(0.2)
        * torch.rand(1, columns, generator=generator).add(0.2)
    )
