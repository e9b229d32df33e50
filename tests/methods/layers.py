"""Small layers with correlated inputs, as the methods meet them."""

import torch
from torch import Tensor

from lmpress.statistics import InputStatistics, StatisticsAccumulator


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations with a decaying spectrum, correlated channels and a few of large magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * (
        torch.arange(1, features + 1).float() ** -0.7
    )
    x = torch.randn(tokens, features, generator=generator) @ mix.T
    x[:, ::13] *= 6
    return x


def statistics_of(x: Tensor) -> InputStatistics:
    accumulator = StatisticsAccumulator(x.shape[1], hessian=True)
    accumulator.update(x)
    return accumulator.result()


def layer(
    rows: int, columns: int, tokens: int = 600, seed: int = 0
) -> tuple[Tensor, Tensor, InputStatistics]:
    """(weight (rows, columns), inputs (tokens, columns), their statistics)."""
    x = correlated_inputs(tokens, columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))
    return weight, x, statistics_of(x)


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2, in float64 and from the inputs themselves."""
    x, weight, other = x.double(), weight.double(), other.double()
    return float(((weight - other) @ x.T).square().sum() / (weight @ x.T).square().sum())
