"""Round to nearest on a uniform grid: 2 to 8 bits, per tensor, channel or group, symmetric or asymmetric.

The grid is `w = scale * (code - zero)`. For b bits:

    symmetric:   scale = max|w| / (2^(b-1) - 1),                    zero = 0 (not stored)
    asymmetric:  scale = (max(w, 0) - min(w, 0)) / (2^b - 1),       zero = round(-min(w, 0) / scale)

The 8-bit symmetric grid with one scale a tensor or a channel is the linear quantization of SPQ
(arXiv 2602.18420, section 3.3). At 4 bits and fewer, 2^(b-1) - 1 wastes a sizeable part of the codes, so a
second symmetric grid competes for every scale: `scale = -e / 2^(b-1)` with e the entry of the largest
magnitude, sign included, which puts e on the code -2^(b-1). It may be negative; the smaller squared error
wins. Codes are always computed against the scale as it is stored, so its rounding costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmpress.forms import Quantized
from lmpress.methods.checks import check_layer
from lmpress.methods.result import Rewritten
from lmpress.statistics import InputStatistics

FULL_RANGE_BITS = 4
"""Up to this many symmetric bits, the full-range grid competes: 8 bits would gain 1/127 of the step."""

SHRINKS = tuple(1 - 0.02 * step for step in range(36))
"""Shrink factors that `clip` tries, 1.0 to 0.3: two bits over a long row want the small ones."""

CHUNK = 1 << 22
"""Entries that the fit of a grid treats at once, to bound its temporary memory."""


@dataclass(frozen=True)
class RoundOptions:
    """Options of `round_to_nearest`.

    Attributes:
        bits: 2 to 8.
        granularity: `tensor`, `channel` or `group:N` (N columns share a scale).
        symmetric: no zero points.
        scale_dtype: of the stored scales; None for float16 where it is precise enough, else float32.
        clip: search a shrink factor per scale for the least squared error, weighted by E[x^2] where the
            statistics are given.
    """

    bits: int = 8
    granularity: str = "channel"
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    clip: bool = False

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        parse_granularity(self.granularity)


def parse_granularity(granularity: str) -> tuple[str, int | None]:
    """`tensor` -> ("tensor", None), `channel` -> ("channel", None), `group:64` -> ("group", 64)."""
    if granularity in ("tensor", "channel"):
        return granularity, None
    kind, _, size = granularity.partition(":")
    if kind == "group" and size.isascii() and size.isdigit() and int(size) > 0:
        return kind, int(size)
    raise ValueError(f"granularity is tensor, channel or group:N, not {granularity!r}")


def round_to_nearest(weight: Tensor, statistics: InputStatistics | None, options: RoundOptions) -> Rewritten:
    """Quantize `weight` (out, in) by rounding every entry to the nearest point of its grid.

    Args:
        weight: (out, in), floating point.
        statistics: of the input; used by `clip` alone, and only E[x^2] of it. May be None.

    Returns:
        A `Quantized` form. The report has `bits`, `granularity`, `symmetric`, `scale_dtype`, and
        `weight_error` = ||W - W'|| / ||W||.

    Raises:
        ValueError: if the groups do not divide the columns, or the weight is not finite.
    """
    check_layer(weight, statistics)
    importance = None if statistics is None else statistics.second_moment
    scale, zero = fit_grid(
        weight,
        options.bits,
        options.granularity,
        options.symmetric,
        scale_dtype=options.scale_dtype,
        clip=options.clip,
        importance=importance if options.clip else None,
    )
    form = Quantized.from_codes(
        quantize_to_grid(weight, scale, zero, options.bits), scale, zero, options.bits
    )
    norm = float(weight.double().norm())
    error = float((weight.float() - form.dense()).double().norm())
    report = {
        "bits": form.bits,
        "granularity": form.granularity,
        "symmetric": form.symmetric,
        "scale_dtype": str(form.scale.dtype).removeprefix("torch."),
        "weight_error": error / norm if norm else 0.0,
    }
    return Rewritten(form, report)


def fit_grid(
    weight: Tensor,
    bits: int,
    granularity: str = "channel",
    symmetric: bool = True,
    *,
    scale_dtype: torch.dtype | None = None,
    clip: bool = False,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The grid on which `weight` is rounded.

    Args:
        weight: (out, in), floating point.
        scale_dtype: None lets `choose_scale_dtype` decide.
        clip: search a shrink factor per scale.
        importance: (in,) >= 0, weights of the columns in the squared error; None for all alike.

    Returns:
        scale (1, 1) | (out, 1) | (out, groups) in its stored dtype, 1 where all entries are zero; and the
        zero points, uint8 of the same shape, or None if symmetric.

    Raises:
        ValueError: bits outside 2..8, groups that do not divide the columns, a weight that is not finite,
            scales that overflow the `scale_dtype` that was asked for.
    """
    _check_bits(bits)
    cells = _cells(weight, granularity)  # (rows, groups, entries)
    low, high = _extremes(cells)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the weight holds NaN or infinity")
    dtype = scale_dtype or _scale_dtype(_plain_scale(low, high, bits, symmetric), bits)
    grid = _Grid(bits, symmetric, dtype)
    if not clip and not (symmetric and bits <= FULL_RANGE_BITS):
        return grid.fit(low, high, 1.0, full=False)
    if importance is not None:
        importance = importance.to(low)  # (in,)
        if granularity == "tensor":
            importance = importance.expand(weight.shape)
        importance = importance.reshape(1, -1, cells.shape[2])
    shrinks = SHRINKS if clip else (1.0,)
    rows = max(1, CHUNK // max(1, cells.shape[1] * cells.shape[2]))
    parts = [
        grid.search(cells[r].to(low.dtype), low[r], high[r], shrinks, importance)
        for r in (slice(start, start + rows) for start in range(0, cells.shape[0], rows))
    ]
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


def quantize_to_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The code of the grid point nearest to every entry.

    Args:
        weight: (out, in), floating point.
        scale: (1, 1), (out, 1) or (out, groups), never zero.
        zero: of scale's shape, or None for a symmetric grid.

    Returns:
        (out, in): int8 in [-127, 127] for 8 symmetric bits, int8 in [-2^(b-1), 2^(b-1)) for fewer, else
        uint8 in [0, 2^b).
    """
    rows, columns = weight.shape
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    cells = weight.to(wide).reshape(rows, scale.shape[1], columns // scale.shape[1])
    codes = _codes(cells, scale.to(wide)[:, :, None], None if zero is None else zero[:, :, None], bits)
    return codes.to(torch.int8 if zero is None else torch.uint8).reshape(rows, columns)


def choose_scale_dtype(weight: Tensor, bits: int, granularity: str, symmetric: bool) -> torch.dtype:
    """The dtype of the scales of the grid of `weight`: float16 where that is precise enough, else float32.

    A float16 scale s is rounded by at most 2^-25 below 2^-14, and by 2^-11 s above. With s >= 2^(b - 22),
    that moves the outermost of 2^b codes by less than a fifth of a step, and codes are computed against the
    rounded scale anyway; scales below that, or above 65504, need float32.
    """
    low, high = _extremes(_cells(weight, granularity))
    return _scale_dtype(_plain_scale(low, high, bits, symmetric), bits)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"quantization takes 2 to 8 bits, not {bits}")


def _cells(weight: Tensor, granularity: str) -> Tensor:
    """The entries that share a scale in the last dimension: (rows, groups, entries)."""
    rows, columns = weight.shape
    kind, size = parse_granularity(granularity)
    if kind == "tensor":
        return weight.reshape(1, 1, -1)
    if size is None:
        return weight.unsqueeze(1)
    if columns % size:
        raise ValueError(f"groups of {size} do not divide the {columns} columns of the weight")
    return weight.reshape(rows, columns // size, size)


def _extremes(cells: Tensor) -> tuple[Tensor, Tensor]:
    """min(w, 0) and max(w, 0) of every cell, (rows, groups), float32 or better."""
    wide = torch.float64 if cells.dtype == torch.float64 else torch.float32
    if not cells.shape[-1]:
        nothing = torch.zeros(cells.shape[:-1], dtype=wide, device=cells.device)
        return nothing, nothing
    low, high = torch.aminmax(cells, dim=-1)
    return low.to(wide).clamp_max(0), high.to(wide).clamp_min(0)


def _plain_scale(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    if symmetric:
        return torch.maximum(-low, high) / ((1 << bits - 1) - 1)
    return (high - low) / ((1 << bits) - 1)


def _scale_dtype(scale: Tensor, bits: int) -> torch.dtype:
    used = scale[scale > 0]
    if not used.numel():
        return torch.float16
    fits = float(used.min()) >= 2.0 ** (bits - 22) and float(used.max()) <= torch.finfo(torch.float16).max
    return torch.float16 if fits else torch.float32


@dataclass(frozen=True)
class _Grid:
    """What is fixed for every candidate grid of one weight."""

    bits: int
    symmetric: bool
    dtype: torch.dtype

    def fit(self, low: Tensor, high: Tensor, shrink: float, full: bool) -> tuple[Tensor, Tensor | None]:
        """Stored scales and zero points for `shrink` times the range [low, high], all (rows, groups)."""
        if full:
            scale = torch.where(high > -low, -high, -low) * (shrink / (1 << self.bits - 1))
        else:
            scale = _plain_scale(low, high, self.bits, self.symmetric) * shrink
        stored = scale.to(self.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"a scale of {float(scale.abs().max()):.3g} does not fit into {self.dtype}")
        tiny = torch.full_like(scale, torch.finfo(self.dtype).smallest_normal)
        stored = torch.where(stored == 0, torch.copysign(tiny, scale).to(self.dtype), stored)
        stored = torch.where(scale == 0, torch.ones_like(stored), stored)
        if self.symmetric:
            return stored, None
        zero = (-low * shrink / stored.to(low.dtype)).round().clamp(0, (1 << self.bits) - 1)
        return stored, zero.to(torch.uint8)

    def search(
        self, cells: Tensor, low: Tensor, high: Tensor, shrinks: tuple[float, ...], importance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The candidate of the least squared error for every cell, over all shrinks and both ranges."""
        ranges = (False, True) if self.symmetric and self.bits <= FULL_RANGE_BITS else (False,)
        candidates = [(shrink, full) for shrink in shrinks for full in ranges]
        scale, zero = self.fit(low, high, *candidates[0])
        least = self._squared_error(cells, scale, zero, importance)
        for candidate in candidates[1:]:
            other_scale, other_zero = self.fit(low, high, *candidate)
            error = self._squared_error(cells, other_scale, other_zero, importance)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, other_scale, scale)
            if zero is not None and other_zero is not None:
                zero = torch.where(better, other_zero, zero)
        return scale, zero

    def _squared_error(
        self, cells: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None
    ) -> Tensor:  # (rows, groups)
        wide = scale.to(cells.dtype)[:, :, None]
        offset = None if zero is None else zero[:, :, None]
        codes = _codes(cells, wide, offset, self.bits)
        if offset is not None:
            codes -= offset.to(codes.dtype)
        error = codes.mul_(wide).sub_(cells).square_()
        return (error if importance is None else error.mul_(importance)).sum(-1)


def _codes(cells: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes as floating-point numbers, for scale and zero that broadcast over `cells`."""
    codes = (cells / scale).round_()
    if zero is not None:
        return codes.add_(zero.to(codes.dtype)).clamp_(0, (1 << bits) - 1)
    lowest = -127 if bits == 8 else -(1 << bits - 1)
    return codes.clamp_(lowest, (1 << bits - 1) - 1)
