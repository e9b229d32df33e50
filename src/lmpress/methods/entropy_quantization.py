"""Entropy-coded quantization: GPTQ on a uniform grid of free step, whose codes go to an entropy coder.

A fixed number of bits makes every weight pay alike. With an entropy coder the step is free, and a weight
pays for its magnitude in steps. The feedback of GPTQ (arXiv 2210.17323), `H^-1 = U^T U`, makes the layer loss
a sum `sum_ij s_i e_ij^2 / U_jj^2`, where e_ij is the error of rounding and s_i the sensitivity of output i.
At high rates a step D costs D^2 / 12 and `-log2 D` bits, so that the least loss at any rate has

    D_ij = step * U_jj / sqrt(s_i),

with one `step` for the whole model: columns, rows and modules share bits by themselves. (For Gaussian weights
this is what information theory asks for, but for the 0.25 bits that any grid of single weights loses.)

Dead zone. A code nearer to zero saves bits; the best trade is rate-distortion optimal rounding, for Laplacian
weights of standard deviation S a shift of all thresholds by about 0.1 D / S. It is free at 4 bits, and saves
0.03, 0.09 and 0.15 bits at 2.7, 1.7 and 1.1 bits on SmolLM2-135M.

The rate is a target: `rate_curve` tells what a weight costs at every step without solving anything, and
`solve_step` finds the step at which all weights together meet the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms import EntropyCoded, coded_bits
from lmpress.methods.checks import check_layer
from lmpress.methods.gptq import asymmetric_target
from lmpress.methods.hessian import InverseFactor, damped_inverse_factor, feed_back, relative_loss
from lmpress.methods.result import Rewritten
from lmpress.statistics import InputStatistics

LARGEST_SHIFT = 0.3
"""Thresholds shift by no more than this part of a step."""

LEAST_ROW = 2.0**-10
"""The least step of a row, in smallest normal numbers of its type: the smallest there is of float16."""

ROWS = 16384
"""Rows that are solved at once: the tables of large vocabularies would take gigabytes."""

KNOTS = (*range(-11, -3), *(half / 2 for half in range(-6, 5)))
"""Where a rate curve is taken: log2 of the step over the weights' root mean square. It bends at low rates."""


@dataclass(frozen=True)
class EntropyOptions:
    """Options of `entropy_quantize`.

    Attributes:
        damping: added to the diagonal of H, relative to its mean; grows where H cannot be factored.
        per_channel_damping: relative to each H_jj instead of the mean.
        flat_columns: the same step for all columns of a weight, the geometric mean of the others.
        dead_zone: thresholds shift towards zero by this, times step over standard deviation; 0 rounds.
        largest_code: no code is larger; columns whose weights would need it get a wider step. With 127 the
            decoded codes take a byte each; None leaves them free.
        asymmetry: how far to move towards the target of asymmetric calibration, 0 to 1; needs `cross`.
        chunk_size: codes in a chunk of the coded form.
    """

    damping: float = 0.1
    per_channel_damping: bool = False
    flat_columns: bool = False
    dead_zone: float = 0.1
    largest_code: int | None = None
    asymmetry: float = 0.0
    chunk_size: int = 1 << 16

    def __post_init__(self) -> None:
        if self.damping < 0 or self.dead_zone < 0 or not 0 <= self.asymmetry <= 1 or self.chunk_size < 1:
            raise ValueError("damping and dead zone are at least 0, asymmetry is in 0..1, a chunk has codes")
        if self.largest_code is not None and self.largest_code < 1:
            raise ValueError("the largest code is at least 1")


@dataclass(frozen=True)
class StepShape:
    """The steps of a weight, but for one common factor: `D_ij = step * row_i * column_j`.

    Attributes:
        row: (out, 1) float16, or (1, 1) float32 where all outputs are as sensitive.
        column: (1, in) float16, of geometric mean about 1.
        unit: the factor that was taken out of the two.
    """

    row: Tensor
    column: Tensor
    unit: float

    def rows(self, step: float) -> Tensor:
        """`step * row_i` as it is stored; never zero, however small the weights are."""
        rows = self.row.float() * (step * self.unit)
        return rows.clamp_min(torch.finfo(self.row.dtype).smallest_normal * LEAST_ROW).to(self.row.dtype)


