"""The bytes to expect, from shapes alone; an estimate, and not `exact`, where data decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from lmpress.families import Layout
from lmpress.forms import packed_width
from lmpress.forms.pattern import index_bits
from lmpress.methods.neuron_pruning import aligned_width
from lmpress.methods.rtn import parse_granularity
from lmpress.methods.sslc import SPLITS, split_budget
from lmpress.pipeline.source import ModelSource
from lmpress.recipes import (
    Correct,
    EntropyQuantize,
    Pivot,
    Quantize,
    Recipe,
    Recover,
    SparseLowRank,
    Sparsify,
    Step,
    Svd,
)


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
class Leaf:
    """One matrix (out, in) of a form, as it is stored.

    Attributes:
        kept: values that are stored; None for all of them.
        even: whether every row keeps as many.
        pattern: (n, m), or None for a bitmap, where `kept` is given.
        bits: of a code; None for floating point. A share of a bit is a mean, scales and all included.
        granularity: of the grid.
        symmetric: no zero points.
        coded: `bits` is what all together takes a weight.
        scale_bytes: of a scale.
    """

    rows: int
    columns: int
    kept: int | None = None
    even: bool = False
    pattern: tuple[int, int] | None = None
    bits: int | float | None = None
    granularity: str = "channel"
    symmetric: bool = True
    coded: bool = False
    scale_bytes: int = 2

    def bytes(self, itemsize: int) -> int:
        """What it takes, with `itemsize` bytes a floating-point weight."""
        rows, columns = self.rows, self.columns
        mask = 0
        if self.kept is not None:
            planes, cells = (1, columns) if self.pattern is None else _planes(self.pattern, columns)
            mask = rows * planes * -(-cells // 8)
            rows, columns = (rows, self.kept // max(1, rows)) if self.even else (1, self.kept)
        if self.bits is None:
            return mask + rows * columns * itemsize
        if self.coded:
            return mask + round(rows * columns * self.bits / 8)
        kind, size = parse_granularity(self.granularity)
        scales = 1 if kind == "tensor" else self.rows * (self.columns // size if size else 1)
        bits = int(self.bits)
        zeros = 0 if self.symmetric else packed_width(scales, bits)
        beside = 2 if self.kept is not None and kind != "tensor" and not self._plain(size) else 0
        return mask + rows * packed_width(columns, bits) + self.scale_bytes * scales + zeros + beside

    def _plain(self, size: int | None) -> bool:
        """Whether the scales of a sparse matrix are those of its values, with no scale of one beside them."""
        return self.even and (size is None or self.pattern is not None)


def _planes(pattern: tuple[int, int], columns: int) -> tuple[int, int]:
    n, m = pattern
    return index_bits(n, m), columns // m


def predict(
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
    leaves, exact = [Leaf(*shape)], True
    for index in module.steps:
        step = recipe.steps[index]
        leaves, sure = _after(step, leaves, shape, module.granularity.get(index), dtype.itemsize)
        exact &= sure
    return sum(leaf.bytes(dtype.itemsize) for leaf in leaves), exact


def _after(
    step: Step, leaves: list[Leaf], shape: tuple[int, int], granularity: str | None, itemsize: int
) -> tuple[list[Leaf], bool]:
    """The leaves that a step leaves, and whether it is sure that there are no fewer."""
    if isinstance(step, Svd):
        return _factored(step, shape)
    if isinstance(step, Pivot):
        return leaves, False  # fewer numbers, or as many where pivoting is not safe
    if isinstance(step, Sparsify):
        return [_sparse(step, leaf) for leaf in leaves], not step.shares_budget
    if isinstance(step, SparseLowRank):
        if step.kappa is not None:
            return _split(step, shape, step.kappa), not step.shares_budget or step.group is not None
        splits = [_split(step, shape, kappa) for kappa in SPLITS]
        return max(splits, key=lambda split: sum(leaf.bytes(itemsize) for leaf in split)), False
    if isinstance(step, Correct):
        return leaves + _factors(shape, step.rank, step.bits, step.granularity), True
    if isinstance(step, EntropyQuantize) or step.shares_budget:
        bits = cast(EntropyQuantize | Quantize, step).bits
        return [replace(f, bits=bits, coded=True) for f in leaves], False
    if isinstance(step, Quantize):
        grid, bits = granularity or step.granularity, step.uniform_bits
        return [replace(f, bits=bits, granularity=grid, symmetric=step.symmetric) for f in leaves], True
    return leaves, True


def _factored(step: Svd, shape: tuple[int, int]) -> tuple[list[Leaf], bool]:
    m, n = shape
    if step.ratio is None:
        return [Leaf(m, n)], False
    rank = int(step.ratio * m * n / (m + n)) // step.multiple_of * step.multiple_of
    rank = min(max(rank, 1), m, n)
    if step.method == "svd" and rank * (m + n) >= m * n:
        return [Leaf(m, n)], True
    return _factors(shape, rank), not step.shares_budget  # else the text decides who gets which rank


def _factors(
    shape: tuple[int, int], rank: int, bits: int | None = None, granularity: str = "channel"
) -> list[Leaf]:
    (m, n), rank = shape, min(rank, *shape)
    return [Leaf(a, b, bits=bits, granularity=granularity) for a, b in ((m, rank), (rank, n))]


def _sparse(step: Sparsify, leaf: Leaf) -> Leaf:
    grid = replace(leaf, bits=step.bits, granularity=step.granularity, symmetric=step.symmetric)
    if step.case == "all":
        return grid
    m, n = leaf.rows, leaf.columns
    if step.group is not None:
        kept = m * n // step.group[1] * step.group[0]
        return replace(grid, kept=kept, even=True, pattern=step.group)
    density = 1 - step.share
    if step.method == "wanda":
        return replace(grid, kept=round(density * n) * m, even=True)
    if step.method == "sparsegpt":  # a budget for each block of columns
        block = step.options().block
        widths = [min(block, n - start) for start in range(0, n, block)]
        return replace(grid, kept=sum(round(density * width * m) for width in widths))
    return replace(grid, kept=round(density * m * n))


def _split(step: SparseLowRank, shape: tuple[int, int], kappa: float) -> list[Leaf]:
    (m, n), leaves = shape, []
    rank, density = split_budget(shape, step.share, kappa, step.group)
    if density:
        per_row = step.metric == "diagonal" or step.group is not None
        kept = round(density * n) * m if per_row else round(density * m * n)
        leaves.append(Leaf(m, n, kept, per_row, step.group, step.bits, step.granularity, step.symmetric))
    return leaves + (_factors(shape, rank, step.factor_bits) if rank else [])
