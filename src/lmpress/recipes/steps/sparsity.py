"""Steps that make weights sparse: alone, jointly with quantization, or beside a low-rank term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from lmpress.forms import Form
from lmpress.methods.alps import AlpsOptions, alps
from lmpress.methods.low_rank_correction import CorrectionOptions
from lmpress.methods.patterns import check_grid_fits, parse_pattern
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import parse_granularity
from lmpress.methods.sparsegpt import SparseGptOptions, sparsegpt
from lmpress.methods.sslc import SPLITS, SslcOptions, split_budget, sslc
from lmpress.methods.svd_llm import row_weights
from lmpress.methods.wanda import WandaOptions, wanda
from lmpress.recipes.outline import Leaf, Outline, factors
from lmpress.recipes.steps.base import (
    LeafContext,
    LeafStep,
    Positive,
    Ratio,
    Step,
    forms_before,
    group_of,
)
from lmpress.statistics import InputStatistics

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
Bits = Annotated[int, Field(ge=2, le=8)]


class _Sparse(LeafStep):
    """What the steps of this file share: how much is removed, in which pattern, on which grid.

    Attributes:
        sparsity: the share that is removed; not for an n:m pattern, which has its own.
        pattern: `unstructured`, or `n:m` with n kept of every m neighbours in a row.
        bits: of the survivors; None to leave them in floating point.
        granularity: of their grid over the whole matrix.
        symmetric: no zero points.
        clip: search the range of every scale for the least squared error.
        allocation: `uniform` takes the same share from every module. `sensitivity` takes `sparsity` from all
            modules together, those entries that the model's loss misses least; outputs count by how
            sensitive the model is to them.
        asymmetry: how far to move towards the outputs of the dense model, 0 to 1 (GPTAQ, arXiv 2504.02692).
            Calibration takes twice as long.
    """

    leaves_pattern: ClassVar[bool] = True
    takes_updates: ClassVar[bool] = False
    sparsity: Sparsity | None = None
    pattern: str = SparseGptOptions.pattern
    bits: Bits | None = SparseGptOptions.bits
    granularity: str = SparseGptOptions.granularity
    symmetric: bool = SparseGptOptions.symmetric
    clip: bool = SparseGptOptions.clip
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    asymmetry: Ratio = SparseGptOptions.asymmetry

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_is_text(cls, value: object) -> object:
        if isinstance(value, int):  # YAML reads 2:4 as 2 * 60 + 4
            raise ValueError('a pattern is text: write it in quotes, such as "2:4"')
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_is_known(cls, value: str) -> str:
        parse_pattern(value)
        return value

    @field_validator("granularity")
    @classmethod
    def _granularity_is_known(cls, value: str) -> str:
        parse_granularity(value)
        return value

    @model_validator(mode="after")
    def _one_share(self) -> _Sparse:
        if self.group is None and self.sparsity is None:
            raise ValueError("the share to remove is given as `sparsity`, or a pattern such as '2:4'")
        if self.group is not None and self.sparsity is not None:
            raise ValueError(f"pattern {self.pattern} says how much is removed; leave `sparsity` out")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m) of the pattern, None where it is unstructured."""
        return parse_pattern(self.pattern)

    @property
    def blocks_only(self) -> bool:
        return True

    @property
    def budget(self) -> str | None:
        return None if self.allocation == "uniform" else "density"

    @property
    def has_bits(self) -> bool:
        return self.bits is not None

    @property
    def needs_original(self) -> bool:
        return self.asymmetry > 0

    @property
    def column_groups(self) -> dict[str, int]:
        groups = {} if self.bits is None else group_of(self.granularity)
        return groups if self.group is None else groups | {f"the pattern {self.pattern}": self.group[1]}

    @property
    def needs_statistics(self) -> bool:
        return True

    @property
    def share(self) -> float:
        """`sparsity`, or a number that plays no part beside an n:m pattern."""
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def damped(self) -> float:
        """The damping of the Hessian."""
        raise NotImplementedError

    def removed(self, context: LeafContext) -> float:
        """The share that one module loses."""
        return self.share if context.share is None else 1 - context.share

    def guides(self, context: LeafContext) -> tuple[Tensor | None, Tensor | None]:
        """What the solvers are told of other modules: the cross matrix, and what each output counts."""
        rows = None
        if self.budget is not None and context.sensitivity is not None:
            rows = row_weights(context.sensitivity)
        return context.cross if self.needs_original else None, rows


