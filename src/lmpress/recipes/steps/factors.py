"""Steps that factor: low rank alone, pivoted, and as a correction of what other steps took away."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lmpress.forms import Dense, Form, LowRank, Sum
from lmpress.methods.asvd import AsvdOptions, asvd
from lmpress.methods.low_rank_correction import CorrectionOptions, low_rank_correction
from lmpress.methods.pivoting import PivotOptions, pivot
from lmpress.methods.result import Rewritten
from lmpress.methods.svd import SvdOptions, svd
from lmpress.methods.svd_llm import SvdLlmOptions, row_weights, svd_llm
from lmpress.recipes.steps.base import FormStep, LeafContext, LeafStep, Positive, Ratio, Share
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
    targets: str = "attention"
    method: Literal["svd", "asvd", "svd_llm"] = "svd"
    keep_variance: Share | None = None
    ratio: Share | None = None
    max_error: Ratio | None = None
    whiten: bool = True
    multiple_of: Positive = 1
    rule: Literal["exact", "paper"] = "exact"
    allocation: Literal["uniform", "error", "sensitivity"] = "uniform"
    update: Ratio = 0.0
    alpha: Ratio = 0.5

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
    def shares_budget(self) -> bool:
        return self.allocation != "uniform"

    @property
    def needs_original(self) -> bool:
        return self.update > 0

    @property
    def needs_hessian(self) -> bool:
        return self.method != "asvd" and (self.whiten or self.max_error is not None)

    @property
    def needs_statistics(self) -> bool:
        return self.needs_hessian or self.method == "asvd"

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if not isinstance(leaf, Dense):
            raise ValueError(f"svd factors dense weights, and this one is {leaf.formula}; put svd earlier")
        if self.method != "svd":
            return self._other(leaf, statistics, context)
        options = SvdOptions(
            keep_variance=self.keep_variance,
            ratio=self.ratio,
            max_error=self.max_error,
            whiten=self.whiten,
            multiple_of=self.multiple_of,
            paper=self.rule == "paper",
        )
        return svd(leaf.weight, statistics, options)

    def _other(self, leaf: Dense, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        assert self.ratio is not None
        if statistics is None:
            raise ValueError(f"svd by method: {self.method} needs calibration text")
        if self.method == "asvd":
            return asvd(leaf.weight, statistics, AsvdOptions(self.ratio, self.alpha, self.multiple_of))
        if context.rank == 0:
            return Rewritten(leaf, {"rank": None, "reason": "the budget leaves this weight dense"})
        options = SvdLlmOptions(self.ratio, context.rank, update=self.update, multiple_of=self.multiple_of)
        weights = context.sensitivity if self.allocation == "sensitivity" else None
        rows = None if weights is None else row_weights(weights)
        cross = context.cross if self.needs_original else None
        return svd_llm(leaf.weight, statistics, options, cross, rows)


class Pivot(FormStep):
    """Factors as pivoted ones: the same matrix in r (m + n) - r^2 numbers (PIFA, arXiv 2501.19090).

    Attributes:
        largest_coefficient: rows are swapped until no coefficient is above this.
        largest_bits_lost: factors whose basis would lose more bits than this when it is quantized stay as
            they are; None to pivot them all the same.
    """

    kind: ClassVar[str] = "pivot"
    largest_coefficient: Annotated[float, Field(gt=1)] = 1.1
    largest_bits_lost: Annotated[float, Field(ge=0)] | None = 2.0

    @property
    def blocks_only(self) -> bool:
        return True

    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if isinstance(form, Sum):
            parts = [self.rewrite(term, statistics, context) for term in form.terms]
            return Rewritten(Sum(tuple(p.form for p in parts)), {"terms": [p.report for p in parts]})
        if not isinstance(form, LowRank):
            return Rewritten(form, {"reason": f"no factors: this is {form.formula}"})
        if not (isinstance(form.left, Dense) and isinstance(form.right, Dense)):
            raise ValueError(f"pivot takes dense factors, and this is {form.formula}; put pivot earlier")
        result = pivot(form, PivotOptions(largest_coefficient=self.largest_coefficient))
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
    rank: Positive = 32
    metric: Literal["hessian", "diagonal", "none"] = "hessian"
    damping: Ratio = 0.01
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    granularity: Literal["tensor", "channel"] = "channel"

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
        return CorrectionOptions(self.rank, self.metric, self.damping, self.bits, self.granularity)

    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if context.weight is None:
            raise ValueError("correct needs the dense weight that the module began with")
        return low_rank_correction(context.weight, form, statistics, self.options())