def entropy_quantize(
    weight: Tensor,
    statistics: InputStatistics,
    step: float,
    options: EntropyOptions,
    *,
    sensitivity: float | Tensor = 1.0,
    cross: Tensor | None = None,
) -> Rewritten:
    """Quantize `weight` (out, in) on a grid of steps `step * U_jj / sqrt(sensitivity_i)`, and code it.

    Args:
        weight: (out, in), floating point.
        statistics: of the input, with its Hessian.
        step: > 0, common to all weights that share a budget.
        sensitivity: s, the mean squared gradient of the model's loss by an output of this layer; one number,
            or one an output (out,), which costs 16 bits a row and pays: 19 % less KL divergence at the same
            3.0 bits on SmolLM2-135M, where s without the outputs' own share gives 34 % less than none at
            all.
        cross: C = E[(x_fp - x) x^T] (in, in) for asymmetric calibration, x being what `statistics` saw.

    Returns:
        An `EntropyCoded` form. The report has `damping`, `bits_per_weight` (all that is stored), `code_bytes`
        of a decoded code, `zeros` = the share of codes that are zero, `output_error` = relative squared error
        of the output over the calibration tokens, and `tokens`.

    Raises:
        ValueError: no Hessian, shapes that do not fit, values that are not finite, a step so small that codes
            need more than 32 bits.
    """
    check_layer(weight, statistics, cross=cross)
    hessian = statistics.require_hessian().to(weight.device, torch.float32)
    if not step > 0 or not math.isfinite(step):
        raise ValueError(f"a step is positive, not {step}")
    rank = torch.argsort(hessian.diagonal(), stable=True)  # ascending: a little better at low rates
    factor = _factor(hessian, rank, options)
    moved = None
    if cross is not None:
        moved = asymmetric_target(weight.float(), hessian, cross.to(hessian), factor, options.asymmetry, rank)
    target = weight.float() if moved is None else moved
    shape = step_shape(weight.shape[0], _in_order(factor.upper.diagonal(), rank), sensitivity, options)
    row = shape.rows(step)
    column = wide_enough(target, row, shape.column, options)
    codes = _solve(target, factor, rank, row.float(), column.float(), options)
    form = EntropyCoded.from_codes(codes, row, column, options.chunk_size)
    report: dict[str, Any] = {
        **factor.report(),
        "bits_per_weight": form.bits_per_weight,
        "code_bytes": form.itemsize,
        "zeros": float((codes == 0).float().mean()) if codes.numel() else 0.0,
        "tokens": statistics.count,
        "output_error": relative_loss(target, codes * row.float() * column.float(), hessian),
    }
    return Rewritten(form, report, moved)


def step_shape(
    rows: int, column_steps: Tensor, sensitivity: float | Tensor, options: EntropyOptions
) -> StepShape:
    """The steps of a weight with `rows` outputs: `U_jj / sqrt(s_i)`, in the precision that is stored.

    Args:
        column_steps: U_jj, (in,), as `conditional_deviations` gives them.

    Raises:
        ValueError: sensitivities that are negative, not finite, or not one an output.
    """
    log = column_steps.double().log()
    unit = float(log.mean().exp()) if log.numel() else 1.0
    relative = torch.ones_like(log) if options.flat_columns else column_steps.double() / unit
    tiny = torch.finfo(torch.float16).smallest_normal
    column = relative.clamp(tiny, torch.finfo(torch.float16).max).half()[None, :]
    device = column_steps.device
    if not isinstance(sensitivity, Tensor) or sensitivity.numel() == 1:
        value = float(sensitivity)
        if not 0 < value < math.inf:
            raise ValueError(f"a sensitivity is positive, not {value}")
        return StepShape(torch.ones(1, 1, device=device), column, unit / math.sqrt(value))
    if sensitivity.shape != (rows,) or not bool((sensitivity >= 0).all() & torch.isfinite(sensitivity).all()):
        raise ValueError(f"sensitivities are one an output ({rows}), finite and at least 0")
    floor = float(sensitivity.double().mean()) * 1e-4
    row = sensitivity.to(device, torch.float64).clamp_min(floor or 1.0).rsqrt()[:, None]
    scale = float(row.log().mean().exp())
    return StepShape((row / scale).half(), column, unit * scale)


