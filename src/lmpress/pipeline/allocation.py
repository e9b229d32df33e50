"""A budget of bits that modules share: one look at the dense model, and then a share for each module.

Whole bits are given out at once, by an exact knapsack. The step of entropy-coded modules is one constant for
all; what a module will take at a step is known to about a percent, so that the constant is corrected after
every block by what the coder has really made of the blocks before, and the whole meets its target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.errors import RequestError
from lmpress.families import Layout
from lmpress.forms import EntropyCoded, Form
from lmpress.methods.entropy_quantization import (
    RateCurve,
    conditional_deviations,
    rate_curve,
    solve_step,
)
from lmpress.methods.gptq import GptqOptions
from lmpress.methods.knapsack import solve
from lmpress.methods.mixed_precision import error_deviations, predicted_losses
from lmpress.methods.rtn import choose_scale_dtype
from lmpress.methods.sparsity_allocation import removal_costs, removal_curve, shares_for_budget
from lmpress.methods.svd_llm import ranks_for_budget, row_weights, spectrum
from lmpress.pipeline.plan import Plan
from lmpress.pipeline.prediction import Leaf
from lmpress.pipeline.rewriting import TableMetric, current_form
from lmpress.pipeline.sensitivity import entrances, head_statistics, sensitivities
from lmpress.pipeline.stream import BlockStream
from lmpress.pipeline.surveys import key_of
from lmpress.recipes import EntropyQuantize, LeafContext, Pivot, Quantize, SparseLowRank, Sparsify, Svd
from lmpress.statistics import InputStatistics

CHOICES = (2, 3, 4, 5, 6, 7, 8)
"""Bits that a module may get."""

SLACK = 0.001
"""Bits a weight below its target that an entropy-coded model aims at: no block corrects the last one."""

TRUST = 2
"""Surplus bits that n blocks tell are divided by 1 + TRUST / n^2: the first blocks are unlike the others."""

SURPRISE = 0.03
"""A block that misses its prediction by more, relatively, is done again: the first one, as a rule."""


TOKENS = "token_probabilities"
"""What the probabilities of the tokens are called among the sensitivities."""


HEAD = "head_hessian"
"""What the Hessian of the head's input is called among the sensitivities."""

LOOKED_UP = "embedding_gradient"
"""What the mean squared gradients by the components of an embedding are called among the sensitivities."""


