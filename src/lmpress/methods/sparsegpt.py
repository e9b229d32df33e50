"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv 2301.00774, algorithm 1).

Minimises `tr((W - B) H (W - B)^T)`, H = E[x x^T], over sparse matrices B. Column by column, with
`H^-1 = U^T U` (U upper triangular), a removed or quantized weight is made up for by the columns after it:

    keep w_j or not by `w_j^2 / U_jj^2`;     w_k <- w_k - (w_j - b_j) U_jk / U_jj   for every later column k

The choice is made over all rows of a block of 128 columns at once, when the block's turn comes; for n:m
patterns over each m weights of a row when theirs comes.

Jointly with quantization, survivors snap to their grid in the same pass, `b_j = Q(w_j)`, so that later
columns make up for both errors, and the score is what removing costs more than keeping does, `(w_j^2 - (w_j
- Q(w_j))^2) / U_jj^2`. Joint pruning and quantization (arXiv 2505.07289) tells two cases apart: A,
everything is quantized, zeros included, and B, only the survivors are. In case A the grid is fitted to the
whole weight, and zeros are codes like any other; in case B it is fitted to the survivors of a first pass
without quantization, and only their codes and the pattern are stored.

After the pass, sweeps of coordinate descent on the fixed pattern (QuantEase, arXiv 2309.01885) never raise
the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lmpress.forms import Form
from lmpress.methods.checks import check_layer
from lmpress.methods.gptq import asymmetric_target
from lmpress.methods.hessian import InverseFactor, damped_inverse_factor, feed_back, relative_loss
from lmpress.methods.patterns import (
    Grid,
    check_grid_fits,
    dense_quantized_form,
    density_of,
    keep_largest,
    parse_pattern,
    sparse_form,
    sparse_quantized_form,
    survivors,
)
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import fit_grid, parse_granularity
from lmpress.statistics import InputStatistics

CASES = ("survivors", "all")


