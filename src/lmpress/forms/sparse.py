"""`Sparse(pattern, values)`: a few entries of a matrix, and zero elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import (
    Form,
    dtype_name,
    float_dtype,
    form_from_description,
    prefixed,
    shape_of,
    unprefixed,
)
from lmpress.forms.dense import Dense
from lmpress.forms.entropy_coded import EntropyCoded
from lmpress.forms.pattern import Bitmap, NofM, Pattern
from lmpress.forms.quantized import Quantized
from lmpress.forms.scaled_codes import ScaledCodes


@dataclass(frozen=True, repr=False)
class Sparse(Form):
    """A matrix that is zero but for the entries of `pattern`.

    The values stand in row-major order of the kept entries, none wasted on padding.

    Attributes:
        pattern: which entries are kept.
        values: a form of shape (out, k) where every row keeps k entries, else (1, kept).
        scale: None, or (out, 1) or (out, groups): what the entries of a row, or of a group of in / groups
            neighbouring columns, are multiplied by. Where rows keep different numbers of entries, a plain
            (1, kept) matrix of values could not have a scale a row; this one gives it to them.
    """

    pattern: Pattern
    values: Form
    scale: Tensor | None = None
    kind = "sparse"

    def __post_init__(self) -> None:
        rows, columns = self.pattern.shape
        if (
            self.values.shape[0] not in (1, rows)
            or self.values.shape[0] * self.values.shape[1] != self.pattern.kept
        ):
            raise ValueError(
                f"values of shape {self.values.shape} for {self.pattern.kept} kept entries of {rows} rows"
            )
        shape = None if self.scale is None else tuple(self.scale.shape)
        if shape is not None and (len(shape) != 2 or shape[0] != rows or not shape[1] or columns % shape[1]):
            raise ValueError(f"scales of shape {shape} do not fit {(rows, columns)}")

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, group: tuple[int, int] | None = None) -> Sparse:
        """The entries of `weight` where `mask` is true, in weight's dtype.

        Args:
            weight: (out, in).
            mask: bool (out, in).
            group: (n, m) where the mask keeps n of every m; None for a bitmap.
        """
        pattern: Pattern = NofM.from_mask(mask, *group) if group else Bitmap.from_mask(mask)
        return cls(pattern, Dense(weight[mask].view(values_shape(mask)).contiguous()))

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def mask(self) -> Tensor:
        return self.pattern.mask()

    @property
    def density(self) -> float:
        """Kept entries over all entries."""
        return self.pattern.kept / max(1, self.shape[0] * self.shape[1])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return _scale_groups(self.pattern.spread(self.values.dense(wide)), self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None and self.scale.shape[1] == 1:  # scale the few outputs, not the many weights
            weight = self.pattern.spread(self.values.dense(x.dtype))
            return torch.nn.functional.linear(x, weight) * self.scale[:, 0].to(x.dtype)
        return torch.nn.functional.linear(x, self.dense(x.dtype))

    def rows(self, index: Tensor) -> Tensor:
        if self.values.shape[0] != self.shape[0] or self.shape[0] == 1:
            return self.dense()[index]
        flat = index.reshape(-1)
        picked = self.pattern.with_packed(self.pattern.packed[flat])
        spread = picked.spread(self.values.rows(flat).float())
        scale = None if self.scale is None else self.scale[flat]
        return _scale_groups(spread, scale).view(*index.shape, self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        named = {"pattern": self.pattern.packed} | prefixed("values", self.values)
        return named if self.scale is None else named | {"scale": self.scale}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Sparse:
        return Sparse(
            self.pattern.with_packed(tensors["pattern"]),
            self.values.with_tensors(unprefixed("values", tensors)),
            None if self.scale is None else tensors["scale"],
        )

    def describe(self) -> dict[str, Any]:
        described = {
            "form": self.kind,
            "shape": list(self.shape),
            "pattern": self.pattern.describe(),
            "values": self.values.describe(),
        }
        if self.scale is not None:
            described["scale_shape"] = list(self.scale.shape)
            described["scale_dtype"] = dtype_name(self.scale.dtype)
        return described

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Sparse:
        scale = None
        if "scale_shape" in description:
            dtype = float_dtype(description["scale_dtype"])
            scale = torch.empty(shape_of(description, "scale_shape"), dtype=dtype, device="meta")
        pattern = Pattern.from_description(description["pattern"], shape_of(description))
        return cls(pattern, form_from_description(description["values"]), scale)

    def check(self) -> None:
        self.pattern.check()
        self.values.check()

    def rewrite(self, rewriter: Callable[[Form], Form]) -> Form:
        return replace(self, values=self.values.rewrite(rewriter))

    def filled(self) -> Form:
        """The same matrix with its zeros written out: what a device without sparse kernels runs.

        Quantized where the values are (and a zero is a code), ScaledCodes where they are entropy-coded,
        else Dense in float32.
        """
        values = self.values.resident() if isinstance(self.values, EntropyCoded) else self.values
        if isinstance(values, ScaledCodes):
            return self._filled_codes(values) or Dense(self.dense())
        if not isinstance(values, Quantized):
            return Dense(self.dense())
        per_value = values.scale.shape[1] > 1 and not isinstance(self.pattern, NofM)
        if per_value or (self.scale is not None and values.scale.numel() > 1):
            return Dense(self.dense())  # groups of kept entries are no groups of columns
        zero = values.zero()
        codes = self.pattern.spread(values.codes())
        if zero is not None:
            rows, columns = self.shape
            fill = zero.repeat_interleave(columns // zero.shape[1], 1).expand(rows, columns)
            codes = torch.where(self.pattern.mask(), codes, fill)
        scale = values.scale if self.scale is None else self.scale * values.scale
        if zero is not None and self.scale is not None:
            zero = zero.expand(scale.shape)
        return Quantized.from_codes(codes, scale, zero, values.bits)

    def _filled_codes(self, values: ScaledCodes) -> ScaledCodes | None:
        """`filled` for whole codes; None where their scales are no scales of rows of this matrix."""
        if values.column_scale.numel() != 1:
            return None
        row_scale = values.row_scale
        if self.scale is not None:
            if self.scale.shape[1] != 1 or row_scale.numel() != 1:
                return None
            row_scale = self.scale.float() * row_scale.float()  # exact where they have 16 bits
        codes = values.whole_codes(values.codes.dtype if values.overflow is None else torch.int32)
        return ScaledCodes(self.pattern.spread(codes), row_scale, values.column_scale).compact()

    def resident(self) -> Form:
        """With its zeros written out, where the survivors can be read off it again exactly."""
        if isinstance(self.values, EntropyCoded):
            return replace(self, values=self.values.resident()).resident()
        if isinstance(self.values, Dense) and self.scale is None:
            return Dense(self.pattern.spread(self.values.weight))
        if isinstance(self.values, ScaledCodes):
            return self._filled_codes(self.values) or self
        filled = self.filled()
        return filled if isinstance(filled, Quantized) else self

    def stored(self, resident: Form) -> Form:
        if isinstance(resident, Sparse):
            return replace(resident, values=self.values.stored(resident.values))
        mask = self.pattern.mask()
        if isinstance(resident, ScaledCodes):
            assert isinstance(self.values, EntropyCoded | ScaledCodes)
            kept = resident.whole_codes(torch.int32)[mask].view(self.values.shape)
            values = ScaledCodes(kept, self.values.row_scale, self.values.column_scale).compact()
            return replace(self, values=self.values.stored(values))
        if isinstance(resident, Dense):
            return replace(self, values=Dense(resident.weight[mask].view(self.values.shape)))
        assert isinstance(resident, Quantized)
        assert isinstance(self.values, Quantized)
        codes = resident.codes()[mask].view(self.values.shape)
        scale, zero = self.values.scale, self.values.zero()
        return replace(self, values=Quantized.from_codes(codes, scale, zero, resident.bits))

    @property
    def formula(self) -> str:
        return f"Sparse({self.values.formula}; {self.pattern.name})"


def values_shape(mask: Tensor) -> tuple[int, int]:
    """How the kept entries of `mask` (out, in) are laid out: (out, k) if rows are equal, else (1, kept)."""
    counts = mask.sum(1)
    if counts.numel() and bool((counts == counts[0]).all()):
        return mask.shape[0], int(counts[0])
    return 1, int(counts.sum())


def _scale_groups(matrix: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return matrix
    rows, groups = scale.shape
    split = matrix.view(rows, groups, matrix.shape[1] // max(1, groups))
    return (split * scale.to(matrix.dtype)[:, :, None]).view(matrix.shape)
