"""Steps that factor: low rank alone, pivoted, and as a correction of what other steps took away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from lmpress.forms import Form, LowRank, Sum
from lmpress.methods.asvd import AsvdOptions, asvd
from lmpress.methods.low_rank_correction import CorrectionOptions, low_rank_correction
from lmpress.methods.pivoting import PivotOptions, pivot
from lmpress.methods.result import Rewritten
from lmpress.methods.svd import SvdOptions, svd
from lmpress.methods.svd_llm import SvdLlmOptions, factor_cost, row_weights, svd_llm
from lmpress.recipes.outline import Leaf, Outline, factors
from lmpress.recipes.steps.base import (
    FormStep,
    LeafContext,
    LeafStep,
    Positive,
    Ratio,
    Share,
    Step,
    forms_before,
)
from lmpress.statistics import InputStatistics


class Svd(LeafStep):
    """Low-rank factors.

    Attributes:
        method: `svd`, truncated SVD as in SPQ (arXiv 2602.18420), whitened as in SVD-LLM (2403.07378);
            `asvd` (2312.05821), in inputs scaled by their mean magnitude; `svd_llm`, the whitened
            truncation of SVD-LLM at the rank of `ratio`, whatever it costs.
        allocation: of svd_llm: `uniform` gives every module the same share of its parameters, `error` the
            same relative error of its outputs (PGSVD, arXiv 2510.05544), `sensitivity` what the model's loss
            asks for; `ratio` is then the share that all modules together keep.
        update: of svd_llm: how far the left factor is moved towards the outputs of the dense model, 0 to 1.
        alpha: of asvd: the power of E|x|.
    """

    kind: ClassVar[str] = "svd"
    leaves_factors: ClassVar[bool] = True
    takes_floats: ClassVar[bool] = True
    targets: str = "attention"
    method: Literal["svd", "asvd", "svd_llm"] = "svd"
    keep_variance: Share | None = None
    ratio: Share | None = None
    max_error: Ratio | None = None
    whiten: bool = SvdOptions.whiten
    multiple_of: Positive = SvdOptions.multiple_of
    rule: Literal["exact", "paper"] = "exact"
    allocation: Literal["uniform", "error", "sensitivity"] = "uniform"
    update: Ratio = SvdLlmOptions.update
    alpha: Ratio = AsvdOptions.alpha

    @model_validator(mode="after")
    def _one_criterion(self) -> Svd:
        given = [k for k in ("keep_variance", "ratio", "max_error") if getattr(self, k) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"exactly one of keep_variance, ratio and max_error sets the rank; {told}")
        if self.method != "svd":
            if self.ratio is None:
                raise ValueError(f"method: {self.method} takes its rank from `ratio`")
            if self.rule != "exact" or not self.whiten:
                raise ValueError("`rule` and `whiten` are for method: svd")
        if self.method != "svd_llm" and (self.allocation != "uniform" or self.update):
            raise ValueError("`allocation` and `update` are for method: svd_llm")
        return self

    @property
    def blocks_only(self) -> bool:
        return True

    @property
    def budget(self) -> str | None:
        return None if self.allocation == "uniform" else "ranks"

    @property
    def needs_original(self) -> bool:
        return self.update > 0

    @property
    def needs_hessian(self) -> bool:
        return self.method != "asvd" and (self.whiten or self.max_error is not None)

    @property
    def needs_statistics(self) -> bool:
        return self.needs_hessian or self.method == "asvd"

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        other = forms_before([s for s in earlier if s.kind != self.kind])
        return f"svd comes before {other} of the same modules" if other else None

    def after(self, outline: Outline) -> Outline:
        m, n = outline.shape
        if self.ratio is None:
            return replace(outline, leaves=(Leaf(m, n),), exact=False)
        rank = int(self.ratio * m * n / (m + n)) // self.multiple_of * self.multiple_of
        rank = min(max(rank, 1), m, n)
        if self.method == "svd" and rank * (m + n) >= m * n:
            return replace(outline, leaves=(Leaf(m, n),))
        exact = outline.exact and self.budget is None  # else the text decides who gets which rank
        return replace(outline, leaves=tuple(factors(outline.shape, rank)), exact=exact)

    def uneven_ranks(self, size: int) -> tuple[str, str] | None:
        if self.multiple_of % size == 0:
            return None
        return f"multiples of {self.multiple_of}", f"let svd have multiple_of: {size}"

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        weight = leaf.plain
        if weight is None:
            raise ValueError(f"svd factors dense weights, and this one is {leaf.formula}; put svd earlier")
        if self.method != "svd":
            return self._other(leaf, weight, statistics, context)
        return svd(weight, statistics, self.told(SvdOptions, paper=self.rule == "paper"))

    def _other(
        self, leaf: Form, weight: Tensor, statistics: InputStatistics | None, context: LeafContext
    ) -> Rewritten:
        assert self.ratio is not None
        if statistics is None:
            raise ValueError(f"svd by method: {self.method} needs calibration text")
        if self.method == "asvd":
            return asvd(weight, statistics, self.told(AsvdOptions))
        rank = None if context.share is None else self._paying(int(context.share), leaf.shape, context)
        if rank == 0:
            return Rewritten(leaf, {"rank": None, "reason": "the budget leaves this weight dense"})
        options = self.told(SvdLlmOptions, rank=rank)
        weights = context.sensitivity if self.allocation == "sensitivity" else None
        rows = None if weights is None else row_weights(weights)
        cross = context.cross if self.needs_original else None
        return svd_llm(weight, statistics, options, cross, rows)

    @staticmethod
    def _paying(rank: int, shape: tuple[int, int], context: LeafContext) -> int:
        """The rank, or 0 where factors take more than the weight, which may have lost neurons since."""
        saves = factor_cost(shape, rank, "pivot" in context.later) < shape[0] * shape[1]
        return rank if saves else 0


class Pivot(FormStep):
    """Factors as pivoted ones: the same matrix in r (m + n) - r^2 numbers (PIFA, arXiv 2501.19090).

    Attributes:
        largest_coefficient: rows are swapped until no coefficient is above this.
        largest_bits_lost: factors whose basis would lose more bits than this when it is quantized stay as
            they are; None to pivot them all the same.
    """

    kind: ClassVar[str] = "pivot"
    needs_another: ClassVar[bool] = True
    takes_updates: ClassVar[bool] = False
    largest_coefficient: Annotated[float, Field(gt=1)] = PivotOptions.largest_coefficient
    largest_bits_lost: Annotated[float, Field(ge=0)] | None = 2.0

    @property
    def blocks_only(self) -> bool:
        return True

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        if not any(s.leaves_factors for s in earlier):
            return (
                "pivot turns the factors of svd into pivoted ones: put an svd of the same modules before it"
            )
        if any(isinstance(s, FormStep) and not s.leaves_factors and not s.leaves_codes for s in earlier):
            return "pivot comes right after svd or sparse_low_rank of the same modules"
        quantizer = next((s.kind for s in earlier if s.quantizes_factors), None)
        return f"pivot comes before the factors are quantized by {quantizer}" if quantizer else None

    def after(self, outline: Outline) -> Outline:
        return replace(outline, exact=False)  # fewer numbers, or as many where pivoting is not safe

    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if len(form.addends) > 1:
            parts = [self.rewrite(term, statistics, context) for term in form.addends]
            return Rewritten(Sum(tuple(p.form for p in parts)), {"terms": [p.report for p in parts]})
        if not isinstance(form, LowRank):
            return Rewritten(form, {"reason": f"no factors: this is {form.formula}"})
        if form.left.plain is None or form.right.plain is None:
            raise ValueError(f"pivot takes dense factors, and this is {form.formula}; put pivot earlier")
        result = pivot(form, self.told(PivotOptions))
        lost = result.report.get("bits_lost", 0.0)
        if self.largest_bits_lost is not None and lost > self.largest_bits_lost:
            reason = f"quantized, the basis would lose {lost:.1f} bits"
            return Rewritten(form, result.report | {"reason": reason})
        return result


class Correct(FormStep):
    """A low-rank term for the error of whatever the module is by now (LQER 2402.02446, EoRA 2410.21271).

    Attributes:
        rank: of the term.
        metric: `hessian` (the error of the outputs), `diagonal` (inputs by their size alone), or `none`.
        damping: of the Hessian, relative to each entry of its diagonal.
        bits: of the factors; None to store them in floating point.
        granularity: of quantized factors.
    """

    kind: ClassVar[str] = "correct"
    needs_another: ClassVar[bool] = True
    rank: Positive = CorrectionOptions.rank
    metric: Literal["hessian", "diagonal", "none"] = CorrectionOptions.metric
    damping: Ratio = CorrectionOptions.damping
    bits: Annotated[int, Field(ge=2, le=8)] | None = CorrectionOptions.bits
    granularity: Literal["tensor", "channel"] = CorrectionOptions.granularity

    @model_validator(mode="after")
    def _options_fit(self) -> Correct:
        self.options()
        return self

    @property
    def blocks_only(self) -> bool:
        return True

    @property
    def needs_hessian(self) -> bool:
        return self.metric == "hessian"

    @property
    def needs_statistics(self) -> bool:
        return self.metric != "none"

    def options(self) -> CorrectionOptions:
        """What the method is told."""
        return self.told(CorrectionOptions)

    @property
    def has_bits(self) -> bool:
        return self.bits is not None

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        if forms_before(earlier):
            return None
        return "correct makes up for what earlier steps took away, and there is none for these modules"

    def after(self, outline: Outline) -> Outline:
        more = factors(outline.shape, self.rank, self.bits, self.granularity)
        return replace(outline, leaves=(*outline.leaves, *more))

    def uneven_ranks(self, size: int) -> tuple[str, str] | None:
        if self.rank % size == 0:
            return None
        return str(self.rank), f"let correct have a rank of whole groups: {size}"

    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if context.weight is None:
            raise ValueError("correct needs the dense weight that the module began with")
        return low_rank_correction(context.weight, form, statistics, self.options())
