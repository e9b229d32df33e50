"""What every step of a recipe is: strict options, targets, and how a step rewrites a form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Pivoted, Sum
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

    @property
    def weighs_tokens(self) -> bool:
        """Whether it asks how probable the tokens of an embedding are."""
        return False

    @property
    def needs_original(self) -> bool:
        """Whether the dense model has to be run beside the compressed one."""
        return False

    @property
    def shares_budget(self) -> bool:
        """Whether its modules share one budget, by how sensitive the model is to each."""
        return False

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
        bits: the share of a budget that all modules have in common, where it is given out in whole bits.
        grid_step: the step of all grids, where the budget is met by one step for all.
        sensitivity: mean squared gradient of the model's loss by each output, (out,); None where nobody
            asked for it. Of an embedding or a head: the mean probability of each token.
        cross: E[(x_fp - x) x^T] (in, in), x being the input of the module and x_fp that of the dense model;
            None where nobody asked for it, and behind a factor.
        rank: the share of a budget of parameters; 0 where the weight is better left dense.
        keep: the share of its parameters that the module keeps, of a budget of these.
    """

    granularity: str | None = None
    seed: int = 0
    weight: Tensor | None = None
    bits: int | None = None
    grid_step: float | None = None
    sensitivity: Tensor | None = None
    cross: Tensor | None = None
    rank: int | None = None
    keep: float | None = None

    def behind(self, matrix: Tensor) -> LeafContext:
        """The context of a factor whose outputs (r,) go through `matrix` (out, r) to become the module's."""
        if self.sensitivity is None:
            return self
        outputs = self.sensitivity.to(matrix.device, torch.float32)
        return replace(self, sensitivity=matrix.float().square().T @ outputs)


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
            inner = context.behind(form.left.dense())
            right, left = self._chained(form.right, form.left, statistics, inner, context)
            return Rewritten(
                LowRank(left.form, right.form),
                right.report | {"left": left.report, "right": right.report},
                _moved(LowRank(form.left, _aim(form.right, right)), right),
            )
        if isinstance(form, Pivoted):
            inner, outer = _pivoted_contexts(form, context)
            basis, rest = self._chained(form.basis, form.coefficients, statistics, inner, outer)
            return Rewritten(
                Pivoted(basis.form, rest.form, form.index),
                basis.report | {"basis": basis.report, "coefficients": rest.report},
                _moved(replace(form, basis=_aim(form.basis, basis)), basis),
            )
        if isinstance(form, Sum):
            parts = [self.rewrite(term, statistics, context) for term in form.terms]
            aims = tuple(_aim(term, part) for term, part in zip(form.terms, parts, strict=True))
            return Rewritten(
                Sum(tuple(p.form for p in parts)),
                {"terms": [p.report for p in parts]},
                _moved(Sum(aims), *parts),
            )
        return self.rewrite_leaf(form, statistics, context)

    def _chained(
        self,
        first: Form,
        second: Form,
        statistics: InputStatistics | None,
        inner: LeafContext,
        outer: LeafContext,
    ) -> tuple[Rewritten, Rewritten]:
        """Two forms that run one after the other, the second on what the first gives; each in its context."""
        before = self.rewrite(first, statistics, inner)
        between = None if statistics is None else statistics.through(before.form.dense())
        return before, self.rewrite(second, between, replace(outer, cross=None))


def _aim(form: Form, rewritten: Rewritten) -> Form:
    """What a part of an expression was fitted to: itself, or the target that it was moved to."""
    return form if rewritten.target is None else Dense(rewritten.target)


def _moved(aim: Form, *parts: Rewritten) -> Tensor | None:
    """The target of an expression, None where none of its parts was moved."""
    return None if all(part.target is None for part in parts) else aim.dense()


def _pivoted_contexts(form: Pivoted, context: LeafContext) -> tuple[LeafContext, LeafContext]:
    """Of the basis, whose outputs are outputs of the module and inputs of the rest; and of the rest."""
    if context.sensitivity is None:
        return context, context
    pivots = form.pivots().to(context.sensitivity.device)
    through = replace(form, basis=Dense(torch.eye(form.rank, device=pivots.device))).dense()
    return context.behind(through), replace(context, sensitivity=context.sensitivity[~pivots])


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
