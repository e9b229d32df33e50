"""Matrix products of float32 activations with int8 codes, in exact integer arithmetic.

A row x of activations is written in fixed point and cut into four signed bytes,

    x = unit * (d0 + 2^8 d1 + 2^16 d2 + 2^24 d3) + e,    unit = max|x| / (127 * 2^24),

with |e| <= unit + 2^-24 |x|, so that with one scale a row of the weight

    x @ dense().T = scale * unit * sum_k 2^(8k) (d_k @ codes.T)

and each product d_k @ codes.T is exact in int32. The error e of an activation is one rounding of float32 and
at most 2^-30 of the largest activation of its row; the result is nearer to the exact one than a float32
product, whose sums round at every step. Processors with int8 dot products do the four products faster than
a single one in float32, and the codes are read as they are stored, at a quarter of the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lmpress.forms import Quantized, ScaledCodes
from lmpress.kernels import floating
from lmpress.kernels.codes import centered_codes
from lmpress.kernels.scratch import fitting, scratch

LARGEST = 127 * 2.0**24
"""What the largest activation becomes: the top digit then stays below 128, carry and all."""

LONGEST = 1 << 16
"""Columns up to which a sum of 128 * 128 per column stays well within int32."""

PART = 128
"""Activations at a time: 512 rows of digits keep the int8 units busy, and their products stay in cache."""

SMALL = 1 << 18
"""Weights up to so many are converted to float32 faster than a single activation is cut into digits."""

Codes = Tensor | Callable[[int, int], Tensor]
"""int8 codes (out, in), or what gives those of the rows [start, stop), in a scratch buffer."""

Extra = Callable[[Tensor], Tensor]
"""What is to be added to the products of a part of the activations: (m, in) -> (m, out)."""

FEW = 16
"""Up to so many bfloat16 activations are widened: exact products, and codes that are read as they are."""

_CARRY = torch.tensor(0x00808080, dtype=torch.int32)
_TINY = torch.tensor(1e-37)  # a normal float32: the unit of a row of zeros
_POWERS = torch.tensor([[1.0, 2.0**8, 2.0**16, 2.0**24]])  # (1, 4)


def run(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ dense().T` for float32 activations and one scale a row or a tensor.

    Small products, rows that are too long, 8 bits with zero points, and processors without int8 dot products
    take the way through float32.
    """
    rows, columns = form.shape
    if not _worthwhile(rows, columns, x.shape[0]) or (form.bits == 8 and form.packed_zero is not None):
        return floating.run_quantized(form, x)
    zero = form.zero()
    if form.packed.dtype == torch.int8 or fitting(columns, rows) == rows:
        return _run(
            x, centered_codes(form, zero, 0, rows), rows, form.scale
        )  # unpacked once for all activations
    return _run(x, functools.partial(centered_codes, form, zero), rows, form.scale)