def conditional_deviations(statistics: InputStatistics, options: EntropyOptions) -> Tensor:
    """U_jj of the input's damped Hessian, (in,), in the order of the inputs: what column steps go by.

    Few numbers that tell all a rate curve needs, so that Hessians need not be kept.
    """
    hessian = statistics.require_hessian().float()
    rank = torch.argsort(hessian.diagonal(), stable=True)
    return _in_order(_factor(hessian, rank, options).upper.diagonal(), rank)


def _factor(hessian: Tensor, rank: Tensor, options: EntropyOptions) -> InverseFactor:
    ordered = hessian[rank][:, rank]
    return damped_inverse_factor(ordered, options.damping, per_channel=options.per_channel_damping)


def _in_order(values: Tensor, rank: Tensor) -> Tensor:
    return torch.empty_like(values).scatter_(0, rank, values)


def wide_enough(target: Tensor, row: Tensor, column: Tensor, options: EntropyOptions) -> Tensor:
    """The column steps, wider where a code would be larger than it may be; ValueError if beyond float16."""
    if options.largest_code is None or not target.numel():
        return column
    needed = (target / row.float()).abs().amax(0, keepdim=True) / options.largest_code
    if float(needed.max()) > torch.finfo(torch.float16).max:
        raise ValueError(
            f"the step is too small to keep every code within {options.largest_code}: take a larger"
        )
    return torch.maximum(column.float(), needed).half()


