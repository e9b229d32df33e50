"""Matrix products in floating point, on weights that are made a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmpress.forms import Dense, Quantized, ScaledCodes
from lmpress.kernels.codes import centered_codes, values
from lmpress.kernels.scratch import fitting, scratch

FEW = 16
"""Up to so many activations, torch's product of bfloat16 activations with int8 codes wins: it reads each
code once, but makes little of a code that it has read."""


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


def run_bfloat16(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_quantized`, for bfloat16 activations and one scale a row or a tensor.

    A few activations go through torch's int8 product. It takes blocks of columns with no care for a
    remainder (it reads past the end where in is no multiple of 16), and codes that fit into int8.
    """
    (rows, columns), zero = form.shape, form.zero()
    if not _packs(x) or (zero is not None and form.bits == 8):
        return run_quantized(form, x)
    scale = form.scale[:, 0].to(x.dtype).expand(rows).contiguous()
    x = x.contiguous()
    step = rows if form.packed.dtype == torch.int8 else fitting(columns, rows)
    parts = [
        torch._weight_int8pack_mm(
            x,
            centered_codes(form, zero, start, min(start + step, rows)).contiguous(),
            scale[start : start + step],
        )
        for start in range(0, rows, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def run_bfloat16_scaled(form: ScaledCodes, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_scaled`, for bfloat16 activations: a few of them through torch's int8 product."""
    if not _packs(x) or form.codes.dtype != torch.int8:
        return run_scaled(form, x)
    scaled = x * form.column_scale.float()  # (m, in)
    row_scale = form.row_scale[:, 0].to(x.dtype).expand(form.shape[0]).contiguous()
    y = torch._weight_int8pack_mm(scaled.to(x.dtype), form.codes.contiguous(), row_scale)
    if form.overflow is None:
        return y
    return (y + form.from_excess(scaled) * form.row_scale[:, 0].float()).to(x.dtype)


def _packs(x: Tensor) -> bool:
    """Whether bfloat16 activations (m, in) go through torch's product with int8 codes."""
    return x.shape[0] <= FEW and x.shape[1] % 32 == 0


def run_bfloat16_groups(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_quantized`, for bfloat16 activations: one or two of them are cheaper to widen than the weights
    are to round."""
    return run_quantized(form, x) if x.shape[0] > 2 else run_wide(form, x)


def run_wide(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """Through float32, for a dtype that the CPU computes slowly in."""
    return run_quantized(form, x.float()).to(x.dtype)


def run_wide_scaled(form: ScaledCodes, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_wide`, for codes between two scales."""
    return run_scaled(form, x.float()).to(x.dtype)
