"""Recipe + config -> plan. What cannot work is refused here, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from lmpress.errors import RequestError
from lmpress.families import Layout
from lmpress.plan.plan import ModulePlan, Plan, block_of
from lmpress.plan.prediction import predict
from lmpress.recipes import GROUPS, Recipe, SiteStep, Step
from lmpress.source import ModelSource


def make_plan(recipe: Recipe, source: ModelSource) -> Plan:
    """Resolve `recipe` for the model of `source`; nothing but its config and headers is looked at.

    Raises:
        RequestError: targets that match no module; a step that cannot follow an earlier one of the same
            module; groups that do not divide a module's inputs; neurons that are too few to be removed in
            multiples.
    """
    layout = source.layout
    shapes = module_shapes(source)
    outer = tuple(name for name in (layout.embedding, layout.head) if name in shapes)
    modules = {name: ModulePlan(shape) for name, shape in shapes.items()}
    plan = Plan(source.name, recipe, _storage_dtype(recipe, source), layout, modules, {}, outer)
    over_sites = dict(recipe.site_steps)
    for index, step in enumerate(recipe.steps):
        if index in over_sites:
            plan = _over_sites(plan, index, over_sites[index])
        elif step.scope == "modules":
            plan = _over_modules(plan, index)
    _check_sites(plan)
    return replace(plan, predicted=predict(plan, source))


def _over_modules(plan: Plan, index: int) -> Plan:
    """The plan with one more step over modules: it rewrites their forms, or trains them."""
    step, shapes = plan.step(index), {name: module.shape for name, module in plan.modules.items()}
    names = targeted(step.targets, plan.layout, plan.outer, tuple(shapes))
    if not names:
        raise RequestError(
            f"{plan.place(index)} targets {step.targets!r}, which matches no module; "
            f"targets are {', '.join(GROUPS)}, or a glob such as '*.mlp.down_proj'"
        )
    for name in names:
        _check_order(plan, index, name)
    if step.trains:
        return replace(plan, trained=tuple(names))
    chosen = step.granularities({name: shapes[name] for name in names})
    modules = dict(plan.modules)
    for name in names:
        old = modules[name]
        _check_groups(plan, step, name)
        granularity = old.granularity | ({index: chosen[name]} if name in chosen else {})
        modules[name] = ModulePlan(old.shape, (*old.steps, index), granularity)
    return replace(plan, modules=modules)


def _over_sites(plan: Plan, index: int, step: SiteStep) -> Plan:
    """The plan with one more step over the sites of the blocks."""
    sites, layout = dict(plan.sites), plan.layout
    for i in range(layout.num_blocks):
        for site in step.sites(layout.block(i)):
            name = f"{layout.block_name(i)}.{site.name}"
            for linear in step.touched(site, layout.block(i)):
                _check_order(plan, index, f"{layout.block_name(i)}.{linear}")
                _check_unit(
                    plan, index, step.unit(linear, layout.block(i)), f"{layout.block_name(i)}.{linear}"
                )
            sites[name] = (*sites.get(name, ()), index)
    if not any(index in steps for steps in sites.values()):
        raise RequestError(f"{plan.place(index)} finds no site to work at in this model")
    return replace(plan, sites=sites)


def _check_sites(plan: Plan) -> None:
    """RequestError where a step over sites works for a later one that does not come."""
    layout = plan.layout
    for index, step in plan.recipe.site_steps:
        later = [
            plan.step(i)
            for block in range(layout.num_blocks)
            for site in step.sites(layout.block(block))
            for linear in site.linears
            for i in plan.modules[f"{layout.block_name(block)}.{linear}"].steps
        ]
        fault = step.lacks(later)
        if fault is not None:
            raise RequestError(f"{plan.place(index)}: {fault}")


def module_shapes(source: ModelSource) -> dict[str, tuple[int, int]]:
    """(out, in) of everything that can be compressed: embedding, a head of its own, linears of the blocks."""
    layout = source.layout
    names = [layout.embedding, *([] if layout.tied else [layout.head]), *layout.linears]
    shapes = {}
    for name in names:
        weight = source.skeleton.get_submodule(name).weight
        shapes[name] = (int(weight.shape[0]), int(weight.shape[1]))
    return shapes


def targeted(targets: str, layout: Layout, outer: Sequence[str], names: tuple[str, ...]) -> list[str]:
    """The modules among `names` that `targets` means."""
    if targets == "embeddings":
        return [name for name in names if name in outer]
    if targets not in GROUPS:
        return [name for name in names if fnmatchcase(name, targets)]
    meant = {
        f"{layout.block_name(i)}.{linear}"
        for i in range(layout.num_blocks)
        for linear in layout.block(i).group(targets)
    }
    return [name for name in names if name in meant]


def _check_order(plan: Plan, index: int, name: str) -> None:
    """RequestError where a step cannot follow those that touch the same module before it."""
    step, earlier = plan.step(index), plan.modules[name].steps
    place = f"{plan.place(index)} targets {step.targets!r}, and so {name}"
    if step.blocks_only and name in plan.outer:
        raise RequestError(f"{place}; {step.kind} works on the linears of the blocks, not on embeddings")
    coded = next((i for i in earlier if plan.step(i).leaves_codes), None)
    if coded is not None and step.takes_floats:
        raise RequestError(f"{place}, which step {coded + 1} quantizes; let their targets not overlap")
    fault = step.conflict([plan.step(i) for i in earlier])
    if fault is not None:
        raise RequestError(f"{place}: {fault}")


def _check_unit(plan: Plan, index: int, unit: int, name: str) -> None:
    """RequestError where neurons fall into no two of the parts that a step removes them by."""
    neurons = plan.modules[name].shape[1]
    if unit >= neurons:
        raise RequestError(
            f"{plan.place(index)}: multiple_of: {unit} leaves nothing to remove of the {neurons} neurons of"
            f" {name}; take a smaller one"
        )


def _check_groups(plan: Plan, step: Step, name: str) -> None:
    """Whether groups of neighbouring columns come out even, in every factor as well."""
    module, recipe = plan.modules[name], plan.recipe
    for what, size in step.column_groups.items():
        divide = "do" if what.startswith("groups") else "does"
        if module.shape[1] % size:
            way = "take a divisor, or granularity: channel" if divide == "do" else "take another pattern"
            raise RequestError(
                f"recipe {recipe.name}: {what} {divide} not divide the {module.shape[1]} inputs of {name}; "
                f"{way}"
            )
        for earlier in module.steps:
            fault = plan.step(earlier).uneven_ranks(size)
            if fault is not None:
                ranks, way = fault
                raise RequestError(
                    f"recipe {recipe.name}: ranks are {ranks}, and {what} {divide} not divide these; {way}"
                )
        _check_widths(plan, name, what, size, divide)


def _check_widths(plan: Plan, name: str, what: str, size: int, divide: str) -> None:
    place = block_of(plan.layout, name)
    if place is None:
        return
    for _, step in plan.recipe.site_steps:
        unit = step.unit(place[1], place[0])
        if unit % size:
            raise RequestError(
                f"recipe {plan.recipe.name}: neurons are pruned to multiples of {unit}, and {what} "
                f"{divide} not divide these; let {step.kind} have multiple_of: {size}"
            )


def _storage_dtype(recipe: Recipe, source: ModelSource) -> torch.dtype:
    if recipe.dtype != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.dtype]
    return source.dtype if source.dtype in (torch.float16, torch.bfloat16) else torch.float16
