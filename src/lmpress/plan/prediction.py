"""The bytes to expect, from shapes alone; an estimate, and not `exact`, where data decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmpress.plan.plan import Plan, narrowed
from lmpress.recipes import Leaf, Outline
from lmpress.source import ModelSource


def predict(plan: Plan, source: ModelSource) -> dict[str, Any]:
    """`bytes` of the weights, and whether they are `exact`."""
    outlines = [outline(plan, name) for name in plan.modules]
    total, exact = sum(each.bytes for each in outlines), all(each.exact for each in outlines)
    state = source.skeleton.state_dict(keep_vars=True)
    rest = [name for name in source.names if name.removesuffix(".weight") not in plan.modules]
    for name in rest:  # vectors in the type of the source, tables such as learned positions in `dtype`
        kept = plan.dtype if state[name].dim() > 1 else source.dtype
        total += state[name].numel() * kept.itemsize
    return {"bytes": total, "exact": exact}


def outline(plan: Plan, name: str) -> Outline:
    """What a module will be stored as, as far as shapes tell."""
    module = plan.modules[name]
    shape, sure = narrowed(plan, name)
    result = Outline(shape, (Leaf(*shape),), sure, plan.dtype.itemsize)
    for index, step in plan.form_steps(name):
        result = step.after(replace(result, granularity=module.granularity.get(index)))
    recovery = plan.recipe.recovery
    return result if recovery is None or name not in plan.trained else recovery.after(result)
