"""`Sum(terms)`: several forms of one shape, added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, Part, Refit, Run, form_from_description, prefixed, unprefixed


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

    @property
    def addends(self) -> tuple[Form, ...]:
        return self.terms

    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(f"term{i}", term) for i, term in enumerate(self.terms))

    def with_parts(self, parts: Mapping[str, Form]) -> Sum:
        return Sum(tuple(parts[f"term{i}"] for i in range(len(self.terms))))

    def forward(self, x: Tensor) -> Tensor:
        return self.run_by(lambda term, x: term.forward(x), x)

    def run_by(self, run: Run, x: Tensor) -> Tensor:
        y = run(self.terms[0], x)
        for term in self.terms[1:]:
            y = y + run(term, x)
        return y

    def merged(self, update: Tensor, refit: Refit) -> Sum:
        """The first term takes the update."""
        return Sum((self.terms[0].merged(update, refit), *self.terms[1:]))

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

    @property
    def formula(self) -> str:
        return " + ".join(term.formula for term in self.terms)
