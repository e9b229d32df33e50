"""ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs (arXiv 2406.07831).

Minimises `tr((W - B) H (W - B)^T)` over matrices B with k entries (or an n:m pattern), by ADMM on B = Z:

    B <- [(W H) - V + rho Z] (H + rho I)^-1,     Z <- the k largest of B + V / rho,     V <- V + rho (B - Z)

with H scaled to a unit diagonal, rho growing while the support still moves, and then the best
values on the support that was found, by conjugate gradients for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.methods.checks import check_layer
from lmpress.methods.damping import shifted_cholesky
from lmpress.methods.gptq import asymmetric_target
from lmpress.methods.hessian import damped_inverse_factor, relative_loss
from lmpress.methods.patterns import (
    density_of,
    keep_largest,
    parse_pattern,
    sparse_form,
    with_priority,
)
from lmpress.methods.result import Rewritten
from lmpress.statistics import InputStatistics


@dataclass(frozen=True)
class AlpsOptions:
    """Options of `alps`.

    Attributes:
        sparsity: the share that is removed, over the whole matrix; an n:m pattern has its own.
        pattern: `unstructured`, or `n:m` with n kept of every m.
        damping: added to every H_jj, relative to itself.
        iterations: at most this many steps of ADMM.
        refit: steps of conjugate gradients on the support.
        asymmetry: how far to move towards the target of asymmetric calibration, 0 to 1; needs `cross`.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    damping: float = 0.1
    iterations: int = 300
    refit: int = 10
    asymmetry: float = 0.0

    def __post_init__(self) -> None:
        density_of(self.pattern, self.sparsity)
        if self.damping < 0 or self.iterations < 1 or self.refit < 0 or not 0 <= self.asymmetry <= 1:
            raise ValueError("damping and refit are at least 0, iterations at least 1, asymmetry is in 0..1")


