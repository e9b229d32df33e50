"""The steps of a recipe: what each may be told, what it needs to know, and the method that it calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Sum
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import RoundOptions, parse_granularity, round_to_nearest
from lmpress.methods.svd import SvdOptions, svd
from lmpress.statistics import InputStatistics

HYBRIDS = ("percentile", "name", "meanstd")
"""Granularities that choose tensor or channel for each module (SPQ, arXiv 2602.18420)."""

GROUPS = ("attention", "mlp", "linears", "embeddings")
"""The targets that are no glob."""

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A frozen model that knows its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Step(Strict):
    """One entry of a recipe."""

    kind: ClassVar[str]
    targets: str = "linears"

    @property
    def needs_hessian(self) -> bool:
        """Whether the full second-moment matrix of the input has to be gathered."""
        return False

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration has to be run for this step at all."""
        return self.needs_hessian

    @field_validator("targets")
    @classmethod
    def _targets_are_named(cls, value: str) -> str:
        if not value:
            raise ValueError(f"targets is one of {', '.join(GROUPS)}, or a glob on module names")
        return value


class LeafStep(Step, ABC):
    """A step that rewrites every leaf of a weight's form by itself."""

    @abstractmethod
    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        """The new form of one leaf, whose input has these statistics."""

    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        """The new form of a whole expression: statistics follow the rewriting.

        In LowRank(left, right) the input of `left` is right(x), so `left` is rewritten against the
        statistics of what `right` has just become.
        """
        if isinstance(form, LowRank):
            right = self.rewrite(form.right, statistics, context)
            inner = None if statistics is None else statistics.through(right.form.dense())
            left = self.rewrite(form.left, inner, context)
            return Rewritten(
                LowRank(left.form, right.form), right.report | {"left": left.report, "right": right.report}
            )
        if isinstance(form, Sum):
            parts = [self.rewrite(term, statistics, context) for term in form.terms]
            return Rewritten(Sum(tuple(p.form for p in parts)), {"terms": [p.report for p in parts]})
        return self.rewrite_leaf(form, statistics, context)


@dataclass(frozen=True)
class LeafContext:
    """What a step may know about the module that it rewrites, and no more.

    Attributes:
        granularity: `tensor`, `channel` or `group:N`, where a hybrid was resolved for this module.
        seed: for methods that draw; the same for the same module in every run.
    """

    granularity: str | None = None
    seed: int = 0


class Svd(LeafStep):
    """Low-rank factors by truncated SVD: SPQ (arXiv 2602.18420), whitened as in SVD-LLM (2403.07378)."""

    kind: ClassVar[str] = "svd"
    targets: str = "attention"
    keep_variance: Share | None = None
    ratio: Share | None = None
    max_error: Ratio | None = None
    whiten: bool = True
    multiple_of: Positive = 1
    rule: Literal["exact", "paper"] = "exact"

    @model_validator(mode="after")
    def _one_criterion(self) -> Svd:
        given = [k for k in ("keep_variance", "ratio", "max_error") if getattr(self, k) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"exactly one of keep_variance, ratio and max_error sets the rank; {told}")
        return self

    @property
    def needs_hessian(self) -> bool:
        return self.whiten or self.max_error is not None

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if not isinstance(leaf, Dense):
            raise ValueError(f"svd factors dense weights, and this one is {leaf.formula}; put svd earlier")
        options = SvdOptions(
            keep_variance=self.keep_variance,
            ratio=self.ratio,
            max_error=self.max_error,
            whiten=self.whiten,
            multiple_of=self.multiple_of,
            paper=self.rule == "paper",
        )
        return svd(leaf.weight, statistics, options)


class PruneNeurons(Step):
    """Structured removal of MLP neurons: SPQ's rule (arXiv 2602.18420) or the exact loss (2302.04089).

    Attributes:
        max_ratio: the most that a layer loses under `allocation: activation`.
        ratio: the share that all layers lose together under `allocation: uniform` and `loss`.
    """

    kind: ClassVar[str] = "prune_neurons"
    targets: Literal["mlp"] = "mlp"
    allocation: Literal["activation", "uniform", "loss"] = "activation"
    min_ratio: Ratio = 0.0
    max_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    importance: Literal["output", "activation"] = "output"
    compensate: bool = True
    multiple_of: Positive = 1

    @model_validator(mode="after")
    def _ratios_fit(self) -> PruneNeurons:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio} is above max_ratio {self.max_ratio}")
        if self.allocation == "activation" and self.ratio is not None:
            raise ValueError(
                "allocation: activation takes min_ratio and max_ratio; `ratio` is for the others"
            )
        if self.allocation != "activation" and self.ratio is None:
            raise ValueError(f"allocation: {self.allocation} takes the share to remove as `ratio`")
        return self

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "output" or self.compensate or self.allocation == "loss"

    @property
    def needs_statistics(self) -> bool:
        return True


