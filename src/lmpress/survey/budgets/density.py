"""One number of parameters for all modules: those entries go that the model's loss misses least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from lmpress.methods.sparsity_allocation import removal_costs, removal_curve, shares_for_budget
from lmpress.recipes.steps import SparseLowRank, Sparsify
from lmpress.statistics import InputStatistics
from lmpress.survey.budgets.base import Budget, Pool, Sight, State


class Density(Budget):
    """A module's share is the share of its parameters that it keeps."""

    kind: ClassVar[str] = "density"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.step = cast(Sparsify | SparseLowRank, pool.step)

    @property
    def decides(self) -> Any:
        return {"removal": self.step.damped, "pattern": self.step.pattern}

    def look(self, sight: Sight) -> list[float]:
        """The loss at every share that is removed; nothing for an n:m pattern: it takes the same from all."""
        if self.step.group is not None or sight.sensitivity is None:
            return []
        return removal_curve(sight.weight, self._columns(sight.inputs), sight.sensitivity)

    def _weigh(self, inputs: InputStatistics) -> Tensor:
        return removal_costs(inputs, self.step.damped)

    def give_out(self, told: Mapping[str, Any]) -> dict[str, Any]:
        return {"curves": {name: told[name] for name in self.pool.shapes}}

    def begin(self, given: Mapping[str, Any]) -> State:
        if self.step.group is not None:
            return State(given)
        names = list(given["curves"])
        weights = [math.prod(self.pool.shapes[name]) for name in names]
        shares = shares_for_budget([given["curves"][name] for name in names], weights, 1 - self.step.share)
        return State(given, dict(zip(names, shares, strict=True)))
