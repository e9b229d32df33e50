"""Whole bits, 2 to 8, given out at once by an exact knapsack: the least expected loss under a size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from lmpress.errors import RequestError
from lmpress.methods.gptq import GptqOptions
from lmpress.methods.knapsack import solve
from lmpress.methods.mixed_precision import error_deviations, predicted_losses
from lmpress.methods.rtn import choose_scale_dtype
from lmpress.recipes.outline import Leaf
from lmpress.recipes.steps import Quantize
from lmpress.statistics import InputStatistics
from lmpress.survey.budgets.base import Budget, Pool, Sight, State, upwards

CHOICES = (2, 3, 4, 5, 6, 7, 8)
"""Bits that a module may get."""


class Bits(Budget):
    """A module's share is the bits of its codes."""

    kind: ClassVar[str] = "bits"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.step = cast(Quantize, pool.step)

    def look(self, sight: Sight) -> tuple[list[float], list[int]]:
        """The expected loss, and the size in bits, at every choice."""
        step, weight = self.step, sight.weight
        grid, symmetric = step.granularity, step.symmetric
        losses = predicted_losses(
            weight,
            self._columns(sight.inputs),
            CHOICES,
            granularity=grid,
            symmetric=symmetric,
            clip=step.clip,
            sensitivity=1.0 if sight.sensitivity is None else sight.sensitivity,
        )
        sizes = []
        for bits in CHOICES:
            scale = choose_scale_dtype(weight, bits, grid, symmetric).itemsize
            rows, columns = weight.shape
            leaf = Leaf(rows, columns, bits=bits, granularity=grid, symmetric=symmetric, scale_bytes=scale)
            sizes.append(8 * leaf.bytes(itemsize=2))
        return losses, sizes

    def _weigh(self, inputs: InputStatistics) -> Tensor:
        feedback = self.step.told(GptqOptions, bits=CHOICES[0]) if self.step.solver == "gptq" else None
        return error_deviations(inputs, feedback)

    def give_out(self, told: Mapping[str, Any]) -> dict[str, Any]:
        losses, sizes = zip(*(told[name] for name in self.pool.shapes), strict=True)
        smallest, budget = sum(own[0] for own in sizes), math.floor(self.step.bits * self.pool.weights)
        if smallest > budget:
            raise RequestError(
                f"{self.pool.place}: {self.step.bits} bits a weight cannot be met: with its scales, every "
                f"module at {CHOICES[0]} bits takes {upwards(smallest / self.pool.weights)}, "
                "which is the least"
            )
        solution = solve(losses, sizes, budget)
        return {
            "bits": dict(zip(self.pool.shapes, (CHOICES[c] for c in solution.choices), strict=True)),
            "bits_per_weight": solution.size / self.pool.weights,
            "expected_loss": solution.cost / 2,
            "exact": solution.exact,
        }

    def begin(self, given: Mapping[str, Any]) -> State:
        return State(given, given["bits"])

    def facts(self, state: State) -> dict[str, Any]:
        return {key: value for key, value in state.given.items() if key != "bits"}
