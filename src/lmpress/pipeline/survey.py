"""One look at all blocks before any is changed: how wide each MLP shall be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lmpress.methods.neuron_pruning import aligned_width, allocate_widths, paper_ratios, removal_curve
from lmpress.pipeline.plan import Plan
from lmpress.pipeline.rewriting import current_form
from lmpress.pipeline.source import ModelSource
from lmpress.pipeline.stream import BlockStream
from lmpress.progress import track
from lmpress.recipes import PruneNeurons

MOST = 4
"""No layer loses more than this many times its even share."""

POINTS = 24
"""Widths at which a layer's removal loss is measured."""

LEAST = 16
"""Windows that a survey looks at, at the least: it ranks blocks, and a quarter of the text ranks them."""


def survey_samples(samples: int) -> int:
    """How many of the calibration windows a survey looks at."""
    return min(samples, max(LEAST, samples // 4))


def dense_width(source: ModelSource) -> int:
    """Neurons of a block of the dense model."""
    name = f"{source.layout.block_name(0)}.{source.layout.neurons.output}"
    return int(source.skeleton.get_submodule(name).in_features)


def needs_survey(plan: Plan) -> bool:
    """Whether the widths depend on all the blocks together."""
    step = None if plan.neurons is None else plan.recipe.steps[plan.neurons]
    return isinstance(step, PruneNeurons) and step.allocation in ("activation", "loss")


def uniform_widths(plan: Plan, source: ModelSource) -> list[int] | None:
    """The same width for every block, None where no neurons are pruned."""
    step = None if plan.neurons is None else plan.recipe.steps[plan.neurons]
    if not isinstance(step, PruneNeurons):
        return None
    width = aligned_width(dense_width(source), step.ratio or 0.0, step.multiple_of)
    return [width] * source.layout.num_blocks


def survey_widths(
    plan: Plan, source: ModelSource, stream: BlockStream, load: Callable[[int], nn.Module]
) -> dict[str, Any]:
    """Stream the dense model once, and share the removal among its blocks.

    `activation` is SPQ's rule: a block whose neurons are quiet loses more (arXiv 2602.18420). `loss`
    spends the removals where they cost least: the exact compensated loss of each width (2302.04089),
    relative to the energy of the residual stream that it is added to, summed over the blocks and
    minimized by dynamic programming.

    Args:
        load: gives the real dense block of an index.

    Returns:
        {"widths": [...], and what they were decided by}.
    """
    step = plan.recipe.steps[plan.neurons or 0]
    assert isinstance(step, PruneNeurons)
    width = dense_width(source)
    site = source.layout.site_of(source.layout.neurons.output)
    means: list[float] = []
    curves: list[dict[int, float]] = []
    energies: list[float] = []
    for i in track(range(source.layout.num_blocks), "Survey of the blocks"):
        block = load(i)
        stream.at_block(i)
        by_loss = step.allocation == "loss"
        signal = None if by_loss else source.layout.neurons.signal
        statistics, activation = stream.gather(block, site, by_loss, signal, advance=True)
        if activation is not None:
            means.append(float(activation.mean()))
        if by_loss:
            output = block.get_submodule(site.linears[0])
            widths = _candidates(width, step)
            losses = removal_curve(
                current_form(output).dense(),
                statistics,
                widths,
                has_bias=output.bias is not None,
            )
            curves.append(dict(zip(widths, losses, strict=True)))
        energies.append(stream.energy())
    if means:
        ratios = paper_ratios(means, step.min_ratio, step.max_ratio)
        return {
            "widths": [aligned_width(width, ratio, step.multiple_of) for ratio in ratios],
            "mean_activation": means,
        }
    weights = [1.0 / max(energy, 1e-30) for energy in energies]
    remove = round((step.ratio or 0.0) * width * len(curves))
    chosen = allocate_widths(curves, weights, remove)
    losses = [curve[w] * weight for curve, w, weight in zip(curves, chosen, weights, strict=True)]
    return {"widths": chosen, "relative_loss": losses}


def _candidates(width: int, step: PruneNeurons) -> list[int]:
    """Widths to choose from, aligned: from all of them down to MOST times the even share removed."""
    unit, share = step.multiple_of, step.ratio or 0.0
    most = max(share, min(0.9, MOST * share))
    lowest = max(unit, int(width * (1 - most)) // unit * unit)
    stride = max(unit, -(-(width - lowest) // POINTS // unit) * unit)
    return sorted({width, min(lowest, width), *range(width // unit * unit, lowest, -stride)}, reverse=True)
