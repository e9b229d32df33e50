"""Recipe + config -> plan: which step touches which module, with which options; and the bytes to expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from lmpress.errors import RequestError
from lmpress.families import Layout
from lmpress.forms import packed_width
from lmpress.methods.granularity import hybrid_granularities
from lmpress.methods.neuron_pruning import aligned_width
from lmpress.methods.rtn import parse_granularity
from lmpress.pipeline.source import ModelSource
from lmpress.recipes import LeafStep, PruneNeurons, Quantize, Recipe, Recover, Svd
from lmpress.recipes.steps import GROUPS, options_of


@dataclass(frozen=True)
class ModulePlan:
    """What happens to one module.

    Attributes:
        shape: (out, in) of its dense weight.
        steps: indices into the recipe's steps, in order.
        granularity: by step index, where a hybrid was resolved.
    """

    shape: tuple[int, int]
    steps: tuple[int, ...] = ()
    granularity: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A recipe, resolved for one model.

    Attributes:
        modules: by full name, linears of the blocks as well as the embedding and an untied head.
        neurons: index of the step that prunes neurons, or None.
        predicted: `bytes` of the weights after compression; whether that is `exact`, or an estimate.
    """

    model: str
    recipe: Recipe
    dtype: torch.dtype
    modules: dict[str, ModulePlan]
    neurons: int | None
    predicted: dict[str, Any]

    @property
    def needs_text(self) -> bool:
        """Whether any step looks at calibration text (recovery aside)."""
        return any(step.needs_statistics for step in self.recipe.steps)

    @property
    def recovers(self) -> bool:
        """Whether the compressed model is trained at the end."""
        return any(isinstance(step, Recover) for step in self.recipe.steps)

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
        RequestError: targets that match no module; groups that do not divide a module's inputs.
    """
    layout = source.layout
    shapes = _shapes(source)
    modules = {name: ModulePlan(shape) for name, shape in shapes.items()}
    neurons = None
    for index, step in enumerate(recipe.steps):
        if isinstance(step, PruneNeurons):
            neurons = index
        if not isinstance(step, LeafStep):
            continue
        names = _targets(step.targets, layout, tuple(shapes))
        if not names:
            raise RequestError(
                f"recipe {recipe.name}: step {index + 1} ({step.kind}) targets {step.targets!r}, which "
                f"matches no module; targets are {', '.join(GROUPS)}, or a glob such as '*.mlp.down_proj'"
            )
        chosen = _hybrid(step, {name: shapes[name] for name in names})
        for name in names:
            old = modules[name]
            _check_sequence(index, name, old, recipe, layout)
            granularity = old.granularity | ({index: chosen[name]} if name in chosen else {})
            modules[name] = ModulePlan(old.shape, (*old.steps, index), granularity)
            if isinstance(step, Quantize) and not step.hybrid:
                _check_groups(step, name, old, recipe, neurons is not None, layout)
    dtype = _storage_dtype(recipe, source)
    return Plan(
        source.name, recipe, dtype, modules, neurons, _predict(recipe, source, modules, neurons, dtype)
    )


def _check_sequence(index: int, name: str, module: ModulePlan, recipe: Recipe, layout: Layout) -> None:
    """RequestError where a step cannot follow those that touch the same module before it."""
    step = recipe.steps[index]
    place = f"recipe {recipe.name}: step {index + 1} ({step.kind}) targets {step.targets!r}, and so {name}"
    if isinstance(step, Svd) and name in (layout.embedding, layout.head):
        raise RequestError(f"{place}; svd works on the linears of the blocks, not on embeddings")
    earlier = next((i for i in module.steps if isinstance(recipe.steps[i], Quantize)), None)
    if earlier is not None:
        raise RequestError(f"{place}, which step {earlier + 1} quantizes; let their targets not overlap")


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


def _hybrid(step: LeafStep, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    if not isinstance(step, Quantize) or not step.hybrid:
        return {}
    return hybrid_granularities(shapes, step.granularity, percentile=step.percentile, k=step.std_factor)


def _check_groups(
    step: Quantize, name: str, module: ModulePlan, recipe: Recipe, pruned: bool, layout: Layout
) -> None:
    kind, size = parse_granularity(step.granularity)
    if kind != "group" or size is None:
        return
    if module.shape[1] % size:
        raise RequestError(
            f"recipe {recipe.name}: groups of {size} do not divide the {module.shape[1]} inputs of {name}; "
            f"take a divisor, or granularity: channel"
        )
    for earlier in (recipe.steps[i] for i in module.steps):
        if isinstance(earlier, Svd) and earlier.multiple_of % size:
            raise RequestError(
                f"recipe {recipe.name}: ranks are multiples of {earlier.multiple_of}, and groups of {size} "
                f"do not divide these; let svd have multiple_of: {size}"
            )
    prune = next((s for s in recipe.steps if isinstance(s, PruneNeurons)), None)
    if (
        pruned
        and prune is not None
        and name.endswith("." + layout.neurons.output)
        and prune.multiple_of % size
    ):
        raise RequestError(
            f"recipe {recipe.name}: neurons are pruned to multiples of {prune.multiple_of}, and groups of "
            f"{size} do not divide these; let prune_neurons have multiple_of: {size}"
        )


def _storage_dtype(recipe: Recipe, source: ModelSource) -> torch.dtype:
    if recipe.dtype != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.dtype]
    return source.dtype if source.dtype in (torch.float16, torch.bfloat16) else torch.float16


def _predict(
    recipe: Recipe,
    source: ModelSource,
    modules: Mapping[str, ModulePlan],
    neurons: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Bytes of the weights, from shapes alone; an estimate, and not `exact`, where data decide."""
    layout = source.layout
    total, exact = 0, True
    for name, module in modules.items():
        shape = module.shape
        if neurons is not None and name not in (layout.embedding, layout.head):
            shape, sure = _pruned(shape, name, recipe.steps[neurons], layout)
            exact &= sure
        size, sure = _module_bytes(recipe, module, shape, dtype)
        total += size
        exact &= sure
    state = source.skeleton.state_dict(keep_vars=True)
    rest = [name for name in source.names if name.removesuffix(".weight") not in modules]
    for name in rest:  # vectors in the type of the source, tables such as learned positions in `dtype`
        kept = dtype if state[name].dim() > 1 else source.dtype
        total += state[name].numel() * kept.itemsize
    if any(isinstance(step, Recover) and step.keep == "term" for step in recipe.steps):
        exact = False
    return {"bytes": total, "exact": exact}