def deviations(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations that factor by row and column: (out,) and (in,), with a product near |w_ij|."""
    tiny = torch.finfo(torch.float32).tiny
    column = weight.square().mean(0).sqrt().clamp_min(tiny)
    row = (weight / column).square().mean(1).sqrt().clamp_min(tiny)
    return row, (weight / row[:, None]).square().mean(0).sqrt().clamp_min(tiny)


def round_with_dead_zone(values: Tensor, deviation: Tensor, dead_zone: float) -> Tensor:
    """Whole numbers near `values` (in steps), thresholds shifted towards zero by their deviation."""
    if not dead_zone:
        return values.round()
    shift = (dead_zone / deviation).clamp_max(LARGEST_SHIFT)
    return torch.copysign((values.abs() + (0.5 - shift)).floor(), values)


def _solve(
    target: Tensor, factor: InverseFactor, rank: Tensor, row: Tensor, column: Tensor, options: EntropyOptions
) -> Tensor:
    """The codes (out, in) on the grid row * column, with error feedback in the order `rank`."""
    by_row, by_column = deviations(target)
    result = torch.empty_like(target)
    for part in range(0, target.shape[0], ROWS):  # no row knows of another
        here = slice(part, part + ROWS)
        step = row[here, 0] if row.shape[0] > 1 else row[:, 0].expand(target[here].shape[0])
        deviation = by_row[here] / step
        result[here] = _solve_rows(target[here], factor, rank, step, column, deviation, by_column, options)
    return result


def _solve_rows(
    target: Tensor,
    factor: InverseFactor,
    rank: Tensor,
    row: Tensor,
    column: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    options: EntropyOptions,
) -> Tensor:
    columns = target.T[rank].contiguous()  # (in, out)
    codes = torch.zeros_like(columns)
    steps, deviations = column[0, rank], (by_column / column[0])[rank]

    def snap(j: int, values: Tensor) -> Tensor:
        step = row * steps[j]
        codes[j] = round_with_dead_zone(values / step, by_row * deviations[j], options.dead_zone)
        if options.largest_code is not None:
            codes[j].clamp_(-options.largest_code, options.largest_code)
        return codes[j] * step

    feed_back(columns, factor.upper, snap)
    result = torch.empty_like(codes)
    result[rank] = codes
    return result.T


@dataclass(frozen=True)
class RateCurve:
    """What a weight costs at every step, estimated without feedback.

    Attributes:
        weights: number of weights.
        overhead: bits that do not depend on the step: scales, checksums.
        log_steps: log2 of the step, ascending.
        bits: of the codes at these steps, model included.
    """

    weights: int
    overhead: float
    log_steps: tuple[float, ...]
    bits: tuple[float, ...]

    def total_bits(self, step: float) -> float:
        """All bits of the weight at `step`; a bit a weight for every octave below the curve's first step."""
        at, (first, last) = math.log2(step), (self.log_steps[0], self.log_steps[-1])
        if at <= first:
            return self.overhead + self.bits[0] + self.weights * (first - at)
        if at >= last:
            return self.overhead + self.bits[-1]
        k = next(k for k, knot in enumerate(self.log_steps) if knot > at)
        share = (at - self.log_steps[k - 1]) / (self.log_steps[k] - self.log_steps[k - 1])
        return self.overhead + self.bits[k - 1] + share * (self.bits[k] - self.bits[k - 1])


def rate_curve(
    weight: Tensor,
    column_steps: Tensor,
    options: EntropyOptions,
    *,
    sensitivity: float | Tensor = 1.0,
    sample_rows: int = 128,
) -> RateCurve:
    """The rate of `weight` (out, in) at every step, from `sample_rows` of its rows, within about one percent.

    Args:
        column_steps: `conditional_deviations` of the input, (in,).
        sensitivity: as for `entropy_quantize`.
    """
    rows, columns = weight.shape
    shape = step_shape(rows, column_steps, sensitivity, options)
    overhead = 16.0 * columns + (16.0 * rows if shape.row.shape[0] > 1 else 32.0)
    overhead += 96 * (1 + weight.numel() // options.chunk_size)
    if not weight.numel():
        return RateCurve(0, overhead, (0.0,), (0.0,))
    picked = torch.linspace(0, rows - 1, min(rows, sample_rows), device=weight.device).round().long()
    sampled = weight[picked].float()
    row = shape.row.float() if shape.row.shape[0] == 1 else shape.row[picked].float()
    scaled = sampled / (row * shape.column.float() * shape.unit)  # in units of the step
    by_row, by_column = deviations(scaled)
    deviation = by_row[:, None] * by_column
    middle = math.log2(max(float(scaled.square().mean().sqrt()), 1e-30))
    log_steps, bits = [], []
    for octave in KNOTS:
        log_steps.append(middle + octave)
        size: float | Tensor = math.exp2(log_steps[-1])
        if options.largest_code is not None:
            size = (scaled.abs().amax(0) / options.largest_code).clamp_min(size)
        codes = round_with_dead_zone(scaled / size, deviation / size, options.dead_zone)
        bits.append(coded_bits(codes) * rows / len(picked))
    return RateCurve(weight.numel(), overhead, tuple(log_steps), tuple(bits))


def solve_step(curves: Sequence[RateCurve], bits_per_weight: float) -> float:
    """The step at which all weights together take `bits_per_weight`, by bisection on their curves.

    Raises:
        ValueError: nothing to solve for, or a target below what scales and tables take; it tells the least.
    """
    weights = sum(curve.weights for curve in curves)
    if not weights:
        raise ValueError("there is no weight to quantize")

    def rate(log_step: float) -> float:
        return sum(curve.total_bits(math.exp2(log_step)) for curve in curves) / weights

    low, high = -60.0, max(curve.log_steps[-1] for curve in curves)
    if rate(high) > bits_per_weight:
        raise ValueError(
            f"{bits_per_weight:.3f} bits a weight cannot be met: "
            f"scales and tables alone take {rate(high):.3f}, which is the least"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > bits_per_weight else (low, middle)
    return math.exp2(high)


def refine_step(
    measure: Callable[[float], float],
    step: float,
    bits_per_weight: float,
    *,
    tolerance: float,
    rounds: int = 4,
) -> tuple[float, float]:
    """Correct a step by what the coded weights really take.

    Args:
        measure: step -> bits a weight, of really coded weights.
        step: where to start, such as the result of `solve_step`.
        tolerance: bits a weight below the target that will do; never above it.
        rounds: at most this many measurements.

    Returns:
        The largest rate within the target that was measured: its step, and the rate; where every rate
        measured is above, the least of them.
    """
    tried: list[tuple[float, float]] = []  # (log2 step, rate)
    at = math.log2(step)
    for _ in range(rounds):
        rate = measure(math.exp2(at))
        tried.append((at, rate))
        if bits_per_weight - tolerance <= rate <= bits_per_weight:
            break
        slope = -1.0
        if len(tried) > 1 and tried[-2][0] != at:
            slope = min(-0.2, max(-2.0, (tried[-2][1] - rate) / (tried[-2][0] - at)))
        at += (bits_per_weight - tolerance / 2 - rate) / slope
    within = [(rate, -log) for log, rate in tried if rate <= bits_per_weight]
    rate, log = max(within) if within else min((rate, -log) for log, rate in tried)
    return math.exp2(-log), rate
