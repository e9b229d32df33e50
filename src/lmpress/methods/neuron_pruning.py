"""Remove neurons of an MLP: columns of its output projection, chosen and made up for by least squares.

With H = E[x x^T] of the output projection's input (damped), keeping the columns K and removing P costs

    min over W'  E||(W - W') x||^2  =  tr(W_P ((H^-1)_PP)^-1 W_P^T)      (ZipLM, arXiv 2302.04089, eq. 2)
    W'_K = W_K + W_P H_PK (H_KK)^-1                                       (the same solution as a regression)

and after removing P:  W <- W - W_P ((H^-1)_PP)^-1 (H^-1)_P:,  H^-1 <- H^-1 - H^-1_:P ((H^-1)_PP)^-1 H^-1_P:.
A single column scores ||W_:j||^2 / (H^-1)_jj. Where the projection has a bias, H is taken around the mean and
the bias takes the mean of what is lost: the same as an input of ones that is never removed. SPQ (arXiv
2602.18420, section 3.2) removes by E|up_proj output| without making up for it, more where activations are
small: `paper_ratios`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lmpress.methods.checks import check_finite, check_statistics
from lmpress.methods.damping import damped_cholesky, shifted_cholesky
from lmpress.statistics import InputStatistics

ROUNDS = 32
"""Batches in which the removed neurons go: each costs one update of the inverse Hessian."""

SPARE = 8
"""Candidates of a batch beyond twice its size, among which removal is exactly one by one."""


@dataclass(frozen=True)
class NeuronOptions:
    """Options of `prune_neurons`.

    Attributes:
        importance: `output` removes what changes the outputs least, by the Hessian; `activation` removes the
            smallest mean activations.
        compensate: let the kept columns (and the bias) make up for the removed ones; needs the Hessian.
        damping: added to every channel of H, as a fraction of its own entry.
    """

    importance: Literal["output", "activation"] = "output"
    compensate: bool = True
    damping: float = 1e-2

    def __post_init__(self) -> None:
        if self.importance not in ("output", "activation"):
            raise ValueError(f"importance is output or activation, not {self.importance!r}")
        if self.damping < 0:
            raise ValueError(f"damping is not negative: {self.damping}")


@dataclass(frozen=True)
class NeuronChoice:
    """What `prune_neurons` found.

    Attributes:
        keep: the kept neurons, (kept,), int64, ascending.
        output: the new columns of the output projection, (out, kept), in its dtype.
        bias_delta: (out,), to add to the bias; None where there is none or nothing is made up for.
        report: `kept`, `removed`, `damping`, and where there is a Hessian `relative_error_dropped` and
            `relative_error`: of the outputs, without and with what the rest makes up for.
    """

    keep: Tensor
    output: Tensor
    bias_delta: Tensor | None
    report: dict[str, Any] = field(default_factory=dict)


def prune_neurons(
    output: Tensor,
    statistics: InputStatistics | None,
    keep: int,
    options: NeuronOptions,
    *,
    activation: Tensor | None = None,
    output_bias: Tensor | None = None,
) -> NeuronChoice:
    """Choose `keep` of f neurons, and the columns of the output projection that serve them best.

    Args:
        output: the output projection W, (d, f).
        statistics: of its input, n = f; with the Hessian unless importance is `activation` and nothing is
            made up for.
        keep: 1 to f.
        activation: (f,), mean |up_proj output| of every neuron, for importance `activation`.
        output_bias: (d,), the projection's bias: only whether there is one matters.

    Raises:
        ValueError: if `keep` is out of range, or a statistic that is needed is missing or not finite.
    """
    f = output.shape[1]
    check_finite({"output projection": output, "vector of activations": activation, "bias": output_bias})
    if statistics is not None:
        check_statistics(statistics)
    if not 1 <= keep <= f:
        raise ValueError(f"keep 1 to {f} neurons, not {keep}")
    needed = options.compensate or options.importance == "output"
    H = None if statistics is None else statistics.hessian
    if needed and (statistics is None or H is None):
        raise ValueError("pruning by output, and compensation, need the Hessian of the output's input")
    W = output.double()
    moments = None
    if statistics is not None and H is not None:
        moments = _moments(statistics, W.device, centred=options.compensate and output_bias is not None)
    kept, used = _choose(W, moments, keep, options, activation)
    report: dict[str, Any] = {"kept": keep, "removed": f - keep, "damping": used}
    if moments is None or statistics is None:
        return NeuronChoice(kept, output[:, kept], None, report)
    columns = output[:, kept]
    if options.compensate and keep < f:
        solved, used = _compensated(W, moments, kept, max(used, options.damping))
        columns, report["damping"] = solved.to(output.dtype), used
    delta = _without(W, columns, kept)  # (d, f)
    mean = statistics.mean.to(W)
    bias_delta = (delta @ mean).to(output.dtype) if options.compensate and output_bias is not None else None
    total = _energy(W, statistics.require_hessian())
    gone = _others(f, kept)
    dropped = _energy(W[:, gone], statistics.require_hessian()[gone][:, gone])
    report["relative_error_dropped"] = _ratio(dropped, total)
    report["relative_error"] = _ratio(_energy(delta, moments), total)
    return NeuronChoice(kept, columns, bias_delta, report)


def removal_curve(
    output: Tensor,
    statistics: InputStatistics,
    widths: Sequence[int],
    *,
    damping: float = 1e-2,
    has_bias: bool = False,
) -> list[float]:
    """What it costs to keep only so many neurons, made up for: E||(W - W') x||^2, in squared output units.

    One greedy pass serves all widths. W' is the damped solution, the loss is on the undamped Hessian.

    Args:
        output: W (d, f).
        statistics: of its input, with the Hessian.
        widths: neurons to keep, each 1 to f, in any order.
        has_bias: the projection's bias takes the mean of the loss.

    Returns:
        The losses in the order of `widths`; 0 for f.
    """
    f = output.shape[1]
    if any(not 1 <= width <= f for width in widths):
        raise ValueError(f"widths lie between 1 and {f}: {sorted(widths)}")
    W = output.double()
    moments = _moments(statistics, W.device, centred=has_bias)
    losses = {f: 0.0}
    descending = sorted(set(widths) - {f}, reverse=True)
    if descending:
        elimination, _ = _start(W, moments, damping)
        batch = _batch(f - descending[-1])
        for width in descending:
            elimination.remove_until(width, batch)
            losses[width] = max(0.0, float(_energy(W - elimination.weight, moments)))
    return [losses[width] for width in widths]


def paper_ratios(activation_means: Sequence[float], min_ratio: float, max_ratio: float) -> list[float]:
    """The share of neurons to remove from every layer, by SPQ's rule (arXiv 2602.18420, eq. 3).

    `rho_l = rho_min + (rho_max - rho_min) (log a_max - log a_l) / (log a_max - log a_min)`, where a_l is the
    mean of |up_proj output| over the tokens and neurons of layer l: the quieter, the more. Where all layers
    are alike, each gets `min_ratio`.

    Raises:
        ValueError: unless 0 <= min_ratio <= max_ratio < 1 and the means are finite and not negative.
    """
    if not 0 <= min_ratio <= max_ratio < 1:
        raise ValueError(f"ratios need 0 <= min <= max < 1, not {min_ratio} and {max_ratio}")
    if any(not math.isfinite(a) or a < 0 for a in activation_means):
        raise ValueError("mean activations are finite and not negative")
    logs = [math.log(max(a, 1e-12)) for a in activation_means]
    if not logs:
        return []
    top, span = max(logs), max(logs) - min(logs)
    if span == 0:
        return [min_ratio] * len(logs)
    return [min_ratio + (max_ratio - min_ratio) * (top - log) / span for log in logs]


def aligned_width(width: int, ratio: float, multiple_of: int = 1) -> int:
    """The neurons to keep of `width` after removing the share `ratio`, as a multiple of `multiple_of`.

    `int(width * (1 - ratio))` as in the reference implementation of SPQ, then rounded to the nearest multiple
    (halves upwards). Never 0: at least one multiple, or `width` where that is smaller. Never above `width`,
    and `width` itself, aligned or not, where nothing is to be removed.
    """
    if width < 1 or multiple_of < 1 or not 0 <= ratio <= 1:
        raise ValueError(f"no width for {width} neurons, ratio {ratio}, multiples of {multiple_of}")
    target = int(width * (1 - ratio))
    if target == width:
        return width
    nearest = (2 * target + multiple_of) // (2 * multiple_of) * multiple_of
    return min(max(nearest, multiple_of), width)


def allocate_widths(
    curves: Sequence[Mapping[int, float]], weights: Sequence[float], remove_total: int
) -> list[int]:
    """Choose a width for every layer: the least weighted loss that removes at least `remove_total` neurons.

    Exact, by dynamic programming over the number of neurons removed so far, in units of the greatest common
    divisor of all steps.

    Args:
        curves: of every layer the loss by width; the largest width of each is the unpruned one.
        weights: what a unit of loss costs in every layer.
        remove_total: neurons to remove in all layers together.

    Returns:
        The widths. Of equal sums, the one that removes less in the later layers.

    Raises:
        ValueError: if the curves do not reach that far.
    """
    if len(curves) != len(weights):
        raise ValueError(f"{len(curves)} curves, but {len(weights)} weights")
    most = sum(max(curve) - min(curve) for curve in curves)
    if remove_total > most:
        raise ValueError(f"cannot remove {remove_total} neurons: the curves end at {most}")
    unit = math.gcd(*(max(curve) - width for curve in curves for width in curve)) or 1
    target = -(-max(0, remove_total) // unit)
    best = torch.full((target + 1,), math.inf, dtype=torch.float64)  # by units removed, capped at the target
    best[0] = 0.0
    history: list[tuple[list[int], Tensor, Tensor]] = []  # widths, best before the layer, option by state
    for curve, weight in zip(curves, weights, strict=True):
        widths = sorted(curve, reverse=True)
        options = torch.full((len(widths), target + 1), math.inf, dtype=torch.float64)
        for i, width in enumerate(widths):
            step = min((widths[0] - width) // unit, target)
            options[i, step:] = best[: target + 1 - step] + weight * curve[width]
            options[i, target] = best[target - step :].min() + weight * curve[width]  # enough, or more
        history.append((widths, best, options.argmin(dim=0)))
        best = options.min(dim=0).values
    state, chosen = target, []
    for widths, before, option in reversed(history):
        width = widths[int(option[state])]
        step = min((widths[0] - width) // unit, target)
        state = state - step if state < target else target - step + int(before[target - step :].argmin())
        chosen.append(width)
    return chosen[::-1]


class _Elimination:
    """Columns of W removed one after the other, W and H^-1 always those of what is left."""

    def __init__(self, weight: Tensor, inverse: Tensor) -> None:
        self.weight = weight.clone()  # (d, f), removed columns are zero
        self.inverse = inverse  # (f, f), removed rows and columns are zero
        self.damping = 0.0  # the most that a step took, relative to the mean of what it inverted
        self.alive = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)

    def remove_until(self, keep: int, batch: int) -> None:
        """Remove until `keep` columns are left, at most `batch` at a time."""
        left = int(self.alive.sum())
        while left > keep:
            count = min(batch, left - keep)
            self._remove(count, left)
            left -= count

    def _remove(self, count: int, left: int) -> None:
        scores = self.weight.square().sum(0) / self.inverse.diagonal()
        scores = torch.where(self.alive, scores, math.inf)
        few = scores.topk(min(2 * count + SPARE, left), largest=False).indices.sort().values
        gram = self.weight[:, few].T @ self.weight[:, few]
        picked = _one_by_one(gram.cpu(), self.inverse[few][:, few].cpu(), count)
        removed = few[torch.tensor(picked, device=few.device)]
        rows = self.inverse[removed]  # (count, f)
        factor, used = shifted_cholesky(rows[:, removed], 0.0)
        self.damping = max(self.damping, used)
        half = torch.linalg.solve_triangular(factor, rows, upper=False)  # half^T half is the downdate
        self.weight -= self.weight[:, removed] @ torch.cholesky_solve(rows, factor)
        self.inverse.addmm_(half.T, half, alpha=-1)
        self.alive[removed] = False
        self.weight[:, removed] = 0
        self.inverse[removed] = 0
        self.inverse[:, removed] = 0


def _one_by_one(gram: Tensor, inverse: Tensor, count: int) -> list[int]:
    """The greedy order among a few candidates, each score exact after the removals before it.

    Args:
        gram: W_C^T W_C (c, c) of the candidates' columns.
        inverse: (H^-1)_CC (c, c).
    """
    gram, inverse = gram.clone(), inverse.clone()
    alive = torch.ones(gram.shape[0], dtype=torch.bool)
    picked: list[int] = []
    for _ in range(count):
        scores = torch.where(alive, gram.diagonal() / inverse.diagonal(), math.inf)
        j = int(scores.argmin())
        picked.append(j)
        alive[j] = False
        share = inverse[:, j] / inverse[j, j]  # w_i <- w_i - share_i w_j
        cross = torch.outer(share, gram[j])
        gram += torch.outer(share, share) * gram[j, j] - cross - cross.T
        inverse -= torch.outer(share, inverse[j])
        inverse[j, j] = 1.0
    return picked


def _choose(
    W: Tensor, moments: Tensor | None, keep: int, options: NeuronOptions, activation: Tensor | None
) -> tuple[Tensor, float]:
    """The neurons to keep, ascending, and the damping that the choice took (0 where it takes none)."""
    f = W.shape[1]
    if options.importance == "activation":
        if activation is None or activation.shape != (f,):
            raise ValueError(f"importance activation needs the mean activations of the {f} neurons")
        loudest = torch.argsort(activation.to(W), descending=True, stable=True)[:keep]
        return loudest.sort().values, 0.0
    if keep == f or moments is None:
        return torch.arange(f, device=W.device), 0.0
    if not options.compensate:
        return _drop_greedily(W, moments, keep), 0.0
    elimination, used = _start(W, moments, options.damping)
    elimination.remove_until(keep, _batch(f - keep))
    return elimination.alive.nonzero()[:, 0], max(used, elimination.damping)


def _drop_greedily(W: Tensor, moments: Tensor, keep: int) -> Tensor:
    """The columns to keep where nothing makes up for the others: one by one, tr(W_P H_PP W_P^T) the least."""
    losses = (W.T @ W) * moments.to(W)  # the loss of dropping P is the sum of losses[P, P]
    scores = losses.diagonal().clone()
    for _ in range(W.shape[1] - keep):
        j = int(scores.argmin())
        scores += 2 * losses[j]
        scores[j] = math.inf
    return scores.isfinite().nonzero()[:, 0]


def _start(W: Tensor, moments: Tensor, damping: float) -> tuple[_Elimination, float]:
    factor, used = damped_cholesky(moments, damping)
    return _Elimination(W, torch.cholesky_inverse(factor)), used


def _batch(count: int) -> int:
    return -(-count // ROUNDS)


def _moments(statistics: InputStatistics, device: torch.device, centred: bool) -> Tensor:
    """E[x x^T], or the covariance of x; (f, f) on `device`.

    A channel whose variance is lost in the rounding of its second moment counts as constant.
    """
    hessian = statistics.require_hessian().to(device)
    if not centred:
        return hessian
    mean = statistics.mean.to(device, torch.float64)
    covariance = torch.addr(hessian.double(), mean, mean, alpha=-1)
    rounding = torch.finfo(torch.float32).eps * hessian.diagonal().double()
    constant = covariance.diagonal() <= rounding
    covariance[constant] = 0
    covariance[:, constant] = 0
    return covariance


def _compensated(W: Tensor, moments: Tensor, kept: Tensor, damping: float) -> tuple[Tensor, float]:
    """W_K + W_P H_PK (H_KK)^-1, (d, kept) float64, and the damping that it took."""
    gone = _others(W.shape[1], kept)
    rows = moments[kept]  # (kept, f)
    factor, used = damped_cholesky(rows[:, kept], damping)
    target = rows[:, gone].to(W) @ W[:, gone].T  # H_KP W_P^T, (kept, d)
    return W[:, kept] + torch.cholesky_solve(target, factor).T, used


def _others(f: int, kept: Tensor) -> Tensor:
    """The mask (f,) of all columns but `kept`."""
    mask = torch.ones(f, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask


def _without(W: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
    """W - W', (d, f), where W' has `columns` at `kept` and zeros elsewhere."""
    delta = W.clone()
    delta[:, kept] -= columns.to(W)
    return delta


def _energy(delta: Tensor, moments: Tensor) -> Tensor:
    """tr(delta M delta^T), float64."""
    return ((delta @ moments.to(delta)) * delta).sum()


def _ratio(energy: Tensor, total: Tensor) -> float:
    return float((energy.clamp_min(0) / total).sqrt()) if float(total) > 0 else 0.0
