"""Who gets what: the budgets of a plan, and where each of them stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lmpress.families import Layout
from lmpress.forms import Form
from lmpress.survey.budgets import Budget, Record, State
from lmpress.survey.tables import TableMetric, table_metric

Shares = dict[tuple[int, str], float]
"""By step and module."""


@dataclass(frozen=True)
class Allocation:
    """The budgets of a plan, before a block.

    Attributes:
        budgets: by the index of their step.
        states: where each of them stands.
        sensitivity: mean squared gradient by output, by module; and what tables need.
        tokens: that the survey looked at.
    """

    budgets: Mapping[int, Budget] = field(default_factory=dict)
    states: Mapping[int, State] = field(default_factory=dict)
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    @classmethod
    def begun(
        cls,
        budgets: Mapping[int, Budget],
        given: Mapping[str, Mapping[str, Any]],
        sensitivity: Mapping[str, Tensor],
        tokens: int,
    ) -> Allocation:
        """Before the first block.

        Args:
            given: what the surveys gave out, by the index of the step.
        """
        states = {index: budgets[index].begin(given[str(index)]) for index in budgets}
        return cls(budgets, states, sensitivity, tokens)

    def with_budget(self, index: int, budget: Budget, given: Mapping[str, Any]) -> Allocation:
        """With one more budget, before the first block."""
        states = {**self.states, index: budget.begin(given)}
        return replace(self, budgets={**self.budgets, index: budget}, states=states)

    def after(self, blocks: Sequence[Mapping[str, Any]]) -> Allocation:
        """Behind the blocks whose entries in the journal these are, counted from the first."""
        states = {index: replace(state, past=()) for index, state in self.states.items()}
        for entry in blocks:
            told = entry.get("rates", {})
            states = {index: state.then(told.get(str(index))) for index, state in states.items()}
        return replace(self, states=states)

    def next(self, names: Sequence[str], tried: Mapping[str, Record] | None = None) -> Shares:
        """The shares of the modules of the next block.

        Args:
            names: all modules of that block.
            tried: what this block took before, if it is done again.
        """
        tried = tried or {}
        return {
            (index, name): share
            for index, budget in self.budgets.items()
            for name, share in budget.next(self.states[index], names, tried.get(str(index))).items()
        }

    def took(self, forms: Mapping[str, Form], shares: Shares) -> dict[str, Record]:
        """What a block's modules really took, for the journal."""
        told = {}
        for index, budget in self.budgets.items():
            own = {name: share for (step, name), share in shares.items() if step == index}
            record = budget.took(self.states[index], forms, own)
            if record is not None:
                told[str(index)] = record
        return told

    def settled(self, records: Mapping[str, Record]) -> bool:
        """Whether a block took about what was expected of it; else it is worth doing again."""
        return all(
            self.budgets[int(key)].settled(self.states[int(key)], record) for key, record in records.items()
        )

    def table(self, name: str, layout: Layout) -> TableMetric | None:
        """What errors in the embedding or the head cost; None where nobody looked."""
        return table_metric(name, layout, self.sensitivity, self.tokens)

    def facts(self, gradients: bool) -> dict[int, dict[str, Any]]:
        """For the manifest: what came of each budget, by the index of its step.

        Args:
            gradients: tell of those that a survey with gradients gave out, or of the others.
        """
        return {
            index: budget.facts(self.states[index])
            for index, budget in self.budgets.items()
            if budget.gradients == gradients
        }