class Quantize(LeafStep):
    """Linear quantization to 2 to 8 bits; SPQ's five granularities at 8 (arXiv 2602.18420).

    Attributes:
        granularity: `tensor`, `channel`, `group:N`, or a hybrid of tensor and channel by out-dimension
            (`percentile`, `meanstd`) or by module name (`name`).
        solver: `round` to the nearest grid point, or `gptq` (arXiv 2210.17323): column by column, what is not
            yet rounded makes up for what is, in the metric of the calibration text. Embeddings have no
            such metric and are rounded.
        clip: shrink each range to the least squared error.
        damping: of gptq: added to the Hessian's diagonal, relative to its mean.
        order: of gptq's columns: `group-aware` (largest inputs first, with contiguous groups), `activation`
            or `none`.
        sweeps: of gptq: passes of coordinate descent afterwards.
        percentile: of the out-dimensions, from which on `percentile` takes `channel`.
        std_factor: `meanstd` takes `channel` from mean + std_factor * standard deviation on.
    """

    kind: ClassVar[str] = "quantize"
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    granularity: str = "channel"
    symmetric: bool = True
    solver: Literal["round", "gptq"] = "round"
    clip: bool = False
    damping: Annotated[float, Field(ge=0, le=1)] = 0.03
    order: Literal["group-aware", "activation", "none"] = "group-aware"
    sweeps: Annotated[int, Field(ge=0, le=100)] = 0
    percentile: Annotated[float, Field(ge=0, le=100)] = 50.0
    std_factor: float = 0.5

    @field_validator("granularity")
    @classmethod
    def _granularity_is_known(cls, value: str) -> str:
        if value not in HYBRIDS:
            parse_granularity(value)
        return value

    @property
    def needs_hessian(self) -> bool:
        return self.solver == "gptq" and self.targets != "embeddings"

    @property
    def hybrid(self) -> bool:
        """Whether tensor or channel is chosen module by module."""
        return self.granularity in HYBRIDS

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        if not isinstance(leaf, Dense):
            raise ValueError(f"quantize takes dense weights, and this one is already {leaf.formula}")
        granularity = context.granularity or self.granularity
        if self.solver == "gptq" and statistics is not None:
            return gptq(
                leaf.weight.float(),
                statistics,
                GptqOptions(
                    bits=self.bits,
                    granularity=granularity,
                    symmetric=self.symmetric,
                    damping=self.damping,
                    order=self.order,
                    clip=self.clip,
                    sweeps=self.sweeps,
                ),
            )
        options = RoundOptions(self.bits, granularity, self.symmetric, clip=self.clip)
        return round_to_nearest(leaf.weight, statistics, options)


class Recover(Step):
    """LoRA on the compressed model (arXiv 2106.09685), then merged into the weights or kept as a term.

    Attributes:
        steps: optimizer steps.
        learning_rate: of AdamW.
        batch_size, seq_len: of a step, in windows and tokens.
        rank, alpha: of the adapters; their scale is alpha / rank.
        keep: `merge` adds them into the weights (requantized where these are quantized); `term` stores them.
        held_out: share of the text that is only watched; the best state by it is kept.
    """

    kind: ClassVar[str] = "recover"
    steps: Positive = 200
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-5
    batch_size: Positive = 1
    seq_len: Annotated[int, Field(ge=8)] = 128
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 32.0
    keep: Literal["merge", "term"] = "merge"
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.1


# One line a step: its key in a recipe and its class.
STEPS: dict[str, type[Step]] = {
    "svd": Svd,
    "prune_neurons": PruneNeurons,
    "quantize": Quantize,
    "recover": Recover,
}


def options_of(step: Step) -> dict[str, Any]:
    """A step's options as plain JSON, under its key."""
    return {step.kind: step.model_dump(mode="json")}


def in_storage(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as it is stored: cast to `dtype`, or to bfloat16 where float16 would overflow."""
    if dtype == torch.float16 and weight.numel() and float(weight.abs().amax()) > 65504.0:
        return weight.to(torch.bfloat16)
    return weight.to(dtype)