@dataclass(frozen=True)
class SparseGptOptions:
    """Options of `sparsegpt`.

    Attributes:
        sparsity: the share that is removed, of each block of columns; an n:m pattern has its own.
        pattern: `unstructured`, or `n:m` with n kept of every m.
        bits: 2 to 8 to quantize in the same pass; None to leave the survivors in floating point.
        case: `survivors` (B) or `all` (A), see above.
        granularity: of the grid over the whole matrix: `tensor`, `channel` or `group:N`.
        symmetric: no zero points; needed for unstructured survivors with a grid by row or group.
        clip: search the range of every scale for the least squared error, weighted by E[x^2].
        damping: added to the diagonal of H, relative to its mean; grows where H cannot be factored.
        per_channel_damping: relative to each H_jj instead of the mean.
        block: columns whose weights compete for one budget (unstructured).
        sweeps: passes of coordinate descent after the pruning; each costs about as much as the pruning.
        asymmetry: how far to move towards the target of asymmetric calibration, 0 to 1; needs `cross`.
        scale_dtype: of the stored scales; None for float16 where it is precise enough, else float32.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    bits: int | None = None
    case: Literal["survivors", "all"] = "survivors"
    granularity: str = "channel"
    symmetric: bool = True
    clip: bool = True
    damping: float = 0.01
    per_channel_damping: bool = False
    block: int = 128
    sweeps: int = 0
    asymmetry: float = 0.0
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        density_of(self.pattern, self.sparsity)
        if self.case not in CASES:
            raise ValueError(f"the case is one of {', '.join(CASES)}, not {self.case!r}")
        if self.damping < 0 or self.sweeps < 0 or self.block < 1 or not 0 <= self.asymmetry <= 1:
            raise ValueError("damping and sweeps are at least 0, block at least 1, asymmetry is in 0..1")
        if self.bits is not None:
            if not 2 <= self.bits <= 8:
                raise ValueError(f"survivors are quantized to 2 to 8 bits, not {self.bits}")
            parse_granularity(self.granularity)
            if self.case == "survivors":
                check_grid_fits(self.symmetric, self.granularity == "tensor", parse_pattern(self.pattern))


def sparsegpt(
    weight: Tensor,
    statistics: InputStatistics,
    options: SparseGptOptions,
    cross: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Rewritten:
    """Prune `weight` (out, in), and quantize it in the same pass where `bits` is set.

    Args:
        weight: (out, in), floating point.
        statistics: of the input, with its Hessian.
        cross: C = E[(x_fp - x) x^T] (in, in) for asymmetric calibration; None for none.
        row_weights: (out,) positive, what an error of each output counts: rows compete for what is kept.
            None for all alike.

    Returns:
        `Sparse(pattern, Dense)` in the weight's dtype; with `bits`, `Sparse(pattern, Quantized)` or, in case
        `all`, a `Quantized` with zeros. The report has the `damping` used, `density` and `output_error`, the
        relative squared error of the output over the calibration tokens, against the moved target where there
        is a `cross`.

    Raises:
        ValueError: no Hessian, shapes that do not fit, an m that does not divide the columns, a weight or a
            Hessian that is not finite.
    """
    check_layer(weight, statistics, cross=cross, row_weights=row_weights)
    hessian = statistics.require_hessian().to(weight.device, torch.float32)
    factor = damped_inverse_factor(hessian, options.damping, per_channel=options.per_channel_damping)
    moved = grid = None
    if cross is not None:
        moved = asymmetric_target(weight.float(), hessian, cross.to(hessian), factor, options.asymmetry)
    target = weight.float() if moved is None else moved
    if options.bits is not None:
        fitted = target
        if options.case == "survivors":
            pruned = _Solver(target, replace(options, bits=None), None, None, row_weights)
            pruned.solve(factor.upper)
            fitted = pruned.columns.T
        grid = _fit(fitted, hessian, options)
    solved = _solve(target, weight.dtype, hessian, factor, options, None, grid, row_weights)
    return replace(solved, target=moved)


def quantize_survivors(form: Form, statistics: InputStatistics, options: SparseGptOptions) -> Rewritten:
    """Quantize what an earlier pruning left: prune, then quantize, one after the other.

    The pattern stays; the survivors make up for each other's rounding errors, measured against the pruned
    weight. `sparsegpt` with `bits` does both at once, and better.

    Args:
        form: any form; its zeros (for `Sparse`, its pattern) are what was pruned.
        statistics: of the input, with its Hessian.
        options: as for `sparsegpt`, with `bits`; `sparsity` and `block` play no part.
    """
    if options.bits is None:
        raise ValueError("quantizing survivors needs a number of bits")
    weight, mask = survivors(form)
    check_layer(weight, statistics)
    hessian = statistics.require_hessian().to(weight.device, torch.float32)
    factor = damped_inverse_factor(hessian, options.damping, per_channel=options.per_channel_damping)
    return _solve(weight, weight.dtype, hessian, factor, options, mask, _fit(weight, hessian, options))


def prune_then_quantize(weight: Tensor, statistics: InputStatistics, options: SparseGptOptions) -> Rewritten:
    """`sparsegpt` without bits and then `quantize_survivors`: what the one pass is to be compared with."""
    pruned = sparsegpt(weight, statistics, replace(options, bits=None)).form
    result = quantize_survivors(pruned, statistics, options)
    hessian = statistics.require_hessian().to(weight.device, torch.float32)
    error = relative_loss(weight, result.form.dense(), hessian)
    return Rewritten(result.form, result.report | {"output_error": error})


def solve_survivors(target: Tensor, hessian: Tensor, mask: Tensor, options: SparseGptOptions) -> Rewritten:
    """The best `Sparse` form with a given mask for `target` (out, in), quantized where `options.bits` is
    set."""
    factor = damped_inverse_factor(hessian, options.damping, per_channel=options.per_channel_damping)
    grid = None if options.bits is None else _fit(target * mask, hessian, options)
    return _solve(target.float(), target.dtype, hessian, factor, options, mask, grid)


def _fit(weight: Tensor, hessian: Tensor, options: SparseGptOptions) -> Grid:
    """A grid for `weight`, whose zeros cost nothing: zero is a point of every grid."""
    assert options.bits is not None
    scale, zero = fit_grid(
        weight,
        options.bits,
        options.granularity,
        options.symmetric,
        scale_dtype=options.scale_dtype,
        clip=options.clip,
        importance=hessian.diagonal().clamp_min(0) if options.clip else None,
    )
    return Grid(scale, zero, options.bits)


def _solve(
    target: Tensor,
    dtype: torch.dtype,
    hessian: Tensor,
    factor: InverseFactor,
    options: SparseGptOptions,
    mask: Tensor | None,
    grid: Grid | None,
    row_weights: Tensor | None = None,
) -> Rewritten:
    solver = _Solver(target, options, mask, grid, row_weights)
    solver.solve(factor.upper)
    for _ in range(options.sweeps):
        solver.sweep(hessian, factor)
    form = solver.form(dtype)
    report: dict[str, Any] = {
        **factor.report(),
        "density": form.density,
        "output_error": relative_loss(target, form.dense(), hessian),
    }
    if grid is not None:
        report |= {"bits": grid.bits, "granularity": options.granularity, "case": options.case}
    return Rewritten(form, report)


class _Solver:
    """SparseGPT on one weight: the columns as rows of a transposed copy."""

    def __init__(
        self,
        target: Tensor,
        options: SparseGptOptions,
        mask: Tensor | None,
        grid: Grid | None,
        row_weights: Tensor | None,
    ) -> None:
        self.options, self.grid = options, grid
        self.row_scores = None if row_weights is None else row_weights.to(target).square()
        self.group = parse_pattern(options.pattern)
        self.density = density_of(options.pattern, options.sparsity)
        self.original = target.T.contiguous()  # (in, out)
        self.columns = self.original.clone()
        self.n, self.rows = self.columns.shape
        self.keep = torch.zeros_like(self.columns, dtype=torch.bool) if mask is None else mask.T.contiguous()
        self.chosen = mask is not None
        self.run = self.group[1] if self.group else options.block
        if self.n % self.run and self.group:
            raise ValueError(
                f"{options.pattern} sparsity needs a multiple of {self.run} columns, not {self.n}"
            )
        if grid is not None:
            self.codes = torch.zeros_like(self.columns)
            self.per_scale = max(1, self.n // grid.scale.shape[1])
            self.steps = grid.scale.float().T.contiguous()  # (groups, out or 1)
            self.offsets = None if grid.zero is None else grid.zero.float().T.contiguous()
            largest = (1 << grid.bits - 1) - 1
            lowest = -largest if grid.bits == 8 else -largest - 1
            self.range = (lowest, largest) if grid.zero is None else (0, (1 << grid.bits) - 1)

    def _choose(self, start: int, diagonal: Tensor) -> None:
        """Fix which weights of the run of columns from `start` stay: those that cost most to remove."""
        run = slice(start, min(start + self.run, self.n))
        scores = self.columns[run].square()  # (run, out)
        if self.grid is not None:
            scores -= (self.columns[run] - self._rounded(run)).square()  # what keeping them costs
        scores /= diagonal[run, None].square()
        if self.row_scores is not None:
            scores *= self.row_scores
        if self.group:
            kept = scores.topk(self.group[0], dim=0, sorted=False).indices
            self.keep[run].scatter_(0, kept, True)
        else:
            self.keep[run] = keep_largest(scores, self.density, None, per_row=False)

    def _rounded(self, run: slice) -> Tensor:
        """The grid points nearest to a run of columns (run, out)."""
        self.keep[run] = True
        rounded = [self._snap(j, self.columns[j]) for j in range(run.start, run.stop)]
        self.keep[run] = False
        return torch.stack(rounded)

    def _snap(self, j: int, column: Tensor) -> Tensor:
        if self.grid is None:
            return column * self.keep[j]
        step = self.steps[j // self.per_scale]
        codes = (column / step).round_()
        if self.offsets is None:
            self.codes[j] = codes.clamp_(*self.range)
            return codes.mul_(step).mul_(self.keep[j])
        offset = self.offsets[j // self.per_scale]
        self.codes[j] = codes.add_(offset).clamp_(*self.range)
        return codes.sub_(offset).mul_(step).mul_(self.keep[j])

    def solve(self, upper: Tensor) -> None:
        """The pass over the columns; fills `keep`, `columns` and `codes`."""
        diagonal = upper.diagonal()

        def snap(j: int, column: Tensor) -> Tensor:
            if not self.chosen and j % self.run == 0:
                self._choose(j, diagonal)
            return self._snap(j, column)

        feed_back(self.columns, upper, snap, align=1 if self.chosen else self.run)
        self.chosen = True

    def sweep(self, hessian: Tensor, factor: InverseFactor) -> None:
        """One pass of coordinate descent on the damped loss, with the pattern fixed."""
        matrix = hessian.clone()
        matrix.diagonal().copy_(factor.energy + factor.added)
        difference = self.original - self.columns  # (in, out)
        for start in range(0, self.n, 128):
            block = slice(start, min(self.n, start + 128))
            gradient = matrix[block] @ difference
            for k, j in enumerate(range(block.start, block.stop)):
                snapped = self._snap(j, self.columns[j] + gradient[k] / matrix[j, j])
                change = snapped - self.columns[j]
                gradient[k:].addr_(matrix[j, j : block.stop], change, alpha=-1)
                difference[j] -= change
                self.columns[j] = snapped

    def form(self, dtype: torch.dtype) -> Form:
        mask = self.keep.T.contiguous()
        if self.grid is None:
            return sparse_form(self.columns.T, mask, self.group, dtype)
        codes = self.codes.T.to(torch.int8 if self.grid.zero is None else torch.uint8).contiguous()
        if self.options.case == "all":
            return dense_quantized_form(codes, mask, self.grid)
        return sparse_quantized_form(codes, mask, self.group, self.grid)
