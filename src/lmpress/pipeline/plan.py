"""Recipe + config -> plan: which step touches which module, with which options; and the bytes to expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from lmpress.errors import RequestError
from lmpress.families import Layout
from lmpress.methods.granularity import hybrid_granularities
from lmpress.pipeline.prediction import ModulePlan, predict
from lmpress.pipeline.source import ModelSource
from lmpress.recipes import (
    Correct,
    EntropyQuantize,
    FormStep,
    PruneNeurons,
    Quantize,
    Recipe,
    Recover,
    SparseLowRank,
    Step,
    Svd,
)
from lmpress.recipes.order import conflict
from lmpress.recipes.steps import GROUPS, options_of


@dataclass(frozen=True)
class Plan:
    """A recipe, resolved for one model.

    Attributes:
        modules: by full name, linears of the blocks as well as the embedding and an untied head.
        outer: the names of the embedding and of a head of its own.
        neurons: index of the step that prunes neurons, or None.
        predicted: `bytes` of the weights after compression; whether that is `exact`, or an estimate.
        trained: the modules that get an adapter in recovery.
    """

    model: str
    recipe: Recipe
    dtype: torch.dtype
    modules: dict[str, ModulePlan]
    outer: tuple[str, ...]
    neurons: int | None
    predicted: dict[str, Any]
    trained: tuple[str, ...] = ()

    @property
    def needs_text(self) -> bool:
        """Whether any step looks at calibration text (recovery aside)."""
        return self.weighs_tokens or any(step.needs_statistics for step in self.recipe.steps)

    @property
    def weighs_tokens(self) -> bool:
        """Whether a step of the embedding or the head asks how probable tokens are."""
        steps = (index for name in self.outer for index in self.modules[name].steps)
        return any(self.recipe.steps[index].weighs_tokens for index in steps)

    @property
    def weighs_positions(self) -> bool:
        """Whether the moments that a step of the blocks asks for are weighted by position."""
        wanted = self.recipe.calibration.weighting == "positions"
        inner = {i for name, m in self.modules.items() if name not in self.outer for i in m.steps}
        if self.neurons is not None:
            inner.add(self.neurons)
        return wanted and any(self.recipe.steps[index].needs_statistics for index in inner)

    @property
    def needs_original(self) -> bool:
        """Whether the dense model has to be run beside the compressed one."""
        inner = (module for name, module in self.modules.items() if name not in self.outer)
        return any(self.recipe.steps[index].needs_original for module in inner for index in module.steps)

    @property
    def budgets(self) -> dict[int, tuple[str, ...]]:
        """The modules that share a budget of bits, by the index of the step that gives it out."""
        shared: dict[int, tuple[str, ...]] = {}
        for index, step in enumerate(self.recipe.steps):
            names = (name for name, m in self.modules.items() if index in m.steps and name not in self.outer)
            if step.shares_budget and (own := tuple(names)):
                shared[index] = own
        return shared

    @property
    def recovers(self) -> bool:
        """Whether the compressed model is trained at the end."""
        return bool(self.trained)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        return {
            "model": self.model,
            "recipe": self.recipe.resolved(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "modules": {
                name: {
                    "shape": list(m.shape),
                    "steps": [self._entry(i, m) for i in m.steps],
                }
                for name, m in self.modules.items()
                if m.steps
            },
            "neurons": None if self.neurons is None else options_of(self.recipe.steps[self.neurons]),
            "trained": list(self.trained),
            "predicted": self.predicted,
        }

    def _entry(self, index: int, module: ModulePlan) -> dict[str, Any]:
        step = self.recipe.steps[index]
        if index in module.granularity:
            return {step.kind: {"granularity": module.granularity[index]}}
        return {step.kind: {}}


def make_plan(recipe: Recipe, source: ModelSource) -> Plan:
    """Resolve `recipe` for the model of `source`; nothing but its config and headers is looked at.

    Raises:
        RequestError: targets that match no module; a step that cannot follow an earlier one of the same
            module; groups that do not divide a module's inputs.
    """
    layout = source.layout
    shapes = _shapes(source)
    modules = {name: ModulePlan(shape) for name, shape in shapes.items()}
    neurons: int | None = None
    trained: tuple[str, ...] = ()
    for index, step in enumerate(recipe.steps):
        if isinstance(step, PruneNeurons):
            neurons = index
        if not isinstance(step, FormStep | Recover):
            continue
        names = _targets(step.targets, layout, tuple(shapes))
        if not names:
            raise RequestError(
                f"recipe {recipe.name}: step {index + 1} ({step.kind}) targets {step.targets!r}, which "
                f"matches no module; targets are {', '.join(GROUPS)}, or a glob such as '*.mlp.down_proj'"
            )
        if isinstance(step, Recover):  # rewrites no form of a block; recovery comes after all of them
            trained = tuple(names)
            for name in names:
                _check_order(recipe, index, name, modules[name], layout)
            continue
        chosen = _hybrid(step, {name: shapes[name] for name in names})
        for name in names:
            old = modules[name]
            granularity = old.granularity | ({index: chosen[name]} if name in chosen else {})
            modules[name] = ModulePlan(old.shape, (*old.steps, index), granularity)
            _check_order(recipe, index, name, old, layout)
            _check_groups(step, name, old, recipe, neurons is not None, layout)
    dtype = _storage_dtype(recipe, source)
    predicted = predict(recipe, source, modules, neurons, dtype)
    outer = tuple(name for name in (layout.embedding, layout.head) if name in modules)
    return Plan(source.name, recipe, dtype, modules, outer, neurons, predicted, trained)


def _shapes(source: ModelSource) -> dict[str, tuple[int, int]]:
    layout = source.layout
    names = [layout.embedding] + ([] if layout.tied else [layout.head])
    for i in range(layout.num_blocks):
        names += [f"{layout.block_name(i)}.{linear}" for linear in layout.linears]
    shapes = {}
    for name in names:
        weight = source.skeleton.get_submodule(name).weight
        shapes[name] = (int(weight.shape[0]), int(weight.shape[1]))
    return shapes


def _targets(targets: str, layout: Layout, names: tuple[str, ...]) -> list[str]:
    outer = {layout.embedding, layout.head}
    if targets == "embeddings":
        return [name for name in names if name in outer]
    groups: Mapping[str, tuple[str, ...]] = {
        "attention": layout.attention,
        "mlp": layout.mlp,
        "linears": layout.linears,
    }
    inner = [name for name in names if name not in outer]
    if targets in groups:
        ends = tuple("." + linear for linear in groups[targets])
        return [name for name in inner if name.endswith(ends)]
    return [name for name in names if fnmatchcase(name, targets)]


def _hybrid(step: Step, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    if not isinstance(step, Quantize) or not step.hybrid:
        return {}
    return hybrid_granularities(shapes, step.granularity, percentile=step.percentile, k=step.std_factor)


def _check_order(recipe: Recipe, index: int, name: str, module: ModulePlan, layout: Layout) -> None:
    """RequestError where a step cannot follow those that touch the same module before it."""
    step = recipe.steps[index]
    place = f"recipe {recipe.name}: step {index + 1} ({step.kind}) targets {step.targets!r}, and so {name}"
    if step.blocks_only and name in (layout.embedding, layout.head):
        raise RequestError(f"{place}; {step.kind} works on the linears of the blocks, not on embeddings")
    earlier = next((i for i in module.steps if isinstance(recipe.steps[i], Quantize | EntropyQuantize)), None)
    if earlier is not None and isinstance(step, Svd | Quantize | EntropyQuantize):
        raise RequestError(f"{place}, which step {earlier + 1} quantizes; let their targets not overlap")
    fault = conflict(step, [recipe.steps[i] for i in module.steps])
    if fault is not None:
        raise RequestError(f"{place}: {fault}")


def _check_groups(
    step: Step, name: str, module: ModulePlan, recipe: Recipe, pruned: bool, layout: Layout
) -> None:
    """Whether groups of neighbouring columns come out even, in every factor as well."""
    prune = next((s for s in recipe.steps if isinstance(s, PruneNeurons)), None)
    for what, size in step.column_groups.items():
        divide = "do" if what.startswith("groups") else "does"
        if module.shape[1] % size:
            way = "take a divisor, or granularity: channel" if divide == "do" else "take another pattern"
            raise RequestError(
                f"recipe {recipe.name}: {what} {divide} not divide the {module.shape[1]} inputs of {name}; "
                f"{way}"
            )
        for earlier in (recipe.steps[i] for i in module.steps):
            fault = _uneven_ranks(earlier, size)
            if fault is not None:
                ranks, way = fault
                raise RequestError(
                    f"recipe {recipe.name}: ranks are {ranks}, and {what} {divide} not divide these; {way}"
                )
        if (
            pruned
            and prune is not None
            and name.endswith("." + layout.neurons.output)
            and prune.multiple_of % size
        ):
            raise RequestError(
                f"recipe {recipe.name}: neurons are pruned to multiples of {prune.multiple_of}, and {what} "
                f"{divide} not divide these; let prune_neurons have multiple_of: {size}"
            )


def _uneven_ranks(step: Step, size: int) -> tuple[str, str] | None:
    """The ranks that a step gives and a way out, where groups of `size` do not divide them."""
    if isinstance(step, Svd) and step.multiple_of % size:
        return f"multiples of {step.multiple_of}", f"let svd have multiple_of: {size}"
    if isinstance(step, Correct) and step.rank % size:
        return str(step.rank), f"let correct have a rank of whole groups: {size}"
    if isinstance(step, SparseLowRank):
        return "whatever the budget leaves", "take granularity: channel, or the bits of sparse_low_rank"
    return None


def _storage_dtype(recipe: Recipe, source: ModelSource) -> torch.dtype:
    if recipe.dtype != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.dtype]
    return source.dtype if source.dtype in (torch.float16, torch.bfloat16) else torch.float16
