"""Which step may follow which on one weight: structure, factors or sparsity, bits, recovery."""

from __future__ import annotations

from collections.abc import Sequence

from lmpress.methods.patterns import check_grid_fits
from lmpress.recipes.steps import (
    Correct,
    EntropyQuantize,
    FormStep,
    Pivot,
    PruneNeurons,
    Quantize,
    Recover,
    SparseLowRank,
    Sparsify,
    Step,
    Svd,
)
from lmpress.recipes.steps.bits import SURVIVORS_NEED_GPTQ


def conflict(step: Step, earlier: Sequence[Step]) -> str | None:
    """Why `step` cannot come after the `earlier` steps on the same weight; None where it can."""
    kinds = {type(s) for s in earlier}
    before = next((s.kind for s in earlier if isinstance(s, FormStep)), None)
    if isinstance(step, PruneNeurons) and before:
        return f"prune_neurons comes before {before} of the same MLP"
    if isinstance(step, Svd | SparseLowRank):
        other = next((s.kind for s in earlier if isinstance(s, FormStep) and not isinstance(s, Svd)), None)
        other = other or (before if isinstance(step, SparseLowRank) else None)
        return f"{step.kind} comes before {other} of the same modules" if other else None
    if isinstance(step, Sparsify):
        other = next((s.kind for s in earlier if isinstance(s, FormStep) and not isinstance(s, Svd)), None)
        if other == step.kind:
            return "modules are made sparse once"
        return f"sparsify comes before {other} of the same modules" if other else None
    if isinstance(step, Pivot):
        if not kinds & {Svd, SparseLowRank}:
            return (
                "pivot turns the factors of svd into pivoted ones: put an svd of the same modules before it"
            )
        if kinds & {Pivot, Sparsify, Correct}:
            return "pivot comes right after svd or sparse_low_rank of the same modules"
        return _quantized("pivot", earlier)
    if isinstance(step, Correct) and not before:
        return "correct makes up for what earlier steps took away, and there is none for these modules"
    if isinstance(step, Quantize):
        return _before_quantize(step, earlier)
    if isinstance(step, EntropyQuantize):
        return _before_entropy(earlier)
    if isinstance(step, Recover) and step.keep == "merge":
        other = next(
            (s.kind for s in earlier if isinstance(s, Sparsify | SparseLowRank | Pivot | EntropyQuantize)),
            None,
        )
        return (
            f"an update cannot be merged into what {other} makes; let recover have keep: term"
            if other
            else None
        )
    return None


def _before_quantize(step: Quantize, earlier: Sequence[Step]) -> str | None:
    for s in earlier:
        if isinstance(s, Quantize | EntropyQuantize):  # named by number in the plan, which sees the modules
            continue
        has_bits = isinstance(s, Sparsify | SparseLowRank | Correct) and s.bits is not None
        if has_bits or (isinstance(s, SparseLowRank) and s.factor_bits is not None):
            return f"{s.kind} with bits has quantized these modules already; leave one of the two out"
        if isinstance(s, Sparsify | SparseLowRank):
            if step.solver != "gptq":
                return SURVIVORS_NEED_GPTQ
            try:
                check_grid_fits(step.symmetric, step.granularity == "tensor", s.group)
            except ValueError as error:
                return f"after {s.kind}: {error}"
    return None


def _before_entropy(earlier: Sequence[Step]) -> str | None:
    for s in earlier:
        if isinstance(s, Sparsify | SparseLowRank):
            return f"an entropy coder stores zeros at what they are worth; leave {s.kind} out"
        if isinstance(s, Correct) and s.bits is not None:
            return "correct with bits has quantized these modules already; leave one of the two out"
    return None


def _quantized(what: str, earlier: Sequence[Step]) -> str | None:
    for s in earlier:
        if isinstance(s, Quantize | EntropyQuantize) or (
            isinstance(s, SparseLowRank) and s.factor_bits is not None
        ):
            return f"{what} comes before the factors are quantized by {s.kind}"
    return None