class Sparsify(_Sparse):
    """Pruning of single weights: SparseGPT (arXiv 2301.00774), Wanda (2306.11695), ALPS (2406.07831).

    Attributes:
        bits: with `method: sparsegpt`: quantize in the same pass (arXiv 2505.07289).
        case: what is quantized: `survivors` alone (B), stored with their pattern, or `all` (A): zeros are
            codes like any other, and no pattern is stored.
        damping: of the Hessian; None for what suits the method (0.01 for sparsegpt, 0.1 for alps).
        sweeps: of sparsegpt: passes of coordinate descent afterwards.
    """

    kind: ClassVar[str] = "sparsify"
    method: Literal["sparsegpt", "wanda", "magnitude", "alps"] = "sparsegpt"
    case: Literal["survivors", "all"] = "survivors"
    damping: Ratio | None = None
    sweeps: Annotated[int, Field(ge=0, le=100)] = 0

    @model_validator(mode="after")
    def _options_fit(self) -> Sparsify:
        if self.method != "sparsegpt" and self.bits is not None:
            raise ValueError(
                f"only sparsegpt quantizes in the same pass; after {self.method}, let a step "
                "`quantize` with `solver: gptq` follow"
            )
        if self.case == "all" and self.bits is None:
            raise ValueError("case: all is of quantization in the same pass: give it `bits`")
        if not self.needs_hessian and (self.budget is not None or self.asymmetry):
            raise ValueError(
                f"`allocation` and `asymmetry` are for sparsegpt and alps, not for {self.method}"
            )
        if self.budget is not None and self.group is not None:
            raise ValueError(
                f"pattern {self.pattern} takes the same from every row: there is no budget to share"
            )
        self.options()
        return self

    @property
    def needs_hessian(self) -> bool:
        return self.method in ("sparsegpt", "alps")

    @property
    def needs_statistics(self) -> bool:
        return self.method != "magnitude"

    @property
    def damped(self) -> float:
        return (0.01 if self.method == "sparsegpt" else 0.1) if self.damping is None else self.damping

    def options(self, share: float | None = None) -> SparseGptOptions:
        """What SparseGPT is told; `share` is removed, None for what the step says."""
        share = self.share if share is None else share
        return self.told(SparseGptOptions, sparsity=share, damping=self.damped)

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        if any(s.kind == self.kind for s in earlier):
            return "modules are made sparse once"
        other = forms_before([s for s in earlier if s.leaves_pattern or not s.leaves_factors])
        return f"sparsify comes before {other} of the same modules" if other else None

    def after(self, outline: Outline) -> Outline:
        exact = outline.exact and self.budget is None
        return replace(outline, leaves=tuple(self._sparse(leaf) for leaf in outline.leaves), exact=exact)

    def _sparse(self, leaf: Leaf) -> Leaf:
        grid = replace(leaf, bits=self.bits, granularity=self.granularity, symmetric=self.symmetric)
        if self.case == "all":
            return grid
        m, n = leaf.rows, leaf.columns
        if self.group is not None:
            kept = m * n // self.group[1] * self.group[0]
            return replace(grid, kept=kept, even=True, pattern=self.group)
        density = 1 - self.share
        if self.method == "wanda":
            return replace(grid, kept=round(density * n) * m, even=True)
        if self.method == "sparsegpt":  # a budget for each block of columns
            block = SparseGptOptions.block
            widths = [min(block, n - start) for start in range(0, n, block)]
            return replace(grid, kept=sum(round(density * width * m) for width in widths))
        return replace(grid, kept=round(density * m * n))

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        weight = leaf.plain
        if weight is None:
            raise ValueError(f"sparsify takes dense weights, and this one is {leaf.formula}; put it earlier")
        if self.method in ("wanda", "magnitude"):
            per_row = self.method == "wanda"  # magnitude compares over the whole matrix
            return wanda(weight, statistics, WandaOptions(self.share, self.pattern, self.method, per_row))
        if statistics is None:
            raise ValueError(f"sparsify by method: {self.method} needs calibration text")
        share = self.removed(context)
        if self.method == "alps":
            options = self.told(AlpsOptions, sparsity=share, damping=self.damped)
            return alps(weight, statistics, options, *self.guides(context))
        return sparsegpt(weight, statistics, self.options(share), *self.guides(context))


