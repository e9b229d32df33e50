"""`Pivoted(basis, coefficients, index)`: a low-rank matrix, lossless, in r (m + n) - r^2 numbers.

PIFA, arXiv 2501.19090: r rows of a matrix of rank r span all the others. Store those rows and, for each other
row, its r coefficients: the gauge freedom A B = (A G)(G^-1 B) made into an identity that need not be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, Part, Refit, Run, form_from_description, prefixed, unprefixed
from lmpress.forms.pattern import pack_bits, unpack_bits


@dataclass(frozen=True, repr=False)
class Pivoted(Form):
    """Row p of the matrix is a row of `basis`; the others are `coefficients @ basis`, all in their places.

    Attributes:
        basis: a form (r, in): the pivot rows, in the order of the matrix.
        coefficients: a form (out - r, r): the other rows, in the order of the matrix, in terms of the basis.
        index: uint8 (1, ceil(out / 8)): a bitmap of the rows, one where a row is a pivot.
    """

    basis: Form
    coefficients: Form
    index: Tensor
    kind = "pivoted"
    is_product = True

    def __post_init__(self) -> None:
        if self.coefficients.shape[1] != self.basis.shape[0]:
            raise ValueError(
                f"{self.basis.shape[0]} basis rows for coefficients of {self.coefficients.shape}"
            )
        if tuple(self.index.shape) != (1, -(-self.shape[0] // 8)):
            raise ValueError(f"an index of shape {tuple(self.index.shape)} for {self.shape[0]} rows")

    @classmethod
    def from_parts(cls, basis: Form, coefficients: Form, pivots: Tensor) -> Pivoted:
        """From the pivots as a bool mask (out,)."""
        return cls(basis, coefficients, pack_bits(pivots[None]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.basis.shape[0] + self.coefficients.shape[0], self.basis.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of basis rows."""
        return self.basis.shape[0]

    def pivots(self) -> Tensor:
        """bool (out,), true where a row of the matrix is a basis row."""
        return unpack_bits(self.index, self.shape[0])[0]

    def _places(self) -> Tensor:
        """Where each row of the matrix stands in [basis; coefficients @ basis], int64 (out,)."""
        pivots = self.pivots()
        return torch.where(pivots, pivots.cumsum(0) - 1, self.rank + (~pivots).cumsum(0) - 1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        basis = self.basis.dense(wide)
        stacked = torch.cat([basis, self.coefficients.dense(wide) @ basis])
        return stacked[self._places()].to(dtype)

    def parts(self) -> tuple[Part, ...]:
        basis = Part("basis", self.basis, through=self._from_basis)
        return basis, Part("coefficients", self.coefficients, after="basis", rows=~self.pivots())

    def _from_basis(self) -> Tensor:
        """The matrix (out, r) that makes the whole of the basis."""
        coefficients = self.coefficients.dense()
        stacked = torch.cat([torch.eye(self.rank, device=coefficients.device), coefficients])
        return stacked[self._places()]

    def with_parts(self, parts: Mapping[str, Form]) -> Pivoted:
        return Pivoted(parts["basis"], parts["coefficients"], self.index)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_by(lambda part, x: part.forward(x), x)

    def run_by(self, run: Run, x: Tensor) -> Tensor:
        y = run(self.basis, x)  # (..., r)
        return torch.cat([y, run(self.coefficients, y)], -1).index_select(-1, self._places())

    def merged(self, update: Tensor, refit: Refit) -> Form:
        raise ValueError(f"an update cannot be merged into {self.formula}; keep it as a term")

    def tensors(self) -> dict[str, Tensor]:
        parts = prefixed("basis", self.basis) | prefixed("coefficients", self.coefficients)
        return {"index": self.index} | parts

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Pivoted:
        return Pivoted(
            self.basis.with_tensors(unprefixed("basis", tensors)),
            self.coefficients.with_tensors(unprefixed("coefficients", tensors)),
            tensors["index"],
        )

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.kind,
            "shape": list(self.shape),
            "basis": self.basis.describe(),
            "coefficients": self.coefficients.describe(),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Pivoted:
        basis = form_from_description(description["basis"])
        coefficients = form_from_description(description["coefficients"])
        rows = basis.shape[0] + coefficients.shape[0]
        return cls(basis, coefficients, torch.empty(1, -(-rows // 8), dtype=torch.uint8, device="meta"))

    def check(self) -> None:
        pivots = int(self.pivots().sum())
        if pivots != self.rank:
            raise ValueError(f"an index names {pivots} pivot rows instead of {self.rank}: it is damaged")
        super().check()

    @property
    def formula(self) -> str:
        return f"Pivoted({self.basis.formula}, {self.coefficients.formula}; r={self.rank})"
