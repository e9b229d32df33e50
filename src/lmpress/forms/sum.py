"""`Sum(terms)`: several forms of one shape, added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, form_from_description, prefixed, unprefixed


@dataclass(frozen=True, repr=False)
class Sum(Form):
    """`terms[0] + terms[1] + ...`, all of one shape (out, in)."""

    terms: tuple[Form, ...]
    kind = "sum"

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a sum needs at least one term")
        if len({term.shape for term in self.terms}) > 1:
            raise ValueError(f"the terms of a sum differ in shape: {[t.shape for t in self.terms]}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = self.terms[0].dense(wide)
        for term in self.terms[1:]:
            total = total + term.dense(wide)
        return total.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.terms[0].forward(x)
        for term in self.terms[1:]:
            y = y + term.forward(x)
        return y

    def rows(self, index: Tensor) -> Tensor:
        total = self.terms[0].rows(index).float()
        for term in self.terms[1:]:
            total = total + term.rows(index).float()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for i, term in enumerate(self.terms) for k, v in prefixed(f"term{i}", term).items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Sum:
        return Sum(tuple(t.with_tensors(unprefixed(f"term{i}", tensors)) for i, t in enumerate(self.terms)))

    def describe(self) -> dict[str, Any]:
        terms = [term.describe() for term in self.terms]
        return {"form": self.kind, "shape": list(self.shape), "terms": terms}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Sum:
        return cls(tuple(form_from_description(term) for term in description["terms"]))

    def check(self) -> None:
        for term in self.terms:
            term.check()

    def rewrite(self, rewriter: Callable[[Form], Form]) -> Form:
        return Sum(tuple(term.rewrite(rewriter) for term in self.terms))

    def resident(self) -> Sum:
        terms = tuple(term.resident() for term in self.terms)
        return self if all(a is b for a, b in zip(terms, self.terms, strict=True)) else Sum(terms)

    def stored(self, resident: Form) -> Sum:
        assert isinstance(resident, Sum)
        return Sum(tuple(a.stored(b) for a, b in zip(self.terms, resident.terms, strict=True)))

    @property
    def formula(self) -> str:
        return " + ".join(term.formula for term in self.terms)