def _pruned(shape: tuple[int, int], name: str, step: Any, layout: Layout) -> tuple[tuple[int, int], bool]:
    rows = any(name.endswith("." + linear) for linear in layout.neurons.inputs)
    columns = name.endswith("." + layout.neurons.output)
    if step.allocation == "activation":
        return shape, not (rows or columns)
    if rows:
        return (aligned_width(shape[0], step.ratio, step.multiple_of), shape[1]), step.allocation == "uniform"
    if columns:
        return (shape[0], aligned_width(shape[1], step.ratio, step.multiple_of)), step.allocation == "uniform"
    return shape, True


def _module_bytes(
    recipe: Recipe, module: ModulePlan, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[int, bool]:
    leaves, exact = [shape], True
    quantize: Quantize | None = None
    granularity = "channel"
    for index in module.steps:
        step = recipe.steps[index]
        if isinstance(step, Svd):
            if step.ratio is not None:
                rank = int(step.ratio * shape[0] * shape[1] / (shape[0] + shape[1]))
                rank = min(max(rank // step.multiple_of * step.multiple_of, 1), min(shape))
                if rank * (shape[0] + shape[1]) < shape[0] * shape[1]:  # else it stays dense
                    leaves = [(shape[0], rank), (rank, shape[1])]
            exact &= step.ratio is not None
        if isinstance(step, Quantize):
            quantize = step
            granularity = module.granularity.get(index, step.granularity)
    if quantize is None:
        return sum(m * n for m, n in leaves) * dtype.itemsize, exact
    total = 0
    for m, n in leaves:
        scales = _scales(granularity, (m, n))
        total += m * packed_width(n, quantize.bits) + 2 * scales
        total += 0 if quantize.symmetric else packed_width(scales, quantize.bits)
    return total, exact


def _scales(granularity: str, shape: tuple[int, int]) -> int:
    kind, size = parse_granularity(granularity)
    if kind == "tensor":
        return 1
    return shape[0] * (shape[1] // size if size else 1)
