"""One step of the grid for all entropy-coded modules, such that together they take the bits that were asked.

What a module will take at a step is known to about a percent, so the step is corrected after every block by
what the coder has really made of the blocks before, and the whole meets its target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, cast

from torch import Tensor

from lmpress.errors import RequestError
from lmpress.forms import EntropyCoded, Form
from lmpress.methods.entropy_quantization import RateCurve, conditional_deviations, rate_curve, solve_step
from lmpress.recipes.steps import EntropyQuantize
from lmpress.statistics import InputStatistics
from lmpress.survey.budgets.base import Budget, Pool, Record, Sight, State, upwards

SLACK = 0.001
"""Bits a weight below its target that an entropy-coded model aims at: no block corrects the last one."""

TRUST = 2
"""Surplus bits that n blocks tell are divided by 1 + TRUST / n^2: the first blocks are unlike the others."""

SURPRISE = 0.03
"""A block that misses its prediction by more, relatively, is done again: the first one, as a rule."""


class Rate(Budget):
    """A module's share is the step of its grid."""

    kind: ClassVar[str] = "rate"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.step = cast(EntropyQuantize, pool.step)

    @property
    def decides(self) -> Any:
        """The curves hold at every target."""
        return dict(self.step.model_dump(mode="json") | {"bits": None})

    def look(self, sight: Sight) -> dict[str, Any]:
        """The rate at every step of the grid."""
        assert sight.sensitivity is not None
        deviations = self._columns(sight.inputs)
        return asdict(
            rate_curve(sight.weight, deviations, self.step.options(), sensitivity=sight.sensitivity)
        )

    def _weigh(self, inputs: InputStatistics) -> Tensor:
        return conditional_deviations(inputs, self.step.options())

    def give_out(self, told: Mapping[str, Any]) -> dict[str, Any]:
        return {"curves": {name: told[name] for name in self.pool.shapes}}

    def begin(self, given: Mapping[str, Any]) -> State:
        state = State(given)
        least = _least(list(curves_of(state).values())) + SLACK
        if self.step.bits < least:
            raise RequestError(
                f"{self.pool.place}: {self.step.bits} bits a weight cannot be met; scales and tables alone "
                f"take {upwards(least)}, which is the least"
            )
        return state

    def next(self, state: State, names: Sequence[str], tried: Record | None = None) -> dict[str, float]:
        """The step at which the modules that are still to come take what is left of the budget."""
        curves = curves_of(state)
        own = [name for name in names if name in curves]
        return dict.fromkeys(own, self._next_step(state, curves, tried)) if own else {}

    def _next_step(self, state: State, curves: Mapping[str, RateCurve], tried: Record | None) -> float:
        done = state.past
        seen = {name for record in done for name in record["modules"]}
        rest = [curve for name, curve in curves.items() if name not in seen]
        spent, weights = sum(r["bits"] for r in done), sum(r["weights"] for r in done)
        known = [*done, *([] if tried is None else [tried])]
        surplus = _surplus(known, trust=TRUST if tried is None else 0)
        # modules that lost neurons or were factored have fewer weights than their curves tell
        whole = sum(curves[name].weights for record in known for name in record["modules"])
        scale = sum(record["weights"] for record in known) / whole if whole else 1.0
        left = sum(curve.weights for curve in rest) * scale
        if not left:
            return 1.0
        wanted = ((self.step.bits - SLACK) * (weights + left) - spent) / left - surplus
        least = solve_step(rest, _least(rest))
        try:
            return min(least, solve_step(rest, wanted))
        except ValueError:  # what is left of the budget is less than the rest can do with
            return least

    def took(self, state: State, forms: Mapping[str, Form], shares: Mapping[str, float]) -> Record | None:
        """What a block's modules really took, and what was expected."""
        curves = curves_of(state)
        names = [name for name in forms if name in curves]
        if not names:
            return None
        bits = weights = 0
        predicted = 0.0
        for name in names:
            own_bits, own_weights = _coded(forms[name])
            bits, weights = bits + own_bits, weights + own_weights
            expected = curves[name].total_bits(shares[name])
            predicted += expected * own_weights / max(1, curves[name].weights)
        return {"modules": names, "bits": bits, "weights": weights, "predicted": predicted}

    def settled(self, state: State, record: Record) -> bool:
        surprise = record["bits"] - record["predicted"] - _surplus(state.past) * record["weights"]
        return bool(abs(surprise) <= SURPRISE * record["bits"])

    def facts(self, state: State) -> dict[str, Any]:
        weights = sum(record["weights"] for record in state.past)
        if not weights:
            return {}
        return {
            "bits_per_weight": sum(record["bits"] for record in state.past) / weights,
            "predicted": sum(record["predicted"] for record in state.past) / weights,
        }


def curves_of(state: State) -> dict[str, RateCurve]:
    """The curves that the survey found, by module."""
    return {
        name: RateCurve(c["weights"], c["overhead"], tuple(c["log_steps"]), tuple(c["bits"]))
        for name, c in state.given["curves"].items()
    }


def _surplus(records: Sequence[Record], trust: int = TRUST) -> float:
    """Real bits a weight less predicted ones, smaller while few blocks have told it.

    A difference, for what curves do not know is mostly how large the values are (of compensated weights, of
    factors), and that adds the same number of bits at any step.
    """
    more = sum(record["bits"] - record["predicted"] for record in records)
    weights = sum(record["weights"] for record in records)
    return float(more / (weights * (1 + trust / len(records) ** 2))) if weights else 0.0


def _least(curves: Sequence[RateCurve]) -> float:
    """A little more than the least bits a weight that the curves can do with."""
    last = max(curve.log_steps[-1] for curve in curves)
    rate = sum(curve.total_bits(math.exp2(last)) for curve in curves)
    return 1.001 * rate / max(1, sum(curve.weights for curve in curves))


def _coded(form: Form) -> tuple[int, int]:
    """Bits and weights of the entropy-coded leaves of a form."""
    bits = weights = 0

    def visit(leaf: Form) -> Form:
        nonlocal bits, weights
        if leaf.kind == EntropyCoded.kind:
            bits += 8 * leaf.num_bytes
            weights += leaf.shape[0] * leaf.shape[1]
        return leaf

    form.rewrite(visit)
    return bits, weights
