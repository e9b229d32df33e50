"""Scales for the inputs of linears that are quantized next: AWQ, arXiv 2306.00978.

W x = (W diag(s)) (diag(s)^-1 x). What an input c loses to rounding goes with its step, and the step of a
group with its largest weight: inputs that are large, and whose errors count, get larger weights (eq. 4-5):

    s_c = a_c^alpha,   a_c = E|x_c|,   alpha* = argmin  E||(Q(W diag(s)) diag(s)^-1 - W) x||^2

on a grid of alpha in [0, 1], Q with all that it will have, shrunken ranges too: a range that is shrunken
without regard for the inputs cuts off just those weights that were made large. With H = E[x x^T] the error is
tr(D H D^T) over all of the text, and not over a few tokens of it. 1 / s goes into what makes the input:
nothing has to be multiplied when the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.statistics import InputStatistics, pooled

SAMPLE_ROWS = 32
"""Rows of each linear that a search looks at: grids are a row's own, and rows are many."""


@dataclass(frozen=True)
class AwqOptions:
    """Options of `awq_scales`.

    Attributes:
        points: values of alpha in (0, 1] that are tried, beside 0.
    """

    points: int = 20

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"at least one alpha is tried, not {self.points}")


@dataclass(frozen=True)
class Reader:
    """A linear that reads the inputs, and the grid that it is put on afterwards.

    Attributes:
        weight: (out, in).
        grid: of plain rounding, which stands in for the solver that follows.
        weighed: whether ranges are shrunken by how much each input counts, as GPTQ's are.
    """

    weight: Tensor
    grid: RoundOptions
    weighed: bool = False


def awq_scales(
    readers: Sequence[Reader],
    statistics: InputStatistics,
    options: AwqOptions,
    heads: tuple[int, int] = (1, 1),
) -> tuple[Tensor, dict[str, Any]]:
    """What the weights are multiplied by, and the inputs divided.

    Args:
        statistics: of the inputs (in,) that all readers have in common, with the Hessian.
        heads: (groups, repeats) where several channels are fed by one row, and so are scaled alike: (g, r, d)
            for all r.

    Returns:
        s (in,), float32, positive; and the report: alpha, and the error relative to that of s = 1.

    Raises:
        ValueError: statistics without a Hessian or magnitudes, or of another width.
    """
    hessian = statistics.require_hessian().float()
    if statistics.abs_mean is None:
        raise ValueError("awq needs the mean magnitude of every input")
    for reader in readers:
        if reader.weight.shape[1] != hessian.shape[0]:
            raise ValueError(f"{reader.weight.shape[1]} inputs, and statistics of {hessian.shape[0]}")
    magnitude = _magnitudes(statistics.abs_mean.float(), heads)
    sampled = [_sampled(reader) for reader in readers]
    best, chosen, scale = math.inf, 0.0, torch.ones_like(magnitude)
    plain = 0.0
    for i in range(options.points + 1):
        alpha = i / options.points
        tried = _scale(magnitude, alpha)
        loss = sum(rows * _loss(reader, tried, hessian, statistics) for reader, rows in sampled)
        plain = loss if i == 0 else plain
        if loss < best:
            best, chosen, scale = loss, alpha, tried
    return scale, {"alpha": chosen, "relative_error": round(best / plain, 6) if plain else 1.0}


def _magnitudes(magnitude: Tensor, heads: tuple[int, int]) -> Tensor:
    """E|x|, alike where channels have to be scaled alike, and nowhere zero."""
    groups, repeats = heads
    if repeats > 1:
        alike = pooled(magnitude, groups, repeats).view(groups, 1, -1)
        magnitude = alike.expand(-1, repeats, -1).reshape(-1)
    return magnitude.clamp_min(float(magnitude.mean()) * 1e-4 or 1.0)


def _scale(magnitude: Tensor, alpha: float) -> Tensor:
    """a^alpha, its largest and smallest value as far from 1."""
    scale = magnitude.pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def _sampled(reader: Reader) -> tuple[Reader, float]:
    """Some rows of a reader, where every row has a grid of its own; and how many each of them stands for."""
    rows = reader.weight.shape[0]
    if reader.grid.granularity == "tensor" or rows <= SAMPLE_ROWS:
        return reader, 1.0
    picked = torch.linspace(0, rows - 1, SAMPLE_ROWS, device=reader.weight.device).round().long()
    return replace(reader, weight=reader.weight[picked]), rows / SAMPLE_ROWS


def _loss(reader: Reader, scale: Tensor, hessian: Tensor, statistics: InputStatistics) -> float:
    """E||(Q(W diag(s)) diag(s)^-1 - W) x||^2."""
    weight = reader.weight.float()
    scale, hessian = scale.to(weight.device), hessian.to(weight.device)
    counts = None
    if reader.weighed:
        counts = replace(statistics, second_moment=statistics.second_moment.to(scale) / scale.square())
    rounded = round_to_nearest(weight * scale, counts, reader.grid).form.dense()
    error = rounded / scale - weight
    return float(((error @ hessian) * error).sum(dtype=torch.float64))
