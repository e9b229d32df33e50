"""Moments of a layer's input, streamed over batches; padding never counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the input x (n,) of a linear layer over `count` tokens, all means and not sums.

    Where tokens were weighted, E is the weighted mean.

    Attributes:
        count: tokens seen.
        mean: E[x], (n,).
        second_moment: E[x^2], (n,): the diagonal of the Hessian.
        abs_mean: E|x|, (n,); None where it is unknown (behind a factor).
        hessian: E[x x^T], (n, n), symmetric; None where it was not asked for.
    """

    count: int
    mean: Tensor
    second_moment: Tensor
    abs_mean: Tensor | None
    hessian: Tensor | None

    @property
    def features(self) -> int:
        """n, the width of the input."""
        return self.mean.shape[0]

    def require_hessian(self) -> Tensor:
        """The Hessian, (n, n). ValueError where it was not gathered."""
        if self.hessian is None:
            raise ValueError("this method needs the Hessian of the input, and only its diagonal was gathered")
        return self.hessian

    def through(self, matrix: Tensor) -> InputStatistics:
        """Statistics of `matrix @ x`: of the input of `left` in LowRank(left, right), for right = `matrix`.

        Args:
            matrix: (r, n).

        Returns:
            mean M mu, Hessian M H M^T, and its diagonal; without a Hessian the channels are taken to be
            uncorrelated around their mean. `abs_mean` is unknown.
        """
        matrix = matrix.to(self.mean)
        mean = matrix @ self.mean
        if self.hessian is None:
            variance = (self.second_moment - self.mean.square()).clamp_min(0)
            return InputStatistics(self.count, mean, matrix.square() @ variance + mean.square(), None, None)
        hessian = matrix @ self.hessian @ matrix.T
        hessian = (hessian + hessian.T) / 2
        return InputStatistics(self.count, mean, hessian.diagonal().clone(), None, hessian)

    def to(self, device: torch.device) -> InputStatistics:
        """The same on another device."""
        moved = {
            name: value.to(device)
            for name in ("mean", "second_moment", "abs_mean", "hessian")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def select(self, index: Tensor) -> InputStatistics:
        """Statistics of `x[index]`: what is left after channels were removed."""
        return replace(
            self,
            mean=self.mean[index],
            second_moment=self.second_moment[index],
            abs_mean=None if self.abs_mean is None else self.abs_mean[index],
            hessian=None if self.hessian is None else self.hessian[index][:, index],
        )


ROWS = 512
"""Rows whose sums are made in float32 before they are added up in float64."""

PANEL = 256
"""Rows of a Hessian that one matrix product makes, from the diagonal to the right."""


class StatisticsAccumulator:
    """Gathers `InputStatistics` over batches.

    Sums are kept in float64 but for the Hessian, whose batch products are made in float32 and added up in
    `hessian_dtype` (float32 keeps 24 bits, enough for some millions of tokens; float64 doubles the memory).

    Args:
        features: n, the width of the input.
        hessian: whether to gather the n x n matrix too.
    """

    def __init__(
        self,
        features: int,
        hessian: bool = False,
        device: torch.device | str = "cpu",
        hessian_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count = 0
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._square = torch.zeros_like(self._sum)
        self._abs = torch.zeros_like(self._sum)
        self._products = (
            torch.zeros(features, features, dtype=hessian_dtype, device=device) if hessian else None
        )

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: (..., n) activations, any floating-point type.
            mask: (...), non-zero where a token counts; None if all do.
            weights: (tokens,) of the last dimension of tokens, >= 0 and of mean 1: how much each of them
                counts, in every window alike; not together with a mask.
        """
        with torch.autocast(x.device.type, enabled=False):  # hooks run in the precision of the forward
            self._update(x.detach().reshape(-1, x.shape[-1]), mask, weights)

    def _update(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        if mask is not None:
            x = x[mask.reshape(-1).bool()]
        if not x.shape[0]:
            return
        x = x.to(self._sum.device, torch.float32)
        counts = None if weights is None else counts_of_rows(weights, x)[:, None]
        self.count += x.shape[0]
        for first in range(0, len(x), ROWS):
            part = x[first : first + ROWS]
            counted = part if counts is None else part * counts[first : first + ROWS]
            self._sum += counted.sum(0)
            self._abs += counted.abs().sum(0)
            self._square += (counted * part).sum(0)
        if self._products is not None:
            self._multiply(self._products, x if counts is None else x * counts.sqrt())

    @staticmethod
    def _multiply(products: Tensor, x: Tensor) -> None:
        """Add x^T x to the upper triangle of the products: they are symmetric."""
        for start in range(0, x.shape[1], PANEL):
            panel = products[start : start + PANEL, start:]
            left, right = x[:, start : start + PANEL].T, x[:, start:]
            if panel.dtype == torch.float32:
                panel.addmm_(left, right)
            else:
                panel += left @ right

    def result(self) -> InputStatistics:
        """The means so far, float32. ValueError if nothing was seen, or if a value is not finite."""
        if not self.count:
            raise ValueError("no token was seen: the calibration text is empty, or all of it is padding")
        if not bool(torch.isfinite(self._square).all()):
            raise ValueError("the activations are not finite: a weight or an input holds NaN or infinity")
        hessian = None
        if self._products is not None:
            upper = (self._products / self.count).float().triu_()
            hessian = upper + upper.triu(1).T
        return InputStatistics(
            self.count,
            (self._sum / self.count).float(),
            (self._square / self.count).float(),
            (self._abs / self.count).float(),
            hessian,
        )


def counts_of_rows(weights: Tensor, x: Tensor) -> Tensor:
    """How much each row of x (windows * tokens, n) counts, (rows,), by the weights (tokens,) of a window."""
    return weights.to(x).repeat(len(x) // len(weights))