@dataclass(frozen=True)
class Allocation:
    """Who gets what.

    Attributes:
        bits: whole bits by step and module.
        ranks: ranks by step and module, 0 where a weight stays dense.
        targets: bits a weight by step, for entropy-coded ones.
        curves: what each module takes at every step of the grid, by step of the recipe and module.
        sensitivity: mean squared gradient by output, by module; and what tables need.
        tokens: that the survey looked at.
        kept: shares of their parameters that modules keep, by step and module.
    """

    bits: dict[int, dict[str, int]]
    ranks: dict[int, dict[str, int]]
    targets: dict[int, float]
    curves: dict[int, dict[str, RateCurve]]
    sensitivity: dict[str, Tensor]
    tokens: int = 0
    kept: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], sensitivity: dict[str, Tensor], plan: Plan) -> Allocation:
        """From what `survey_budgets` told."""
        bits: dict[int, dict[str, int]] = {}
        ranks: dict[int, dict[str, int]] = {}
        kept: dict[int, dict[str, float]] = {}
        targets: dict[int, float] = {}
        curves: dict[int, dict[str, RateCurve]] = {}
        for key, told in entry["budgets"].items():
            index = int(key)
            step = plan.recipe.steps[index]
            if isinstance(step, EntropyQuantize):
                targets[index] = step.bits
                curves[index] = {
                    name: RateCurve(c["weights"], c["overhead"], tuple(c["log_steps"]), tuple(c["bits"]))
                    for name, c in told["curves"].items()
                }
                _check_rate(plan, index, step.bits, list(curves[index].values()))
            elif isinstance(step, Svd):
                ranks[index] = {name: int(rank) for name, rank in told["ranks"].items()}
            elif isinstance(step, Sparsify | SparseLowRank):
                names = list(told["curves"])
                weights = [math.prod(plan.modules[name].shape) for name in names]
                shares = shares_for_budget([told["curves"][name] for name in names], weights, 1 - step.share)
                kept[index] = {} if step.group else dict(zip(names, shares, strict=True))
            else:
                bits[index] = {name: int(width) for name, width in told["bits"].items()}
        return cls(bits, ranks, targets, curves, sensitivity, int(entry.get("tokens", 0)), kept)

    def shares(
        self, names: Iterable[str], past: Sequence[Mapping[str, Any]], tried: Mapping[str, Any] | None = None
    ) -> dict[str, LeafContext]:
        """What the modules of the next block get.

        Args:
            names: the modules of that block.
            past: the journal's entries of the blocks that are done, with their `rates`.
            tried: the rates of this block as it came out before, if it is done again.
        """
        steps = {index: self.step(index, past, tried or {}) for index in self.targets}
        shares = {}
        for name in names:
            bits = next((own[name] for own in self.bits.values() if name in own), None)
            step = next((steps[i] for i in steps if name in self.curves[i]), None)
            rank = next((own[name] for own in self.ranks.values() if name in own), None)
            keep = next((own[name] for own in self.kept.values() if name in own), None)
            sensitivity = self.sensitivity.get(name)
            shares[name] = LeafContext(
                bits=bits, grid_step=step, rank=rank, keep=keep, sensitivity=sensitivity
            )
        return shares

    def table(self, name: str, layout: Layout) -> TableMetric | None:
        """What errors in the embedding or the head cost: in both, if one table is both."""
        if TOKENS not in self.sensitivity:
            return None
        head, gradient = self.sensitivity[HEAD], self.sensitivity[LOOKED_UP]
        hessian = torch.zeros_like(head) if name == layout.embedding and not layout.tied else head.clone()
        if name == layout.embedding and gradient.shape[0] == hessian.shape[0]:
            hessian.diagonal().add_(gradient)
        if not bool(hessian.any()):
            hessian.diagonal().fill_(1.0)  # rows that are projected before the first block: all alike
        diagonal = hessian.diagonal().clone()
        statistics = InputStatistics(self.tokens, torch.zeros_like(diagonal), diagonal, None, hessian)
        return TableMetric(self.sensitivity[TOKENS], statistics)

    def step(self, index: int, past: Sequence[Mapping[str, Any]], tried: Mapping[str, Any]) -> float:
        """The grid step at which the modules that are still to come take what is left of the budget."""
        curves, target = self.curves[index], self.targets[index]
        done = rates_of(index, past)
        seen = {name for rate in done for name in rate["modules"]}
        rest = {name: curve for name, curve in curves.items() if name not in seen}
        spent, weights = sum(r["bits"] for r in done), sum(r["weights"] for r in done)
        known = [*done, *([tried[str(index)]] if str(index) in tried else [])]
        surplus = _surplus(known, trust=0 if tried else TRUST)
        # modules that lost neurons or were factored have fewer weights than their curves tell
        whole = sum(curves[name].weights for rate in known for name in rate["modules"])
        scale = sum(rate["weights"] for rate in known) / whole if whole else 1.0
        left = sum(curve.weights for curve in rest.values()) * scale
        if not left:
            return 1.0
        wanted = ((target - SLACK) * (weights + left) - spent) / left - surplus
        least = solve_step(list(rest.values()), _least(list(rest.values())))
        try:
            return min(least, solve_step(list(rest.values()), wanted))
        except ValueError:  # what is left of the budget is less than the rest can do with
            return least

    def settled(self, rates: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a block took about what was expected of it; else it is worth doing again."""
        return all(
            abs(rate["bits"] - rate["predicted"] - _surplus(rates_of(int(key), past)) * rate["weights"])
            <= SURPRISE * rate["bits"]
            for key, rate in rates.items()
        )

    def rates(self, forms: Mapping[str, Form], shares: Mapping[str, LeafContext]) -> dict[str, Any]:
        """What a block's entropy-coded modules really took, and what was expected; for the journal."""
        told: dict[str, Any] = {}
        for index, curves in self.curves.items():
            names = [name for name in forms if name in curves]
            if not names:
                continue
            bits = weights = 0
            predicted = 0.0
            for name in names:
                own_bits, own_weights = _coded(forms[name])
                step, curve = shares[name].grid_step, curves[name]
                assert step is not None
                bits, weights = bits + own_bits, weights + own_weights
                predicted += curve.total_bits(step) * own_weights / max(1, curve.weights)
            told[str(index)] = {"modules": names, "bits": bits, "weights": weights, "predicted": predicted}
        return told


def rates_of(index: int, past: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the blocks that are done took, by the entries of the journal."""
    return [entry["rates"][str(index)] for entry in past if str(index) in entry.get("rates", {})]


def _surplus(rates: Sequence[Mapping[str, Any]], trust: int = TRUST) -> float:
    """Real bits a weight less predicted ones, smaller while few blocks have told it.

    A difference, for what curves do not know is mostly how large the values are (of compensated weights, of
    factors), and that adds the same number of bits at any step.
    """
    more = sum(rate["bits"] - rate["predicted"] for rate in rates)
    weights = sum(rate["weights"] for rate in rates)
    return float(more / (weights * (1 + trust / len(rates) ** 2))) if weights else 0.0


def _check_rate(plan: Plan, index: int, bits: float, curves: Sequence[RateCurve]) -> None:
    """RequestError where entropy-coded modules cannot do with so few bits."""
    least = _least(curves) + SLACK
    if bits < least:
        raise RequestError(
            f"{_place(plan, index)}: {bits} bits a weight cannot be met; scales and tables alone take "
            f"{_upwards(least)}, which is the least"
        )


def _place(plan: Plan, index: int) -> str:
    return f"recipe {plan.recipe.name}: step {index + 1} ({plan.recipe.steps[index].kind})"


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
        if isinstance(leaf, EntropyCoded):
            bits += 8 * leaf.num_bytes
            weights += leaf.shape[0] * leaf.shape[1]
        return leaf

    form.rewrite(visit)
    return bits, weights


def survey_key(plan: Plan, model: str, text: str, precision: torch.dtype) -> str | None:
    """The key of a survey that recipes can share (see `key_of`): curves of rates hold at every target."""
    steps = {index: plan.recipe.steps[index] for index in plan.budgets}
    looks = {index: _look(step) for index, step in steps.items()}
    if None in looks.values():
        return None
    budgets = {index: [look, plan.budgets[index]] for index, look in looks.items()}
    told = {"budgets": budgets, "tables": plan.weighs_tokens, "dtype": str(plan.dtype)}
    return key_of(plan, model, text, precision, **told)


def _look(step: Any) -> dict[str, Any] | None:
    """What decides the curves of a step, whatever its target; None where there is more to a survey than
    curves."""
    if isinstance(step, EntropyQuantize):
        return dict(step.model_dump(mode="json") | {"bits": None})
    if isinstance(step, Sparsify | SparseLowRank):
        return {"removal": step.damped}
    return None


def survey_budgets(
    plan: Plan,
    stream: BlockStream,
    outer: Any,
    load: Callable[[int], nn.Module],
    directory: Path,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Look at the dense model, forwards for the inputs of its linears and backwards for its gradients.

    Args:
        stream: in front of the first block of the dense model; behind the last one afterwards.
        outer: the model, everything outside its blocks real.
        load: gives the real dense block of an index.
        directory: where hidden states are spooled.

    Returns:
        What the journal keeps; and the sensitivity of every linear by full name, beside what tables need.

    Raises:
        RequestError: a budget that cannot be met; it tells the least that can.
    """
    layout, budgets = stream.layout, plan.budgets
    sensitivity: dict[str, Tensor] = {}
    told: dict[int, dict[str, Any]] = {index: {} for index in budgets}

    def seen(
        i: int, block: nn.Module, squares: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]
    ) -> None:
        known: dict[tuple[int, int], Tensor] = {}  # linears of one site have one input
        for linear, square in squares.items():
            name = f"{layout.block_name(i)}.{linear}"
            sensitivity[name] = square
            weight = current_form(block.get_submodule(linear)).dense()
            for index in (index for index, names in budgets.items() if name in names):
                step = plan.recipe.steps[index]
                if isinstance(step, Svd):
                    told[index][name] = _spectrum(step, weight, inputs[linear], square.to(weight.device))
                    continue
                key = index, id(inputs[linear])
                if key not in known:
                    known[key] = _deviations(step, inputs[linear])
                told[index][name] = _outlook(step, weight, known[key], square.to(weight.device))

    with entrances(stream, load, directory, "Survey of the blocks") as entered:
        if plan.weighs_tokens:
            tokens, head = head_statistics(outer, layout, stream.windows, stream.states, stream.device)
            sensitivity |= {TOKENS: tokens, HEAD: head.require_hessian().cpu()}
        gradients = sensitivities(stream, outer, entered, load, seen, plan.recipe.seed)
    if plan.weighs_tokens:
        sensitivity[LOOKED_UP] = gradients.square().mean((0, 1)) * _multiplier(outer, layout) ** 2
    shared = {str(index): _given_out(plan, index, told[index]) for index in budgets}
    return {"tokens": stream.windows.numel(), "budgets": shared}, sensitivity


def _multiplier(outer: Any, layout: Layout) -> float:
    """What rows of the embedding are multiplied by once they are looked up: Gemma does."""
    return float(getattr(outer.get_submodule(layout.embedding), "scalar_embed_scale", None) or 1.0)


def _spectrum(step: Svd, weight: Tensor, inputs: InputStatistics, sensitivity: Tensor) -> Tensor:
    """What each component adds to the squared error, of the outputs or of the model's loss."""
    if step.allocation == "sensitivity":
        weight = weight * row_weights(sensitivity)[:, None]
    return spectrum(weight, inputs.require_hessian())


def _deviations(step: Any, inputs: InputStatistics) -> Tensor:
    """What the error of an input's column is divided by, as the solver of the step weighs it."""
    if isinstance(step, EntropyQuantize):
        return conditional_deviations(inputs, step.options())
    if isinstance(step, Sparsify | SparseLowRank):
        return removal_costs(inputs, step.damped)
    assert isinstance(step, Quantize)
    feedback = None
    if step.solver == "gptq":
        feedback = GptqOptions(granularity=step.granularity, damping=step.damping, order=step.order)
    return error_deviations(inputs, feedback)


def _outlook(step: Any, weight: Tensor, deviations: Tensor, sensitivity: Tensor) -> Any:
    """What one module costs: its rate at every step, or its loss and size at every number of bits."""
    if isinstance(step, EntropyQuantize):
        return asdict(rate_curve(weight, deviations, step.options(), sensitivity=sensitivity))
    if isinstance(step, Sparsify | SparseLowRank):
        return removal_curve(weight, deviations, sensitivity)
    assert isinstance(step, Quantize)
    grid, symmetric = step.granularity, step.symmetric
    losses = predicted_losses(
        weight,
        deviations,
        CHOICES,
        granularity=grid,
        symmetric=symmetric,
        clip=step.clip,
        sensitivity=sensitivity,
    )
    sizes = []
    for bits in CHOICES:
        scale = choose_scale_dtype(weight, bits, grid, symmetric).itemsize
        rows, columns = weight.shape
        leaf = Leaf(rows, columns, bits=bits, granularity=grid, symmetric=symmetric, scale_bytes=scale)
        sizes.append(8 * leaf.bytes(itemsize=2))
    return losses, sizes


def _given_out(plan: Plan, index: int, told: Mapping[str, Any]) -> dict[str, Any]:
    step, names = plan.recipe.steps[index], plan.budgets[index]
    place = _place(plan, index)
    if isinstance(step, EntropyQuantize):
        _check_rate(plan, index, step.bits, [RateCurve(**told[name]) for name in names])
    if isinstance(step, EntropyQuantize | Sparsify | SparseLowRank):
        return {"curves": {name: told[name] for name in names}}
    if isinstance(step, Svd):
        ranks = ranks_for_budget(
            [told[name] for name in names],
            [plan.modules[name].shape for name in names],
            step.ratio or 1.0,
            sensitivities=[1.0] * len(names) if step.allocation == "sensitivity" else None,
            pivoted=any(isinstance(other, Pivot) for other in plan.recipe.steps),
            multiple_of=step.multiple_of,
        )
        return {"ranks": {name: rank or 0 for name, rank in zip(names, ranks, strict=True)}}
    assert isinstance(step, Quantize)
    losses, sizes = zip(*(told[name] for name in names), strict=True)
    weights = sum(rows * columns for rows, columns in (plan.modules[name].shape for name in names))
    smallest, budget = sum(own[0] for own in sizes), math.floor(step.bits * weights)
    if smallest > budget:
        raise RequestError(
            f"{place}: {step.bits} bits a weight cannot be met: with its scales, every module at "
            f"{CHOICES[0]} bits takes {_upwards(smallest / weights)}, which is the least"
        )
    solution = solve(losses, sizes, budget)
    return {
        "bits": {name: CHOICES[choice] for name, choice in zip(names, solution.choices, strict=True)},
        "bits_per_weight": solution.size / weights,
        "expected_loss": solution.cost / 2,
        "exact": solution.exact,
    }


def _upwards(bits: float) -> str:
    """A number that meets what it tells: rounded up."""
    return f"{math.ceil(bits * 1000) / 1000:.3f}"
