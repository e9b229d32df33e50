"""One budget of parameters for many weights: an entry stays while its removal would cost the model enough.

Removing `w_ij`, with the rest of its row made up for it, adds `w_ij^2 / [H^-1]_jj` to the squared error of
output i (Optimal Brain Surgeon; SparseGPT, arXiv 2301.00774, equation 3), and so about half of
`s_i w_ij^2 / [H^-1]_jj` to the loss of the model, s_i being the mean squared gradient by that output. One
threshold on these scores over all weights of all modules removes what the model misses least. A module is
known by the quantiles of its scores, so that the weights of all need not be held at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmpress.methods.hessian import damped_inverse_factor
from lmpress.methods.svd_llm import row_weights
from lmpress.statistics import InputStatistics

QUANTILES = 256
"""Points of a module's curve: densities are known to 0.2 %."""

SPREAD = 0.3
"""How far a module's share may be from the mean, relative to what is kept or removed on average, whichever is
less. Scores hold for the removal of few weights: a block whose attention they give up (a gradient of nothing
through a saturated softmax) is missed all the same. On SmolLM2-135M at a half, SparseGPT with a spread of
0.3 has a KL divergence of 0.67, of 0.9 one of 2.3, and without shares one of 0.73."""


def removal_costs(statistics: InputStatistics, damping: float) -> Tensor:
    """`1 / [H^-1]_jj` of the damped Hessian, (in,): what a squared entry of column j costs when it goes.

    Args:
        damping: added to every H_jj, relative to itself.
    """
    hessian = statistics.require_hessian().float()
    factor = damped_inverse_factor(hessian, damping, per_channel=True)
    return factor.upper.square().sum(0).reciprocal()  # H^-1 = U^T U


def removal_curve(weight: Tensor, costs: Tensor, sensitivity: Tensor) -> list[float]:
    """log2 of the scores of `weight` (out, in) at `QUANTILES` evenly spaced quantiles, rising.

    Args:
        costs: `removal_costs` of the input, (in,).
        sensitivity: s, (out,): mean squared gradients by the outputs. A module that no gradient was seen for
            has the least of scores.
    """
    if not bool(sensitivity.any()):
        costs = torch.zeros_like(costs)
    rows = row_weights(sensitivity).to(weight.device, torch.float32)[:, None]
    scores = (weight.float() * rows).square() * costs.to(weight.device)
    ordered = scores.flatten().sort().values.clamp_min(torch.finfo(torch.float32).tiny).log2()
    places = (torch.arange(QUANTILES, device=ordered.device) + 0.5) / QUANTILES * ordered.numel()
    return [float(x) for x in ordered[places.long()]]


def shares_for_budget(curves: Sequence[Sequence[float]], weights: Sequence[int], keep: float) -> list[float]:
    """The share of its parameters that each module keeps, so that all together keep `keep`.

    Args:
        curves: of each module, as `removal_curve` gives them.
        weights: how many parameters each module has.
        keep: in (0, 1); no share is farther from it than `SPREAD` allows.

    Raises:
        ValueError: lists of different lengths.
    """
    known = torch.tensor([list(curve) for curve in curves], dtype=torch.float64)  # (modules, QUANTILES)
    counts = torch.tensor(list(weights), dtype=torch.float64)
    if len(known) != len(counts):
        raise ValueError("there must be one curve and one number of weights a module")
    if not len(known):
        return []
    reach = SPREAD * min(keep, 1 - keep)

    def kept(threshold: float) -> Tensor:
        below = torch.searchsorted(known, torch.full((len(known), 1), threshold, dtype=torch.float64))[:, 0]
        left = known.gather(1, (below - 1).clamp_min(0)[:, None])[:, 0]
        right = known.gather(1, below.clamp_max(known.shape[1] - 1)[:, None])[:, 0]
        between = ((threshold - left) / (right - left).clamp_min(1e-12)).clamp(0, 1)
        removed = torch.where(below == 0, 0.0, (below - 0.5 + between) / known.shape[1])
        return (1 - removed).clamp(keep - reach, keep + reach)

    low, high = float(known.min()) - 1, float(known.max()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        if float(kept(middle) @ counts) > keep * float(counts.sum()):
            low = middle
        else:
            high = middle
    return [float(share) for share in kept(high)]
