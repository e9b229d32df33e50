"""Neurons: one number for all blocks, and each keeps those that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from lmpress.families import BlockLayout, Rows
from lmpress.methods.neuron_pruning import aligned_width, allocate_widths, paper_ratios, removal_curve
from lmpress.recipes.steps import PruneNeurons
from lmpress.survey.budgets.base import Budget, Pool, Sight, State

MOST = 4
"""No layer loses more than this many times its even share."""

POINTS = 24
"""Widths at which a layer's removal loss is measured."""


class Widths(Budget):
    """A module's share is the number of neurons that its block keeps.

    `activation` is SPQ's rule: a block whose neurons are quiet loses more (arXiv 2602.18420). `loss` spends
    the removals where they cost least: the exact compensated loss of each width (2302.04089), relative to
    the energy of the residual stream that it is added to, summed over the blocks and minimized by dynamic
    programming.
    """

    kind: ClassVar[str] = "widths"
    gradients: ClassVar[bool] = False

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.step = cast(PruneNeurons, pool.step)
        self.hessian = self.step.allocation == "loss"

    def signal(self, block: BlockLayout) -> Rows | None:
        return None if self.hessian else block.neurons.signal

    def look(self, sight: Sight) -> Any:
        """The mean activation; or the loss at every width, over the energy of the residual stream."""
        if self.step.allocation == "activation":
            assert sight.activation is not None
            return float(sight.activation.mean())
        widths = self._candidates(sight.weight.shape[1])
        losses = removal_curve(sight.weight, sight.inputs, widths, has_bias=sight.has_bias)
        return dict(zip(widths, losses, strict=True)), 1.0 / max(sight.energy, 1e-30)

    def give_out(self, told: Mapping[str, Any]) -> dict[str, Any]:
        names, step = list(self.pool.shapes), self.step
        totals = [self.pool.shapes[name][1] for name in names]
        if step.allocation == "activation":
            means = [told[name] for name in names]
            ratios = paper_ratios(means, step.min_ratio, step.max_ratio)
            chosen = [aligned_width(t, r, step.multiple_of) for t, r in zip(totals, ratios, strict=True)]
            return {"widths": dict(zip(names, chosen, strict=True)), "mean_activation": means}
        curves, weights = zip(*(told[name] for name in names), strict=True)
        chosen = allocate_widths(curves, weights, round((step.ratio or 0.0) * sum(totals)))
        losses = [curve[w] * weight for curve, w, weight in zip(curves, chosen, weights, strict=True)]
        return {"widths": dict(zip(names, chosen, strict=True)), "relative_loss": losses}

    def begin(self, given: Mapping[str, Any]) -> State:
        return State(given, given["widths"])

    def facts(self, state: State) -> dict[str, Any]:
        return {**state.given, "widths": list(state.given["widths"].values())}

    def _candidates(self, width: int) -> list[int]:
        """Widths to choose from, aligned: from all of them down to MOST times the even share removed."""
        unit, share = self.step.multiple_of, self.step.ratio or 0.0
        most = max(share, min(0.9, MOST * share))
        lowest = max(unit, int(width * (1 - most)) // unit * unit)
        stride = max(unit, -(-(width - lowest) // POINTS // unit) * unit)
        found = {width, min(lowest, width), *range(width // unit * unit, lowest, -stride)}
        return sorted(found, reverse=True)
