"""What every step of a recipe is: strict options, targets, and how a step rewrites a form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from lmpress.forms import Form, LowRank, Pivoted, Sum
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import parse_granularity
from lmpress.statistics import InputStatistics

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
    def blocks_only(self) -> bool:
        """Whether it works on the linears of the blocks alone, and not on embeddings or a head."""
        return False

    @property
    def column_groups(self) -> dict[str, int]:
        """Sizes that have to divide the inputs of every weight, by what they are called."""
        return {}

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


@dataclass(frozen=True)
class LeafContext:
    """What a step may know about the module that it rewrites, and no more.

    Attributes:
        granularity: `tensor`, `channel` or `group:N`, where a hybrid was resolved for this module.
        seed: for methods that draw; the same for the same module in every run.
        weight: the module's dense weight (out, in) before the first step that rewrites forms: what its
            output should come back to. Pruned neurons are gone from it.
    """

    granularity: str | None = None
    seed: int = 0
    weight: Tensor | None = None


class FormStep(Step, ABC):
    """A step that rewrites the form of each module that it targets."""

    @abstractmethod
    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        """The new form of a whole expression, whose input has these statistics."""


class LeafStep(FormStep):
    """A step that rewrites every leaf of a weight's form by itself."""

    @abstractmethod
    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        """The new form of one leaf, whose input has these statistics. A `Sparse` form counts as a leaf."""

    def rewrite(self, form: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        """The new form of a whole expression: statistics follow the rewriting.

        In LowRank(left, right) the input of `left` is right(x), so `left` is rewritten against the
        statistics of what `right` has just become. So are the coefficients of Pivoted behind its basis.
        """
        if isinstance(form, LowRank):
            right, left = self._chained(form.right, form.left, statistics, context)
            return Rewritten(
                LowRank(left.form, right.form), right.report | {"left": left.report, "right": right.report}
            )
        if isinstance(form, Pivoted):
            basis, rest = self._chained(form.basis, form.coefficients, statistics, context)
            return Rewritten(
                Pivoted(basis.form, rest.form, form.index),
                basis.report | {"basis": basis.report, "coefficients": rest.report},
            )
        if isinstance(form, Sum):
            parts = [self.rewrite(term, statistics, context) for term in form.terms]
            return Rewritten(Sum(tuple(p.form for p in parts)), {"terms": [p.report for p in parts]})
        return self.rewrite_leaf(form, statistics, context)

    def _chained(
        self, first: Form, second: Form, statistics: InputStatistics | None, context: LeafContext
    ) -> tuple[Rewritten, Rewritten]:
        """Two forms that run one after the other, the second on what the first gives."""
        before = self.rewrite(first, statistics, context)
        inner = None if statistics is None else statistics.through(before.form.dense())
        return before, self.rewrite(second, inner, context)


def group_of(granularity: str) -> dict[str, int]:
    """`group:64` -> {"groups of 64": 64}, as `column_groups` has it; {} for the others."""
    size = parse_granularity(granularity)[1]
    return {} if size is None else {f"groups of {size}": size}


def options_of(step: Step) -> dict[str, Any]:
    """A step's options as plain JSON, under its key."""
    return {step.kind: step.model_dump(mode="json")}


def in_storage(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as it is stored: cast to `dtype`, or to bfloat16 where float16 would overflow."""
    if dtype == torch.float16 and weight.numel() and float(weight.abs().amax()) > 65504.0:
        return weight.to(torch.bfloat16)
    return weight.to(dtype)
