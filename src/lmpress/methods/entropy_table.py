"""Entropy-coded quantization of one weight with bits of its own: a table of embeddings, or a head.

What an error costs. A row of a head meets the hidden state x in front of it: with p_i the probability of
token i, an error e in its row costs about `p_i e H e^T / 2` in KL divergence, H = E[x x^T]. A row of an
embedding is looked up whenever its token comes, about as often, and costs `p_i sum_j G_j e_j^2 / 2`, G_j the
mean squared gradient of the model's loss by component j of what is looked up. A tied table pays both:
`p_i e (H + diag G) e^T / 2`. So the machinery of `entropy_quantize` applies, with H + diag G for the Hessian
and p_i for the sensitivity of row i. (p_i is known from a little text: a power below one hedges.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmpress.forms import EntropyCoded
from lmpress.methods.checks import check_layer
from lmpress.methods.entropy_quantization import (
    EntropyOptions,
    conditional_deviations,
    deviations,
    entropy_quantize,
    rate_curve,
    refine_step,
    round_with_dead_zone,
    solve_step,
    step_shape,
    wide_enough,
)
from lmpress.methods.result import Rewritten
from lmpress.statistics import InputStatistics

SAMPLE_ROWS = 1024
"""Rows that the first guess of the step is made from."""


def entropy_round(
    weight: Tensor,
    bits: float,
    options: EntropyOptions,
    *,
    sensitivity: float | Tensor = 1.0,
    statistics: InputStatistics | None = None,
) -> Rewritten:
    """Quantize one `weight` (out, in), such as a table of embeddings, to `bits` a weight of its own.

    Args:
        bits: all that is stored, over the number of weights; the result is at most this, and near to it.
        sensitivity: one number, or one a row (out,): how much an error there counts.
        statistics: with a Hessian, the metric of an error in a row; None for the squared error.

    Returns:
        An `EntropyCoded` form, and the report of `entropy_quantize`; without statistics it has
        `weight_error` = ||W - W'|| / ||W|| instead of `output_error`, and no damping.

    Raises:
        ValueError: a weight that is not finite, or bits that cannot be met, with the least that can.
    """
    check_layer(weight, statistics)
    target = weight.float()
    steps = torch.ones(weight.shape[1], device=weight.device)
    if statistics is not None:
        steps = conditional_deviations(statistics, options)
    last: dict[float, Rewritten] = {}

    def coded(step: float) -> Rewritten:
        if statistics is None:
            result = _rounded(target, step, options, sensitivity)
        else:
            result = entropy_quantize(target, statistics, step, options, sensitivity=sensitivity)
        last.clear()
        last[step] = result
        return result

    curve = rate_curve(target, steps, options, sensitivity=sensitivity, sample_rows=SAMPLE_ROWS)
    start = solve_step([curve], bits)
    step, _ = refine_step(
        lambda step: float(coded(step).report["bits_per_weight"]),
        start,
        bits,
        tolerance=0.005 * max(1.0, bits),
    )
    return last[step] if step in last else coded(step)


def _rounded(target: Tensor, step: float, options: EntropyOptions, sensitivity: float | Tensor) -> Rewritten:
    """Every entry to the nearest point of its grid; no error is fed back."""
    rows, columns = target.shape
    shape = step_shape(rows, torch.ones(columns, device=target.device), sensitivity, options)
    row = shape.rows(step)
    column = wide_enough(target, row, shape.column, options)
    size = row.float() * column.float()
    by_row, by_column = deviations(target)
    codes = round_with_dead_zone(target / size, by_row[:, None] * by_column / size, options.dead_zone)
    if options.largest_code is not None:
        codes.clamp_(-options.largest_code, options.largest_code)
    form = EntropyCoded.from_codes(codes, row, column, options.chunk_size)
    norm = float(target.double().norm())
    error = float((target - codes * size).double().norm())
    report = {
        "bits_per_weight": form.bits_per_weight,
        "code_bytes": form.itemsize,
        "zeros": float((codes == 0).float().mean()) if codes.numel() else 0.0,
        "weight_error": error / norm if norm else 0.0,
    }
    return Rewritten(form, report)
