"""Matrix products in floating point, on weights that are made a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmpress.forms import Dense, Quantized, ScaledCodes
from lmpress.kernels.codes import values
from lmpress.kernels.scratch import fitting, scratch


def run_quantized(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ dense().T` in the dtype of x. Scales of rows multiply the outputs, of groups the weights."""
    zero = form.zero()
    y = _in_parts(x, form.shape[0], lambda start, stop: values(form, zero, start, stop, x.dtype))
    return y if form.scale.shape[1] > 1 else y.mul_(form.scale[:, 0].to(x.dtype))


def run_dense(form: Dense, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ weight.T`, the weight cast to the dtype of x in parts if it has another."""
    if form.weight.dtype == x.dtype:
        return torch.nn.functional.linear(x, form.weight)
    return _in_parts(x, form.shape[0], lambda start, stop: _cast(form.weight[start:stop], x.dtype))


def run_scaled(form: ScaledCodes, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ dense().T` for codes between two scales, in the dtype of x (float32 for scales and excess)."""
    scaled = x * form.column_scale.float()  # (m, in)
    rounded = scaled.to(x.dtype)
    y = _in_parts(rounded, form.shape[0], lambda start, stop: _cast(form.codes[start:stop], x.dtype)).float()
    if form.overflow is not None:
        y.add_(form.from_excess(scaled))
    return y.mul_(form.row_scale[:, 0].float()).to(x.dtype)


def _in_parts(x: Tensor, rows: int, part: Callable[[int, int], Tensor]) -> Tensor:
    """`x @ weight.T` (m, rows), where `part(start, stop)` gives rows of the weight, in a buffer."""
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    step = fitting(x.shape[1] * 4, rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.mm(x, part(start, stop).T, out=y[:, start:stop])
    return y


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return scratch("values", (weight.shape[0], weight.shape[1]), dtype).copy_(weight)


def run_bfloat16_groups(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_quantized`, for bfloat16 activations: one or two of them are cheaper to widen than the weights
    are to round."""
    return run_quantized(form, x) if x.shape[0] > 2 else run_wide(form, x)


def run_wide(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """Through float32, for a dtype that the CPU computes slowly in."""
    return run_quantized(form, x.float()).to(x.dtype)
