"""The codes of a quantized matrix, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lmpress.forms import Quantized, unpack_codes
from lmpress.kernels.scratch import scratch


def centered_codes(form: Quantized, zero: Tensor | None, start: int, stop: int) -> Tensor:
    """`codes - zero` of the rows [start, stop): int8 (rows, in). Not for 8 bits with stored zero points.

    Args:
        zero: `form.zero()`, taken once for all parts of a matrix.

    Returns:
        The stored codes themselves for 8 symmetric bits, else a scratch tensor.
    """
    packed = form.packed if stop - start == form.packed.shape[0] else form.packed[start:stop]
    if packed.dtype == torch.int8:
        return packed
    rows, columns = stop - start, form.columns
    codes = unpack_codes(packed, form.bits, columns, scratch("codes", (rows, columns), torch.uint8))
    if zero is None:
        codes.sub_(1 << form.bits - 1)  # wraps around: the bytes are those of the signed difference
    else:
        part = zero if zero.shape[0] == 1 else zero[start:stop]  # (1 or rows, 1 or groups)
        codes.view(rows, part.shape[1], -1).sub_(part[:, :, None])
    return codes.view(torch.int8)


def values(form: Quantized, zero: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The rows [start, stop) in a scratch tensor (rows, in) of `dtype`.

    Scaled where a row has a scale a group; `codes - zero`, exact, where a row has one scale.
    """
    rows, columns = stop - start, form.columns
    groups = form.scale.shape[1]
    if groups > 1 and dtype == torch.bfloat16:  # scaling in float32 is faster, and rounds only once
        wide = values(form, zero, start, stop, torch.float32)
        return scratch("rounded", (rows, columns), dtype).copy_(wide)
    out = scratch("values", (rows, columns), dtype)
    if zero is not None and form.bits == 8:  # 9 signed bits: not for int8
        part = zero if zero.shape[0] == 1 else zero[start:stop]
        out.copy_(form.packed[start:stop]).view(rows, part.shape[1], -1).sub_(part[:, :, None].to(dtype))
    else:
        out.copy_(centered_codes(form, zero, start, stop))
    if groups > 1:
        out.view(rows, groups, -1).mul_(form.scale[start:stop, :, None].to(dtype))
    return out
