"""`ScaledCodes(codes, row_scale, column_scale)`: row_scale * codes * column_scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, dtype_name, float_dtype, shape_of, whole

CODE_DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}

MOST_OVERFLOW = 1 / 64
"""Codes beyond a byte are kept apart up to this share of all: they cost 8 bytes each, and a gather. At half
a percent of a 576 x 1536 matrix they take two fifths of the time of the codes for one activation, and a
seventh for 128."""


@dataclass(frozen=True, repr=False)
class ScaledCodes(Form):
    """A matrix of whole numbers between two diagonals: what an `EntropyCoded` weight is once it is decoded.

    Attributes:
        codes: int8, int16 or int32, (out, in).
        row_scale: floating point, (out, 1) or (1, 1).
        column_scale: floating point, (1, in) or (1, 1).
        overflow: the columns where a code is not the whole of it, int32 (k,), row by row; None for nowhere.
        starts: where each row starts in `overflow`, and the last one ends, int32 (out + 1,).
        excess: what is to be added there, int32 (k,).
    """

    codes: Tensor
    row_scale: Tensor
    column_scale: Tensor
    overflow: Tensor | None = None
    starts: Tensor | None = None
    excess: Tensor | None = None
    kind = "scaled_codes"

    def __post_init__(self) -> None:
        check_scales(self.shape, self.row_scale, self.column_scale)
        if len({part is None for part in (self.overflow, self.starts, self.excess)}) > 1:
            raise ValueError("overflow, starts and excess come together")

    def compact(self) -> ScaledCodes:
        """The same matrix, a byte a code and the rare larger ones apart; itself where they are not rare."""
        if self.codes.dtype == torch.int8 or not self.codes.numel():
            return self
        small = self.codes.clamp(-127, 127)
        beyond = small != self.codes
        count = int(beyond.sum())
        if count > MOST_OVERFLOW * self.codes.numel():
            return self
        scales = self.row_scale, self.column_scale
        if not count:
            return ScaledCodes(small.to(torch.int8), *scales)
        excess = self.codes[beyond].int() - small[beyond].int()
        starts = torch.nn.functional.pad(beyond.sum(1).cumsum(0), (1, 0)).int()
        return ScaledCodes(small.to(torch.int8), *scales, beyond.nonzero()[:, 1].int(), starts, excess)

    def whole_codes(self, dtype: torch.dtype) -> Tensor:
        """The codes (out, in) in `dtype`, excess included."""
        codes = self.codes.to(dtype)
        if self.overflow is None or self.starts is None or self.excess is None:
            return codes
        row = torch.arange(self.shape[0], device=codes.device).repeat_interleave(self.starts.diff())
        return codes.index_put((row, self.overflow.long()), self.excess.to(dtype), accumulate=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.whole_codes(wide) * self.column_scale.to(wide) * self.row_scale.to(wide)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.column_scale[0].to(x.dtype)  # (..., in)
        outputs = torch.nn.functional.linear(scaled, self.codes.to(x.dtype))  # (..., out)
        if self.overflow is not None:
            outputs = outputs + self.from_excess(scaled.reshape(-1, self.shape[1])).view(outputs.shape)
        return outputs * self.row_scale[:, 0].to(x.dtype)

    def from_excess(self, scaled: Tensor) -> Tensor:
        """What the excess adds to the outputs (m, out), for inputs (m, in) times the column scale."""
        assert self.overflow is not None
        assert self.starts is not None
        assert self.excess is not None
        outputs = torch.nn.functional.embedding_bag(  # the product with a matrix in compressed rows
            self.overflow,
            scaled.T.contiguous(),
            self.starts,
            mode="sum",
            per_sample_weights=self.excess.to(scaled.dtype),
            include_last_offset=True,
        )  # (out, m)
        return outputs.T

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        scale = self.row_scale if self.row_scale.shape[0] == 1 else self.row_scale[flat]
        picked = ScaledCodes(self.codes[flat], scale, self.column_scale)
        if self.overflow is not None and self.starts is not None and self.excess is not None:
            first, counts = self.starts[flat], self.starts.diff()[flat]  # (rows,)
            starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            within = torch.arange(int(starts[-1]), device=flat.device)
            place = within + (first - starts[:-1]).repeat_interleave(counts)
            apart = {"overflow": self.overflow[place], "starts": starts, "excess": self.excess[place]}
            picked = replace(picked, **apart)
        return picked.dense().view(*index.shape, self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        named = {"codes": self.codes, "row_scale": self.row_scale, "column_scale": self.column_scale}
        if self.overflow is not None and self.starts is not None and self.excess is not None:
            named |= {"overflow": self.overflow, "starts": self.starts, "excess": self.excess}
        return named

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ScaledCodes:
        return replace(self, **{name: tensors[name] for name in self.tensors()})

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.kind,
            "shape": list(self.shape),
            "code_dtype": dtype_name(self.codes.dtype),
            "overflow": 0 if self.overflow is None else len(self.overflow),
            **describe_scales(self.row_scale, self.column_scale),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> ScaledCodes:
        shape = shape_of(description)
        kind = description["code_dtype"]
        if not isinstance(kind, str) or kind not in CODE_DTYPES:
            raise ValueError(f"codes are {', '.join(CODE_DTYPES)}, not {short(kind)}")
        codes = torch.empty(shape, dtype=CODE_DTYPES[kind], device="meta")
        count = whole(description, "overflow")
        sizes = (count, shape[0] + 1, count) if count else ()
        apart = [torch.empty(size, dtype=torch.int32, device="meta") for size in sizes]
        return cls(codes, *empty_scales(shape, description), *apart)

    @property
    def storage(self) -> str:
        return "scaled codes"

    def check(self) -> None:
        if self.overflow is None or self.starts is None:
            return
        starts, columns = self.starts, self.overflow
        ordered = int(starts[0]) == 0 and int(starts[-1]) == len(columns) and bool((starts.diff() >= 0).all())
        if not ordered or int(columns.min()) < 0 or int(columns.max()) >= self.shape[1]:
            raise ValueError("the places of codes beyond a byte are damaged")

    @property
    def formula(self) -> str:
        return f"{dtype_name(self.codes.dtype)}*scales"


def check_scales(shape: tuple[int, int], row_scale: Tensor, column_scale: Tensor) -> None:
    """ValueError where two scales do not fit a matrix of `shape`."""
    rows, columns = shape
    if row_scale.shape not in {(rows, 1), (1, 1)} or column_scale.shape not in {(1, columns), (1, 1)}:
        both = f"{tuple(row_scale.shape)} and {tuple(column_scale.shape)}"
        raise ValueError(f"scales of {both} do not fit codes of {shape}")


def describe_scales(row_scale: Tensor, column_scale: Tensor) -> dict[str, Any]:
    """What `empty_scales` needs."""
    return {
        "row_scales": row_scale.shape[0],
        "row_dtype": dtype_name(row_scale.dtype),
        "column_scales": column_scale.shape[1],
        "column_dtype": dtype_name(column_scale.dtype),
    }


def empty_scales(shape: tuple[int, int], description: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The two scales on the meta device."""
    rows, columns = whole(description, "row_scales"), whole(description, "column_scales")
    row_scale = torch.empty(rows, 1, dtype=float_dtype(description["row_dtype"]), device="meta")
    column_scale = torch.empty(1, columns, dtype=float_dtype(description["column_dtype"]), device="meta")
    check_scales(shape, row_scale, column_scale)
    return row_scale, column_scale