def alps(
    weight: Tensor,
    statistics: InputStatistics,
    options: AlpsOptions,
    cross: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Rewritten:
    """Prune `weight` (out, in) so that the layer's output changes least.

    Args:
        weight: (out, in), floating point.
        statistics: of the input, with its Hessian.
        cross: C = E[(x_fp - x) x^T] (in, in) for asymmetric calibration; None for none.
        row_weights: (out,) positive, what an error of each output counts; None for all alike.

    Returns:
        `Sparse(pattern, Dense)` in the weight's dtype. The report has the `damping` that it took, relative to
        each H_jj, `density`, `iterations`, and
        `output_error` = relative squared error of the output over the calibration tokens, against the moved
        target where there is a `cross`.
    """
    check_layer(weight, statistics, cross=cross, row_weights=row_weights)
    hessian = statistics.require_hessian().to(weight.device, torch.float32)
    moved, group = None, parse_pattern(options.pattern)
    if cross is not None:
        moved = moved_target(weight.float(), hessian, cross, options.damping, options.asymmetry)
    target = weight.float() if moved is None else moved
    rows = 1.0 if row_weights is None else row_weights.to(target)[:, None]
    metric = Metric.of(hessian, options.damping)
    admm = Admm(metric, density_of(options.pattern, options.sparsity), group)
    admm.start(metric.scaled(target) * rows)
    gradient = metric.scaled(target) * rows @ metric.matrix
    for _ in range(options.iterations):
        admm.step(gradient)
        if admm.settled:
            break
    mask = admm.support
    pruned = refit(target, metric, mask, metric.unscaled(admm.sparse) / rows, options.refit)
    form = sparse_form(pruned, mask, group, weight.dtype)
    report: dict[str, Any] = {
        "damping": admm.damping,
        "density": form.density,
        "iterations": admm.steps,
        "output_error": relative_loss(target, form.dense(), hessian),
    }
    return Rewritten(form, report, moved)


def moved_target(target: Tensor, hessian: Tensor, cross: Tensor, damping: float, amount: float) -> Tensor:
    """`gptq.asymmetric_target` of W (out, in), every H_jj damped by a fraction of itself, as in `Metric`."""
    factor = damped_inverse_factor(hessian, damping, per_channel=True)
    return asymmetric_target(target, hessian, cross.to(hessian), factor, amount)


@dataclass(frozen=True)
class Metric:
    """A damped Hessian scaled to a unit diagonal: `matrix = H / (s s^T)`, s = sqrt(diag H).

    Attributes:
        matrix: (n, n), with ones on its diagonal.
        scale: s (n,), positive.
        damping: what was added to every H_jj, relative to itself.
    """

    matrix: Tensor
    scale: Tensor
    damping: float

    @classmethod
    def of(cls, hessian: Tensor, damping: float) -> Metric:
        """Damp every H_jj by a fraction of itself; inputs that are never active count a little, uncoupled."""
        diagonal = hessian.diagonal().clamp_min(0)
        mean = diagonal.mean()
        floor = 1e-8 * mean if bool(mean > 0) else torch.ones_like(mean)
        scale = (diagonal * (1 + damping) + floor).sqrt()
        matrix = hessian / scale[:, None] / scale
        matrix.diagonal().fill_(1)
        return cls(matrix, scale, damping)

    def scaled(self, weight: Tensor) -> Tensor:
        """W diag(s)."""
        return weight * self.scale

    def unscaled(self, weight: Tensor) -> Tensor:
        """W diag(s)^-1."""
        return weight / self.scale


class Admm:
    """The iteration of ALPS on one weight; warm, so that another loop may move its target between steps.

    Args:
        metric: of the loss.
        density: the share that is kept of the whole matrix; an n:m `group` has its own.
        growth: factors of rho every third step: while more than 10 % of the support moves, while more than
            0.5 % does, and below. Slower growth costs steps, and finds a better support.
        protected: bool (out, in), entries that always stay; None for none.
    """

    def __init__(
        self,
        metric: Metric,
        density: float,
        group: tuple[int, int] | None,
        growth: tuple[float, float, float] = (1.3, 1.2, 1.1),
        protected: Tensor | None = None,
    ) -> None:
        self.metric, self.density, self.group = metric, density, group
        self.growth, self.protected = growth, protected
        self.rho, self.steps, self.settled = 0.1, 0, False
        self._mended = 0.0  # what B's metric took beyond its damping, relative to the unit diagonal
        self._invert()

    @property
    def damping(self) -> float:
        """What it took, relative to each H_jj."""
        return self.metric.damping + self._mended * (1 + self.metric.damping)

    def _invert(self) -> None:
        """(H + rho I)^-1; with a unit diagonal and rho far above rounding, float32 is enough."""
        factor, self._mended = shifted_cholesky(self.metric.matrix, self.rho, self._mended)
        self._inverse = torch.cholesky_inverse(factor)

    def start(self, scaled: Tensor) -> None:
        """Begin at the largest entries of `scaled`, the target times diag(s), (out, in)."""
        self.support = self._last = self._largest(scaled)
        self.sparse = scaled * self.support  # Z
        self.dual = torch.zeros_like(scaled)  # V

    def _largest(self, scaled: Tensor) -> Tensor:
        scores = with_priority(scaled.abs(), self.protected)
        return keep_largest(scores, self.density, self.group, per_row=False)

    def step(self, gradient: Tensor) -> None:
        """One step towards the target T, given T diag(s) @ matrix, (out, in)."""
        dense = (gradient - self.dual + self.rho * self.sparse) @ self._inverse  # B
        moved = dense + self.dual / self.rho
        self.support = self._largest(moved)
        self.sparse = moved * self.support
        self.dual += self.rho * (dense - self.sparse)
        self.steps += 1
        if self.steps % 3 == 0:
            self._grow()

    def _grow(self) -> None:
        """Raise rho while the support moves; lower it where it never did."""
        changed = int((self.support != self._last).sum()) / max(1, int(self.support.sum()))
        self._last = self.support
        if self.steps >= 30 and changed < 3e-4:
            self.settled = True
            return
        fast, middle, slow = self.growth
        factor = fast if changed > 0.1 else middle if changed > 0.005 else slow if changed > 0 else 0.2
        self.rho = min(1e6, self.rho * factor)
        self._invert()


def refit(target: Tensor, metric: Metric, mask: Tensor, start: Tensor, iterations: int) -> Tensor:
    """The best values on a fixed support: conjugate gradients for all rows at once.

    Args:
        target: W (out, in).
        metric: of the loss.
        mask: bool (out, in).
        start: (out, in), where to begin; entries outside the mask count as zero.
        iterations: steps; each costs one product with H. The loss never rises.

    Returns:
        (out, in), zero outside the mask.
    """
    value = metric.scaled(start) * mask
    if not iterations:
        return metric.unscaled(value)
    residual = ((metric.scaled(target) - value) @ metric.matrix) * mask
    direction = residual
    energy = residual.square().sum(1, keepdim=True)  # (out, 1)
    for _ in range(iterations):
        image = (direction @ metric.matrix) * mask
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0)
        value = value + length * direction
        residual = residual - length * image
        following = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(energy > 0, following / energy, 0) * direction
        energy = following
    return metric.unscaled(value)
