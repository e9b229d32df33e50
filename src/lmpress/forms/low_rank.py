"""`LowRank(left, right)`: the product of two forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, form_from_description, prefixed, unprefixed


@dataclass(frozen=True, repr=False)
class LowRank(Form):
    """`left @ right`: left is a form of shape (out, rank), right a form of shape (rank, in)."""

    left: Form
    right: Form
    kind = "low_rank"

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"factors do not fit: {self.left.shape} @ {self.right.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """The inner dimension: an upper bound of the rank of the matrix."""
        return self.right.shape[0]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.left.dense(wide) @ self.right.dense(wide)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.left.forward(self.right.forward(x))

    def rows(self, index: Tensor) -> Tensor:
        return self.left.rows(index).float() @ self.right.dense()

    def tensors(self) -> dict[str, Tensor]:
        return prefixed("left", self.left) | prefixed("right", self.right)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LowRank:
        return LowRank(
            self.left.with_tensors(unprefixed("left", tensors)),
            self.right.with_tensors(unprefixed("right", tensors)),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.kind,
            "shape": list(self.shape),
            "left": self.left.describe(),
            "right": self.right.describe(),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> LowRank:
        return cls(form_from_description(description["left"]), form_from_description(description["right"]))

    def check(self) -> None:
        self.left.check()
        self.right.check()

    def rewrite(self, rewriter: Callable[[Form], Form]) -> Form:
        return LowRank(self.left.rewrite(rewriter), self.right.rewrite(rewriter))

    def resident(self) -> LowRank:
        left, right = self.left.resident(), self.right.resident()
        return self if left is self.left and right is self.right else LowRank(left, right)

    def stored(self, resident: Form) -> LowRank:
        assert isinstance(resident, LowRank)
        return LowRank(self.left.stored(resident.left), self.right.stored(resident.right))

    @property
    def formula(self) -> str:
        return f"LowRank({self.left.formula}, {self.right.formula}; r={self.rank})"
