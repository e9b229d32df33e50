"""One look at the dense model: every module tells the budgets that it draws on what it is worth.

Backwards, for what takes the gradients of the model; or in one pass forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.families import Layout
from lmpress.plan import Plan
from lmpress.progress import track
from lmpress.source import bias_of, current_form, failing_at
from lmpress.statistics import InputStatistics
from lmpress.stream import Activations, BlockStream, Walk
from lmpress.survey.budgets import BUDGETS, Budget, Pool, Sight
from lmpress.survey.sensitivity import entrances, head_statistics, sensitivities
from lmpress.survey.tables import HEAD, LOOKED_UP, TOKENS, multiplier

LEAST = 16
"""Windows that a survey looks at, at the least: it ranks blocks, and a quarter of the text ranks them."""


def survey_samples(samples: int) -> int:
    """How many of the calibration windows a survey looks at."""
    return min(samples, max(LEAST, samples // 4))


def budgets_of(plan: Plan) -> dict[int, Budget]:
    """The budgets of a plan, by the index of the step whose modules share them."""
    kinds = frozenset(step.kind for step in plan.recipe.steps)
    found = {}
    for index, step in enumerate(plan.recipe.steps):
        names = _members(plan, index)
        if step.budget is not None and names:
            shapes = {name: plan.modules[name].shape for name in names}
            found[index] = BUDGETS[step.budget](Pool(step, plan.place(index), shapes, kinds))
    return found


def _members(plan: Plan, index: int) -> list[str]:
    """The modules of the blocks that a step works on; of a step over sites, their first readers."""
    names = [name for name, m in plan.modules.items() if index in m.steps and name not in plan.outer]
    layout = plan.layout
    for i in range(layout.num_blocks):
        block = layout.block_name(i)
        sites = (
            site for site in layout.block(i).sites if index in plan.sites.get(f"{block}.{site.name}", ())
        )
        names += [f"{block}.{site.linears[0]}" for site in sites]
    return names


def look_backwards(
    budgets: Mapping[int, Budget],
    stream: BlockStream,
    outer: Any,
    load: Callable[[int], nn.Module],
    directory: Path,
    seed: int,
    tables: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Look at the dense model, forwards for the inputs of its linears and backwards for its gradients.

    Args:
        stream: in front of the first block of the dense model; behind the last one afterwards.
        outer: the model, everything outside its blocks real.
        load: gives the real dense block of an index.
        directory: where hidden states are spooled.
        tables: whether embeddings and heads are to be told of as well.

    Returns:
        What the journal keeps; and the sensitivity of every linear by full name, beside what tables need.

    Raises:
        RequestError: a budget that cannot be met; it tells the least that can.
    """
    layout = stream.layout
    sensitivity: dict[str, Tensor] = {}
    told: dict[int, dict[str, Any]] = {index: {} for index in budgets}

    def seen(
        i: int, block: nn.Module, squares: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]
    ) -> None:
        for linear, square in squares.items():
            name = f"{layout.block_name(i)}.{linear}"
            sensitivity[name] = square
            weight = current_form(block.get_submodule(linear)).dense()
            sight = Sight(weight, inputs[linear], square.to(weight.device))
            with failing_at(name):
                for index, budget in budgets.items():
                    if name in budget.pool.shapes:
                        told[index][name] = budget.look(sight)

    with entrances(stream, load, directory, "Survey of the blocks") as entered:
        if tables:
            tokens, head = head_statistics(outer, layout, stream.windows, stream.states, stream.device)
            sensitivity |= {TOKENS: tokens, HEAD: head.require_hessian().cpu()}
        gradients = sensitivities(stream, outer, entered, load, seen, seed)
    if tables:
        sensitivity[LOOKED_UP] = _mean_square(gradients, stream) * multiplier(outer, layout) ** 2
    given = {str(index): budget.give_out(told[index]) for index, budget in budgets.items()}
    return {"tokens": stream.windows.numel(), "budgets": given}, sensitivity


def _mean_square(gradients: Activations, stream: BlockStream) -> Tensor:
    """Of gradients (samples, seq_len, width) by component, float32 (width,)."""
    total = torch.zeros(gradients.shape[2], dtype=torch.float64)
    for rows in stream.batches():
        total += gradients[rows].double().square().sum((0, 1))
    return (total / (gradients.shape[0] * gradients.shape[1])).float()


def look_forwards(
    budget: Budget, layout: Layout, stream: BlockStream, load: Callable[[int], nn.Module]
) -> dict[str, Any]:
    """Let the text run once through all blocks, for a budget of a step over sites that asks for no gradients.

    Args:
        load: gives the real block of an index, as the step will find it.

    Returns:
        What the journal keeps.
    """
    told: dict[str, Any] = {}
    for i in track(range(layout.num_blocks), "Survey of the blocks"):
        with failing_at(layout.block_name(i)):
            told |= _looked_at(i, budget, layout, stream, load(i))
    return budget.give_out(told)


def _looked_at(
    i: int, budget: Budget, layout: Layout, stream: BlockStream, block: nn.Module
) -> dict[str, Any]:
    """What block `i` tells; the stream is behind it afterwards."""
    signal = budget.signal(layout.block(i))
    first = {f"{layout.block_name(i)}.{site.linears[0]}": site for site in layout.block(i).sites}
    sites = {name: site for name, site in first.items() if name in budget.pool.shapes}
    walk = Walk(stream.block(i), block)
    try:
        gathered = {name: walk.gather(site, budget.hessian, signal=signal) for name, site in sites.items()}
        walk.finish()
    finally:
        walk.close()
    energy = stream.energy()
    told: dict[str, Any] = {}
    for name, seen in gathered.items():
        module = block.get_submodule(sites[name].linears[0])
        told[name] = budget.look(
            Sight(
                current_form(module).dense(),
                seen.statistics,
                energy=energy,
                activation=seen.activation,
                has_bias=bias_of(module) is not None,
            )
        )
    return told
