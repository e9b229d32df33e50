"""Ranks under one number of parameters: at the same relative error, or at the least expected loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from lmpress.methods.svd_llm import ranks_for_budget, row_weights, spectrum
from lmpress.recipes.steps import Svd
from lmpress.survey.budgets.base import Budget, Pool, Sight, State


class Ranks(Budget):
    """A module's share is the rank of its factors; 0 where the weight is better left dense."""

    kind: ClassVar[str] = "ranks"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.step = cast(Svd, pool.step)

    def look(self, sight: Sight) -> Tensor:
        """What each component adds to the squared error, of the outputs or of the model's loss."""
        weight = sight.weight
        if self.step.allocation == "sensitivity" and sight.sensitivity is not None:
            weight = weight * row_weights(sight.sensitivity)[:, None]
        return spectrum(weight, sight.inputs.require_hessian())

    def give_out(self, told: Mapping[str, Any]) -> dict[str, Any]:
        names = list(self.pool.shapes)
        ranks = ranks_for_budget(
            [told[name] for name in names],
            [self.pool.shapes[name] for name in names],
            self.step.ratio or 1.0,
            sensitivities=[1.0] * len(names) if self.step.allocation == "sensitivity" else None,
            pivoted="pivot" in self.pool.kinds,
            multiple_of=self.step.multiple_of,
        )
        return {"ranks": {name: rank or 0 for name, rank in zip(names, ranks, strict=True)}}

    def begin(self, given: Mapping[str, Any]) -> State:
        return State(given, given["ranks"])
