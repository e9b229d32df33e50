"""Matrix products in floating point, on weights that are made a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lmpress.forms import Dense, Quantized
from lmpress.kernels.codes import centered_codes, values
from lmpress.kernels.scratch import fitting, scratch

FEW = 16
"""Up to so many activations, torch's product of bfloat16 activations with int8 codes wins: it reads each
code once, but makes little of a code that it has read."""


def run_quantized(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ dense().T` in the dtype of x. Scales of rows multiply the outputs, of groups the weights."""
    (rows, columns), zero = form.shape, form.zero()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    step = fitting(columns * 4, rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.mm(x, values(form, zero, start, stop, x.dtype).T, out=y[:, start:stop])
    return y if form.scale.shape[1] > 1 else y.mul_(form.scale[:, 0].to(x.dtype))


def run_dense(form: Dense, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ weight.T`, the weight cast to the dtype of x in parts if it has another."""
    weight = form.weight
    if weight.dtype == x.dtype:
        return torch.nn.functional.linear(x, weight)
    rows, columns = weight.shape
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    step = fitting(columns * x.dtype.itemsize, rows)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        cast = scratch("values", (part.shape[0], columns), x.dtype).copy_(part)
        torch.mm(x, cast.T, out=y[:, start : start + step])
    return y


def run_bfloat16(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_quantized`, for bfloat16 activations and one scale a row or a tensor.

    A few activations go through torch's int8 product. It takes blocks of columns with no care for a
    remainder (it reads past the end where in is no multiple of 16), and codes that fit into int8.
    """
    (rows, columns), zero = form.shape, form.zero()
    if x.shape[0] > FEW or columns % 32 or (zero is not None and form.bits == 8):
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


def run_bfloat16_groups(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_quantized`, for bfloat16 activations: one or two of them are cheaper to widen than the weights
    are to round."""
    return run_quantized(form, x) if x.shape[0] > 2 else run_wide(form, x)


def run_wide(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """Through float32, for a dtype that the CPU computes slowly in."""
    return run_quantized(form, x.float()).to(x.dtype)
