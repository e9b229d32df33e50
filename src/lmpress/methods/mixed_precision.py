"""Mixed precision: what a weight would lose at every number of bits, so that a budget can be shared.

With `H^-1 = U^T U` the loss that GPTQ leaves is a sum over entries, `sum_ij s_i e_ij^2 / U_jj^2`, where e_ij
is the error of rounding the entry as it stands when its turn comes (see `methods/hessian.py`), and s_i is how
sensitive the model is to output i: the mean squared gradient of its loss by that output, so that half of the
sum is the expected divergence to second order (Fisher's information; HAWQ-V2, arXiv 1911.03852, takes the
trace of the Hessian by layer instead). The errors of the weight as it is stand in for the compensated ones,
which has about the same range: no solving is needed to compare bits, only to quantize in the end. U depends
on the order of the columns, and is taken in that of GPTQ; plain rounding has the diagonal of H instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmpress.forms import Quantized
from lmpress.methods.gptq import GptqOptions, columns_in_order
from lmpress.methods.hessian import damped_inverse_factor
from lmpress.methods.rtn import fit_grid, quantize_to_grid
from lmpress.statistics import InputStatistics


def error_deviations(statistics: InputStatistics, options: GptqOptions | None) -> Tensor:
    """U_jj of the input's damped Hessian in the order in which GPTQ takes the columns, (in,) by input.

    Args:
        options: of GPTQ: its order and damping; None for rounding without feedback, where the error of a
            column counts by its mean square, `1 / sqrt(H_jj)`.
    """
    hessian = statistics.require_hessian().float()
    if options is None:
        diagonal = hessian.diagonal()
        return diagonal.clamp_min(float(diagonal.mean()) * 1e-6 or 1.0).rsqrt()
    rank = columns_in_order(hessian.diagonal(), options)
    factor = damped_inverse_factor(hessian[rank][:, rank], options.damping)
    return torch.empty_like(hessian[0]).scatter_(0, rank, factor.upper.diagonal())


def predicted_losses(
    weight: Tensor,
    deviations: Tensor,
    bits: Sequence[int],
    *,
    granularity: str,
    symmetric: bool,
    clip: bool,
    sensitivity: float | Tensor = 1.0,
    sample_rows: int = 128,
) -> list[float]:
    """`sum_ij s_i e_ij^2 / U_jj^2` of `weight` (out, in) at each number of bits.

    Args:
        deviations: `error_deviations` of the input, (in,).
        sensitivity: s, one number or one an output (out,).
        sample_rows: estimate the sum from so many rows; all are taken where one scale is shared by all.

    Raises:
        ValueError: as `fit_grid`.
    """
    rows = weight.shape[0]
    importance = deviations.to(weight.device, torch.float32).square().reciprocal()  # (in,)
    by_row = torch.as_tensor(sensitivity, dtype=torch.float32, device=weight.device).expand(rows)
    if granularity != "tensor" and rows > sample_rows:
        picked = torch.linspace(0, rows - 1, sample_rows, device=weight.device).round().long()
        weight, by_row = weight[picked], by_row[picked] * (rows / sample_rows)
    losses = []
    for width in bits:
        scale, zero = fit_grid(
            weight, width, granularity, symmetric, clip=clip, importance=importance if clip else None
        )
        form = Quantized.from_codes(quantize_to_grid(weight, scale, zero, width), scale, zero, width)
        error = weight.float() - form.dense()
        losses.append(float((error.square() @ importance).double() @ by_row.double()))
    return losses
