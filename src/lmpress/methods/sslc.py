"""SSLC: a weight as a sparse plus a low-rank matrix, solved for together (arXiv 2510.26446).

    min || (W - S - L) X ||_F   over S with k entries (or an n:m pattern) and L of rank r

by alternation, each side taking up what the other leaves. Two metrics:

`diagonal`: E[x x^T] by its diagonal alone, as SSLC and OATS (arXiv 2409.13652) have it. The best S is the
largest entries of the scaled residual row by row, the best L its leading directions, and the error falls at
every step.

`hessian`: the full E[x x^T], as in 3BASiL (arXiv 2603.01376). S by one step of ADMM (ALPS, arXiv 2406.07831)
between any two steps of L, which is solved for in closed form on what Z, the sparse side of ADMM, leaves;
at the end, the values on the support are the best ones. Per layer this ends well below alternating
SparseGPT with L.

L comes from subspace iteration that starts where the last round ended: one thin step instead of an SVD. The
most salient weights (the largest `|W_ij| sqrt(E[x_j^2])`) always stay in S, and the first L does not see
them.

Errors of outputs may count by weights of their own (rows of S compete, and L serves those that matter), and
the target may be moved towards what the outputs are in the dense model (see `gptq.asymmetric_target`).

Budget, in parameters as OATS counts them: of the 1 - c that are kept, kappa goes to L,
`r = floor(kappa (1 - c) m n / (m + n))`, and S has the density `(1 - kappa)(1 - c)`. An n:m pattern fixes the
density of S, and L comes on top, `r = floor(kappa / (1 - kappa) (n / m) ...)`. `kappa=None` searches for
the best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Sum
from lmpress.methods.alps import Admm, Metric, moved_target, refit
from lmpress.methods.checks import check_layer
from lmpress.methods.hessian import relative_loss
from lmpress.methods.low_rank_correction import CorrectionOptions, quantized_factors
from lmpress.methods.patterns import keep_largest, parse_pattern, sparse_form, with_priority
from lmpress.methods.result import Rewritten
from lmpress.methods.sparsegpt import SparseGptOptions, solve_survivors
from lmpress.methods.subspace import Subspace, balanced
from lmpress.methods.wanda import wanda_scores
from lmpress.statistics import InputStatistics

METRICS = ("hessian", "diagonal")
MOST_PROTECTED = 0.5
"""The share of the entries of S that protection may take: the others are S's to choose."""
SPLITS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""What the search tries for kappa, in this order, until the error has risen twice."""


@dataclass(frozen=True)
class SslcOptions:
    """Options of `sslc`.

    Attributes:
        sparsity: c, the share of the parameters that is removed; an n:m pattern fixes its own density
            instead.
        kappa: the share of the kept parameters that goes to the low-rank term; None to search for it.
        pattern: of S: `unstructured`, or `n:m` with n kept of every m.
        metric: `hessian` or `diagonal`.
        iterations: rounds at most; with the Hessian about 90 are needed, with the diagonal the more the
            better.
        growth: of the ADMM penalty (see `alps.Admm`); slow, so that L keeps up with S.
        protect: the share of the weights that always stay in S; never more than half of what S keeps, so that
            it can still follow L.
        damping: added to every H_jj, relative to itself; a tenth does best on text that was not seen.
        refit: conjugate-gradient steps on the support at the end.
        seed: of the first directions of L.
        survivors: how to quantize S (its `bits`, `granularity`, ...), jointly compensated; None for floats.
        factors: how to quantize the factors of L (`bits`, `granularity`); its rank plays no part. None for
            floats.
        asymmetry: how far to move towards the target of asymmetric calibration, 0 to 1; needs `cross`.
    """

    sparsity: float = 0.5
    kappa: float | None = 0.2
    pattern: str = "unstructured"
    metric: Literal["hessian", "diagonal"] = "hessian"
    iterations: int = 120
    growth: tuple[float, float, float] = (1.1, 1.05, 1.02)
    protect: float = 0.01
    damping: float = 0.1
    refit: int = 10
    seed: int = 0
    survivors: SparseGptOptions | None = None
    factors: CorrectionOptions | None = None
    asymmetry: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or not 0 <= self.protect < 1:
            raise ValueError("sparsity and protect lie in [0, 1)")
        if self.kappa is not None and not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa lies in 0..1, not at {self.kappa}")
        if self.metric not in METRICS:
            raise ValueError(f"the metric is one of {', '.join(METRICS)}, not {self.metric!r}")
        if parse_pattern(self.pattern) and (self.kappa is None or self.kappa == 1):
            raise ValueError("an n:m pattern needs a kappa below 1: there is no budget to split")
        if self.survivors is not None and self.survivors.pattern != self.pattern:
            raise ValueError("the survivors' options name another pattern")
        if self.iterations < 1 or self.refit < 0 or self.damping < 0 or not 0 <= self.asymmetry <= 1:
            raise ValueError("iterations are at least 1, refit and damping at least 0, asymmetry is in 0..1")


def sslc(
    weight: Tensor,
    statistics: InputStatistics,
    options: SslcOptions,
    cross: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Rewritten:
    """Rewrite `weight` (out, in) as sparse + low-rank.

    Args:
        weight: (out, in), floating point.
        statistics: of the input, with its Hessian for the metric `hessian`, for any quantization and for a
            `cross`.
        cross: C = E[(x_fp - x) x^T] (in, in) for asymmetric calibration; None for none.
        row_weights: (out,) positive, what an error of each output counts; None for all alike.

    Returns:
        `Sum(Sparse, LowRank)` in the weight's dtype or quantized; only one of the two where the budget
        leaves the other nothing. The report has `kappa`, `rank`, `density` and `parameters` (share kept) of
        the form, the `damping` that it took, `iterations`, `output_error` (relative squared error of the
        output over the calibration tokens, where the Hessian is known) and `curve`: the least error so far in
        the damped metric, outputs by their weights, from round to round. With a `cross`, errors are those
        against the moved target. With a search, also `splits`: the error by kappa after its short runs.

    Raises:
        ValueError: missing statistics, shapes that do not fit, an m that does not divide the columns.
    """
    check_layer(weight, statistics, cross=cross, row_weights=row_weights)
    moved = splits = None
    if cross is not None:
        hessian = statistics.require_hessian().to(weight.device, torch.float32)
        moved = moved_target(weight.float(), hessian, cross, options.damping, options.asymmetry)
    target = weight.float() if moved is None else moved
    if options.kappa is None:
        kappa, splits = best_split(target, statistics, options, row_weights)
        options = replace(options, kappa=kappa)
    problem = _Problem(target, statistics, options, row_weights)
    rounds = problem.by_admm() if options.metric == "hessian" else problem.by_alternation()
    form = problem.form(statistics, weight.dtype)
    report: dict[str, Any] = {
        "kappa": options.kappa,
        **parameters(form),
        "damping": max(problem.damping, options.damping + problem.subspace.damping),
        "metric": options.metric,
        "iterations": rounds,
        "curve": [float(f"{error:.4g}") for error in problem.curve],
    }
    if statistics.hessian is not None:
        report["output_error"] = relative_loss(target, form.dense(), statistics.hessian.to(weight.device))
    return Rewritten(form, report if splits is None else report | {"splits": splits}, moved)


def split_budget(
    shape: tuple[int, int], sparsity: float, kappa: float, group: tuple[int, int] | None = None
) -> tuple[int, float]:
    """(rank, density of S) for a share kappa of the kept parameters in the low-rank term (OATS, section 3).

    >>> split_budget((4096, 4096), 0.5, 0.25)
    (256, 0.375)
    """
    m, n = shape
    density = (1 - kappa) * (1 - sparsity)
    kept = 1 - sparsity
    if group:
        density = group[0] / group[1]
        kept = density / (1 - kappa)
    return min(int(kappa * kept * m * n / (m + n) + 1e-9), m, n), density


def parameters(form: Form) -> dict[str, Any]:
    """What a form of sparse and low-rank terms keeps: `rank`, `density`, and the share of `parameters`."""
    m, n = form.shape
    size = max(1, m * n)
    kept = sum(round(term.density * size) for term in form.addends if not term.is_product)
    rank = sum(term.parts()[0].form.shape[0] for term in form.addends if term.is_product)
    return {"rank": rank, "density": kept / size, "parameters": (kept + rank * (m + n)) / size}


def best_split(
    weight: Tensor, statistics: InputStatistics, options: SslcOptions, row_weights: Tensor | None = None
) -> tuple[float, dict[str, float]]:
    """The kappa of the least error in short runs, and the errors by kappa."""
    short = replace(
        options, growth=(1.3, 1.2, 1.1), iterations=min(30, options.iterations), survivors=None, factors=None
    )
    errors: dict[float, float] = {}
    rises = 0
    for kappa in SPLITS:
        problem = _Problem(weight.float(), statistics, replace(short, kappa=kappa), row_weights)
        if options.metric == "hessian":
            problem.by_admm()
        else:
            problem.by_alternation()
        rises += bool(errors) and problem.curve[-1] > min(errors.values())
        errors[kappa] = problem.curve[-1]
        if rises == 2:
            break
    best = min(errors, key=lambda kappa: errors[kappa])
    return best, {str(kappa): float(f"{error:.4g}") for kappa, error in errors.items()}


class _Problem:
    """One weight diag(r) W diag(s) = S + L: outputs by their weight, inputs so that the metric has a unit
    diagonal."""

    def __init__(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        options: SslcOptions,
        row_weights: Tensor | None,
    ) -> None:
        assert options.kappa is not None
        self.options, self.weight, self.row_weights = options, weight, row_weights
        self.rows = weight.new_ones(()) if row_weights is None else row_weights.to(weight)[:, None]
        self.group = parse_pattern(options.pattern)
        shape = (weight.shape[0], weight.shape[1])
        self.rank, self.density = split_budget(shape, options.sparsity, options.kappa, self.group)
        full = options.metric == "hessian"
        hessian = statistics.require_hessian() if full else torch.diag(statistics.second_moment)
        self.metric = Metric.of(hessian.to(weight.device, torch.float32), options.damping)
        self.matrix = self.metric.matrix if full else None
        self.target = self._scaled(weight)
        self.image = self._times(self.target)
        self.total = float((self.image * self.target).sum())
        scores = wanda_scores(weight, statistics) * self.rows
        share = min(options.protect, MOST_PROTECTED * self.density)
        self.protected = keep_largest(scores, share, None, per_row=False)
        self.subspace = Subspace(*shape, self.rank, options.seed, weight.device)
        self.curve: list[float] = []
        self.damping = options.damping
        self.left, self.right = self._low_rank(None, 4)

    def _scaled(self, weight: Tensor) -> Tensor:
        return self.metric.scaled(weight) * self.rows

    def _unscaled(self, scaled: Tensor) -> Tensor:
        return self.metric.unscaled(scaled) / self.rows

    def _times(self, matrix: Tensor) -> Tensor:
        return matrix if self.matrix is None else matrix @ self.matrix

    def _low_rank(self, sparse: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
        """L = left @ right for what S leaves; for None, for what the protected weights leave."""
        residual = self.target - (self.target * self.protected if sparse is None else sparse)
        if not self.rank:
            return residual[:, :0], residual[:0]
        return self.subspace.project(residual, self.matrix, steps)

    def _error(self, sparse: Tensor, left: Tensor, right: Tensor) -> float:
        """||(W - S - L) X||^2 / ||W X||^2."""
        difference = self.target - sparse - left @ right
        return float((self._times(difference) * difference).sum()) / self.total if self.total else 0.0

    def _keep(self, sparse: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> None:
        """Remember the best so far, and go on with the curve."""
        error = self._error(sparse, left, right)
        if not self.curve or error <= self.curve[-1]:
            self.sparse, self.mask, self.left, self.right = sparse, mask.bool(), left, right
        self.curve.append(min([error, *self.curve[-1:]]))

    def by_alternation(self) -> int:
        """The metric `diagonal`: both sides solved for in turn; returns the rounds."""
        left, right = self.left, self.right
        for _ in range(self.options.iterations):
            residual = self.target - left @ right
            scores = with_priority(residual.abs(), self.protected)
            mask = keep_largest(scores, self.density, self.group, per_row=True)
            sparse = residual * mask
            left, right = self._low_rank(sparse, 2)
            self._keep(sparse, mask, left, right)
        # L has moved since the last S: the values of S on its support are best as what L leaves
        self._keep((self.target - self.left @ self.right) * self.mask, self.mask, self.left, self.right)
        return self.options.iterations

    def by_admm(self) -> int:
        """The metric `hessian`: a step of ADMM, a step of L, and so on; returns the rounds."""
        options = self.options
        if not self.density:
            nothing = torch.zeros_like(self.target)
            self._keep(nothing, nothing, *self._low_rank(None, 8))
            return 1
        admm = Admm(self.metric, self.density, self.group, options.growth, self.protected)
        left, right = self.left, self.right
        admm.start(self.target - left @ right)
        while admm.steps < options.iterations and not admm.settled:
            admm.step(self.image - left @ self._times(right))
            left, right = self._low_rank(admm.sparse, 1)
            if admm.steps % 10 == 0:
                self._keep(admm.sparse, admm.support, left, right)
        self._keep(admm.sparse, admm.support, left, right)
        self.damping = admm.damping
        for _ in range(2):
            sparse = self._refit(self.target - self.left @ self.right, self.sparse, options.refit // 2)
            self._keep(sparse, self.mask, *self._low_rank(sparse, 1))
        return admm.steps

    def _refit(self, target: Tensor, start: Tensor, steps: int) -> Tensor:
        """The best values of S on its support for a scaled target."""
        best = refit(self._unscaled(target), self.metric, self.mask, self._unscaled(start), steps)
        return self._scaled(best)

    def form(self, statistics: InputStatistics, dtype: torch.dtype) -> Form:
        """The result, quantized as the options say: L first, then S, which makes up for the error of L."""
        options = self.options
        terms: list[Form] = []
        low_rank = None
        if self.rank:
            low_rank = self._low_rank_form(statistics, dtype)
        if self.density:
            target = self.weight if low_rank is None else self.weight - low_rank.dense()
            if options.survivors is not None:
                hessian = statistics.require_hessian().to(target)
                solved = solve_survivors(target, hessian, self.mask, options.survivors)
                self.damping = max(self.damping, solved.report["damping"])
                terms.append(solved.form)
            else:
                values = self.sparse
                if options.factors is not None:
                    values = self._refit(self._scaled(target), values, options.refit)
                terms.append(sparse_form(self._unscaled(values), self.mask, self.group, dtype))
        if low_rank is not None:
            terms.append(low_rank)
        if not terms:
            raise ValueError("the budget leaves neither a sparse nor a low-rank term")
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def _low_rank_form(self, statistics: InputStatistics, dtype: torch.dtype) -> LowRank:
        if self.options.factors is not None:
            residual, how = self._unscaled(self.target - self.sparse), self.options.factors
            factors, used = quantized_factors(residual, statistics, self.rank, how, self.row_weights)
            self.damping = max(self.damping, how.damping + used)
            return factors
        left, right = balanced(self.left, self.metric.unscaled(self.right))
        return LowRank(Dense((left / self.rows).to(dtype)), Dense(right.to(dtype)))
