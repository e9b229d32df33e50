"""`Dense(w)`: the matrix as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, dtype_name, float_dtype, shape_of


@dataclass(frozen=True, repr=False)
class Dense(Form):
    """A floating-point matrix `weight` of shape (out, in)."""

    weight: Tensor
    kind = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.weight[index]

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Dense:
        return Dense(tensors["weight"])

    def describe(self) -> dict[str, Any]:
        return {"form": self.kind, "shape": list(self.shape), "dtype": dtype_name(self.weight.dtype)}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Dense:
        dtype = float_dtype(description["dtype"])
        return cls(torch.empty(shape_of(description), dtype=dtype, device="meta"))

    @property
    def plain(self) -> Tensor | None:
        return self.weight

    @property
    def storage(self) -> str:
        return "dense"

    @property
    def formula(self) -> str:
        return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(
            dtype_name(self.weight.dtype), dtype_name(self.weight.dtype)
        )


def in_storage(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as it is stored: cast to `dtype`, or to bfloat16 where float16 would overflow."""
    if dtype == torch.float16 and weight.numel() and float(weight.abs().amax()) > 65504.0:
        return weight.to(torch.bfloat16)
    return weight.to(dtype)
