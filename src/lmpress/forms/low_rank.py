"""`LowRank(left, right)`: the product of two forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, Part, Refit, Run, form_from_description, prefixed, unprefixed


@dataclass(frozen=True, repr=False)
class LowRank(Form):
    """`left @ right`: left is a form of shape (out, rank), right a form of shape (rank, in)."""

    left: Form
    right: Form
    kind = "low_rank"
    is_product = True

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

    def parts(self) -> tuple[Part, ...]:
        right = Part("right", self.right, through=self.left.dense)
        return right, Part("left", self.left, after="right")

    def with_parts(self, parts: Mapping[str, Form]) -> LowRank:
        return LowRank(parts["left"], parts["right"])

    def forward(self, x: Tensor) -> Tensor:
        return self.left.forward(self.right.forward(x))

    def run_by(self, run: Run, x: Tensor) -> Tensor:
        return run(self.left, run(self.right, x))

    def merged(self, update: Tensor, refit: Refit) -> LowRank:
        """The best product of the same rank (Eckart-Young), with leaves as the old ones are."""
        u, s, vt = torch.linalg.svd((self.dense() + update).double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        left, right = (u[:, : self.rank] * root).float(), (root[:, None] * vt[: self.rank]).float()
        return LowRank(refit(self.left, left), refit(self.right, right))

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

    @property
    def formula(self) -> str:
        return f"LowRank({self.left.formula}, {self.right.formula}; r={self.rank})"