class SparseLowRank(_Sparse):
    """A weight as sparse + low-rank, solved for together: SSLC (arXiv 2510.26446).

    Attributes:
        sparsity: the share of the parameters that is removed, the two terms together.
        kappa: the share of the kept parameters that goes to the low-rank term; None to search, module by
            module. With an n:m pattern the low-rank term comes on top.
        metric: `hessian` (every correlation of the inputs) or `diagonal` (as in the paper).
        iterations: rounds at most.
        protect: the share of the weights, the most salient ones, that always stay in the sparse term.
        damping: of the metric, relative to each entry of its diagonal.
        bits: of the survivors, jointly compensated.
        factor_bits: of the low-rank factors, whose error the survivors make up for.
    """

    kind: ClassVar[str] = "sparse_low_rank"
    leaves_factors: ClassVar[bool] = True
    kappa: Ratio | None = SslcOptions.kappa
    metric: Literal["hessian", "diagonal"] = SslcOptions.metric
    iterations: Positive = SslcOptions.iterations
    protect: Sparsity = SslcOptions.protect
    damping: Ratio = SslcOptions.damping
    factor_bits: Bits | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> SparseLowRank:
        self.options()
        if self.bits is not None:
            check_grid_fits(self.symmetric, self.granularity == "tensor", self.group)
        return self

    @property
    def needs_hessian(self) -> bool:
        quantized = self.bits is not None or self.factor_bits is not None
        return self.metric == "hessian" or quantized or self.budget is not None or self.needs_original

    @property
    def damped(self) -> float:
        return self.damping

    def options(self, seed: int = 0, share: float | None = None) -> SslcOptions:
        """What the method is told; `share` is removed, None for what the step says."""
        survivors = factored = None
        if self.bits is not None:
            survivors = self.told(
                SparseGptOptions,
                sparsity=SparseGptOptions.sparsity,
                asymmetry=0.0,
                per_channel_damping=True,
                sweeps=1,
            )
        if self.factor_bits is not None:
            factored = CorrectionOptions(bits=self.factor_bits)
        share = self.share if share is None else share
        return self.told(SslcOptions, sparsity=share, seed=seed, survivors=survivors, factors=factored)

    @property
    def has_bits(self) -> bool:
        return self.bits is not None or self.quantizes_factors

    @property
    def quantizes_factors(self) -> bool:
        return self.factor_bits is not None

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        before = forms_before(earlier)
        return f"sparse_low_rank comes before {before} of the same modules" if before else None

    def after(self, outline: Outline) -> Outline:
        exact = outline.exact and (self.budget is None or self.group is not None)
        if self.kappa is not None:
            return replace(outline, leaves=self._split(outline.shape, self.kappa), exact=exact)
        splits = [replace(outline, leaves=self._split(outline.shape, kappa), exact=False) for kappa in SPLITS]
        return max(splits, key=lambda split: split.bytes)

    def _split(self, shape: tuple[int, int], kappa: float) -> tuple[Leaf, ...]:
        (m, n), leaves = shape, []
        rank, density = split_budget(shape, self.share, kappa, self.group)
        if density:
            per_row = self.metric == "diagonal" or self.group is not None
            kept = round(density * n) * m if per_row else round(density * m * n)
            grid = self.bits, self.granularity, self.symmetric
            leaves.append(Leaf(m, n, kept, per_row, self.group, *grid))
        return (*leaves, *(factors(shape, rank, self.factor_bits) if rank else []))

    def uneven_ranks(self, size: int) -> tuple[str, str] | None:
        return "whatever the budget leaves", "take granularity: channel, or the bits of sparse_low_rank"

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        weight = leaf.plain
        if weight is None:
            raise ValueError(
                f"sparse_low_rank takes dense weights, and this one is {leaf.formula}; put it earlier"
            )
        if statistics is None:
            raise ValueError("sparse_low_rank needs calibration text")
        options = self.options(context.seed, self.removed(context))
        return sslc(weight, statistics, options, *self.guides(context))
