"""`ScaledCodes(codes, row_scale, column_scale)`: row_scale * codes * column_scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, dtype_name, float_dtype, shape_of

CODE_DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}


@dataclass(frozen=True, repr=False)
class ScaledCodes(Form):
    """A matrix of whole numbers between two diagonals: what an `EntropyCoded` weight is once it is decoded.

    Attributes:
        codes: int8, int16 or int32, (out, in).
        row_scale: floating point, (out, 1) or (1, 1).
        column_scale: floating point, (1, in) or (1, 1).
    """

    codes: Tensor
    row_scale: Tensor
    column_scale: Tensor
    kind = "scaled_codes"

    def __post_init__(self) -> None:
        check_scales(self.shape, self.row_scale, self.column_scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.codes.to(wide) * self.column_scale.to(wide) * self.row_scale.to(wide)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.column_scale[0].to(x.dtype)  # (..., in)
        return torch.nn.functional.linear(scaled, self.codes.to(x.dtype)) * self.row_scale[:, 0].to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        scale = self.row_scale if self.row_scale.shape[0] == 1 else self.row_scale[flat]
        picked = replace(self, codes=self.codes[flat], row_scale=scale)
        return picked.dense().view(*index.shape, self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "row_scale": self.row_scale, "column_scale": self.column_scale}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ScaledCodes:
        return ScaledCodes(tensors["codes"], tensors["row_scale"], tensors["column_scale"])

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.kind,
            "shape": list(self.shape),
            "code_dtype": dtype_name(self.codes.dtype),
            **describe_scales(self.row_scale, self.column_scale),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> ScaledCodes:
        shape = shape_of(description)
        if description["code_dtype"] not in CODE_DTYPES:
            raise ValueError(f"codes are {', '.join(CODE_DTYPES)}, not {description['code_dtype']!r}")
        codes = torch.empty(shape, dtype=CODE_DTYPES[description["code_dtype"]], device="meta")
        return cls(codes, *empty_scales(shape, description))

    def rewrite(self, rewriter: Callable[[Form], Form]) -> Form:
        return rewriter(self)

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
    rows, columns = int(description["row_scales"]), int(description["column_scales"])
    row_scale = torch.empty(rows, 1, dtype=float_dtype(description["row_dtype"]), device="meta")
    column_scale = torch.empty(1, columns, dtype=float_dtype(description["column_dtype"]), device="meta")
    check_scales(shape, row_scale, column_scale)
    return row_scale, column_scale