def run_scaled(form: ScaledCodes, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """`x @ dense().T` for float32 activations and codes between two scales.

    What `run` takes through float32, and codes of more than a byte, take that way here too.
    """
    rows, columns = form.shape
    if form.codes.dtype != torch.int8 or not _worthwhile(rows, columns, x.shape[0]):
        return floating.run_scaled(form, x)
    extra = None if form.overflow is None else form.from_excess
    return _run(x * form.column_scale.to(x.dtype), form.codes, rows, form.row_scale, extra)


def run_bfloat16(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run`, for bfloat16 activations: a few of them are widened, many meet rounded weights.

    torch's own product of bfloat16 with int8 codes is no way: it takes for granted that the codes are aligned
    in memory, and crashes on those of a mapped file.
    """
    return run_wide(form, x) if x.shape[0] <= FEW else floating.run_quantized(form, x)


def run_bfloat16_scaled(form: ScaledCodes, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_bfloat16`, for codes between two scales."""
    return run_wide_scaled(form, x) if x.shape[0] <= FEW else floating.run_scaled(form, x)


def run_wide(form: Quantized, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run`, for activations of 16 bits."""
    return run(form, x.float()).to(x.dtype)


def run_wide_scaled(form: ScaledCodes, x: Tensor) -> Tensor:  # (m, in) -> (m, out)
    """As `run_scaled`, for activations of 16 bits."""
    return run_scaled(form, x.float()).to(x.dtype)


def _worthwhile(rows: int, columns: int, m: int) -> bool:
    """Whether m activations and int8 codes (rows, columns) are multiplied as integers."""
    return rows * columns * m > SMALL and 16 <= columns <= LONGEST and has_exact_int8()


def _run(x: Tensor, codes: Codes, rows: int, scale: Tensor, extra: Extra | None = None) -> Tensor:
    """`(x @ codes.T + extra(x)) * scale.T`, float32 (m, out).

    Args:
        x: float32 (m, in).
        rows: out.
        scale: (out, 1) or (1, 1).
    """
    m = x.shape[0]
    if m == 1:
        return _run_part(x, codes, rows, scale, extra)
    y = torch.empty(m, rows)
    step = min(PART, fitting(x.shape[1] * x.itemsize, m))
    for start in range(0, m, step):
        _run_part(x[start : start + step], codes, rows, scale, extra, y[start : start + step])
    return y


def _run_part(
    x: Tensor, codes: Codes, rows: int, scale: Tensor, extra: Extra | None, out: Tensor | None = None
) -> Tensor:  # (m, in) -> (m, out)
    """`_run` for at most PART activations, written to `out` if it is given."""
    m, columns = x.shape
    digits, unit = split(x)
    step = fitting(16 * m if isinstance(codes, Tensor) else max(16 * m, columns), rows)
    if isinstance(codes, Tensor) and step == rows:
        y = _product(digits, unit, codes)
    else:
        y = torch.empty(m, rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = codes[start:stop] if isinstance(codes, Tensor) else codes(start, stop)
            y[:, start:stop] = _product(digits, unit, part)
    if extra is not None:
        y.add_(extra(x))
    scaled: Tensor = torch.mul(y, scale.T.to(x.dtype), out=out)
    return scaled


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of float32 activations.

    Args:
        x: (m, in).

    Returns:
        int8 (4 * m, in), the lowest digits of all rows first; and float32 (m, 1), the unit of each row.
    """
    m, columns = x.shape
    if m == 1:
        unit = torch.add(_TINY, x.abs().amax(-1, keepdim=True), alpha=1 / LARGEST)
        fixed = torch.div(x, unit).int().add_(_CARRY).bitwise_xor_(_CARRY)
        return fixed.view(torch.int8).as_strided((4, columns), (1, 4)), unit  # the lowest byte comes first
    work = scratch("work", (m, columns), torch.float32)
    unit = torch.add(_TINY, torch.abs(x, out=work).amax(-1, keepdim=True), alpha=1 / LARGEST)
    fixed = scratch("fixed", (m, columns), torch.int32).copy_(torch.div(x, unit, out=work))
    fixed.add_(_CARRY).bitwise_xor_(_CARRY)  # bytes in [-128, 128), each with the carry of the one below
    digits = scratch("digits", (4, m, columns), torch.int8)
    shifted = work.view(torch.int32)
    digits[0].copy_(fixed)
    for k in range(1, 4):
        digits[k].copy_(torch.bitwise_right_shift(fixed, 8 * k, out=shifted))
    return digits.view(4 * m, columns), unit


def _product(digits: Tensor, unit: Tensor, codes: Tensor) -> Tensor:
    """`unit * sum_k 2^(8k) digits_k @ codes.T`.

    Args:
        digits: int8 (4 * m, in), as `split` makes them.
        unit: float32 (m, 1).
        codes: int8 (n, in).

    Returns:
        float32 (m, n); a scratch tensor unless m is 1.
    """
    m, n = unit.shape[0], codes.shape[0]
    products = scratch("products", (4 * m, n), torch.int32)
    torch._int_mm(digits, codes.T, out=products)
    planes = scratch("planes", (4 * m, n), torch.float32).copy_(products)
    if m == 1:
        return torch.mm(_POWERS * unit, planes)
    low, second, third, y = planes.view(4, m, n).unbind()
    for plane in (third, second, low):
        torch.add(plane, y, alpha=256.0, out=y)
    return y.mul_(unit)


@functools.cache
def has_exact_int8() -> bool:
    """Whether this CPU multiplies int8 matrices fast, with no saturation on the way (AVX-512 VNNI)."""
    if not (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.cpu._is_vnni_supported()
    ):
        return False
    worst = torch.full((64, 64), -128, dtype=torch.int8)
    return bool((torch._int_mm(worst, worst.T) == 64 * 128 * 128).all())
