"""What every step of a recipe is: strict options, targets, what it asks for, and how it rewrites a form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from lmpress.families import BlockLayout, Feed, Layout, Rows, Site
from lmpress.forms import Dense, Form
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import RoundOptions, parse_granularity
from lmpress.recipes.equality import Equality
from lmpress.recipes.outline import Outline
from lmpress.statistics import Channels, InputStatistics

GROUPS = ("attention", "mlp", "linears", "embeddings")
"""The targets that are no glob."""

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]

O = TypeVar("O")  # noqa: E741


class Strict(BaseModel):
    """A frozen model that knows its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Step(Strict):
    """One entry of a recipe. It answers for itself what its neighbours need to know of it.

    Attributes:
        targets: `attention`, `mlp`, `linears`, `embeddings`, or a glob on module names.
    """

    kind: ClassVar[str]
    """Its key in a recipe."""

    scope: ClassVar[Literal["modules", "sites", "model"]] = "modules"
    """Whether it works on modules, on sites with what feeds them, or on the dense model as it is read."""

    once: ClassVar[str | None] = None
    """Why a recipe has it only once; None where it may come again."""

    needs_another: ClassVar[bool] = False
    """Whether it works on what an earlier step left."""

    trains: ClassVar[bool] = False
    """Whether it trains the compressed model, when all blocks are done, instead of rewriting a form."""

    leaves_codes: ClassVar[bool] = False
    """Whether all that it leaves is codes on a grid."""

    takes_floats: ClassVar[bool] = False
    """Whether it cannot follow a step that leaves codes."""

    leaves_factors: ClassVar[bool] = False
    """Whether it may leave low-rank factors."""

    leaves_pattern: ClassVar[bool] = False
    """Whether it leaves zeros whose places are kept."""

    takes_updates: ClassVar[bool] = True
    """Whether an update can be added into what it leaves."""

    targets: str = "linears"

    @property
    def budget(self) -> str | None:
        """The kind of budget that its modules share, a key of `survey.budgets.BUDGETS`; None for none."""
        return None

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
    def group(self) -> tuple[int, int] | None:
        """(n, m) of the pattern that it leaves; None where it is unstructured, or there is none."""
        return None

    @property
    def has_bits(self) -> bool:
        """Whether it puts something on a grid, be it as a part of more."""
        return self.leaves_codes

    @property
    def quantizes_factors(self) -> bool:
        """Whether low-rank factors, where there are some, are on a grid behind it."""
        return self.leaves_codes

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        """Why it cannot come after the `earlier` steps on the same weight; None where it can."""
        return None

    def overlaps(self, other: Step) -> bool:
        """Whether the two surely touch a module together, whatever the model."""
        pair = {self.targets, other.targets}
        return len(pair) == 1 or ("linears" in pair and bool(pair & {"attention", "mlp"}))

    def after(self, outline: Outline) -> Outline:
        """What it makes of a module, as far as shapes tell."""
        return outline

    def uneven_ranks(self, size: int) -> tuple[str, str] | None:
        """The ranks that it gives and a way out, where groups of `size` do not divide them."""
        return None

    def equality(self, config: Any, layout: Layout, seed: int) -> Equality | None:
        """How it turns the dense model into an equal one, before anything else; None where it does not.

        Raises:
            ValueError: the model has no such equal.
        """
        return None

    def grid(self) -> RoundOptions | None:
        """The grid that it puts weights on, as far as plain rounding tells; None without one."""
        return None

    def granularities(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Of a hybrid: what it takes for each module, by the shapes of all of them."""
        return {}

    def told(self, options: Callable[..., O], **others: Any) -> O:
        """The options of a method: what this step says by the same names, and `others`."""
        own = {f.name for f in fields(options)} & set(type(self).model_fields)  # type: ignore[arg-type]
        return options(**{name: getattr(self, name) for name in own - others.keys()}, **others)

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
        weight: what the module's matrix (out, in) should come back to: its dense weight before the first
            step that rewrites forms, or where a step before this one has moved it. Pruned neurons are gone.
        share: what the step's budget gives this module: bits, a grid step, a rank, a share of the weights;
            None where nothing is shared.
        sensitivity: mean squared gradient of the model's loss by each output, (out,); None where nobody
            asked for it.
        probability: of an embedding or a head: the mean probability of each token, (out,).
        cross: E[(x_fp - x) x^T] (in, in), x being the input of the module and x_fp that of the dense model;
            None where nobody asked for it, and behind a factor.
        later: the kinds of the steps that rewrite the same module after this one.
    """

    granularity: str | None = None
    seed: int = 0
    weight: Tensor | None = None
    share: float | None = None
    sensitivity: Tensor | None = None
    probability: Tensor | None = None
    cross: Tensor | None = None
    later: tuple[str, ...] = ()

    def behind(self, matrix: Tensor) -> LeafContext:
        """The context of a factor whose outputs (r,) go through `matrix` (out, r) to become the module's."""
        if self.sensitivity is None:
            return self
        outputs = self.sensitivity.to(matrix.device, torch.float32)
        return replace(self, sensitivity=matrix.float().square().T @ outputs)

    def at(self, index: Tensor) -> LeafContext:
        """The context of some of the outputs; `index` is a mask or indices."""
        if self.sensitivity is None:
            return self
        return replace(self, sensitivity=self.sensitivity[index.to(self.sensitivity.device)])


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
        if not form.parts():
            return self.rewrite_leaf(form, statistics, context)
        made: dict[str, Rewritten] = {}
        for part in form.parts():
            inner, given = context, statistics
            if part.through is not None and context.sensitivity is not None:
                inner = context.behind(part.through())
            if part.rows is not None:
                inner = context.at(part.rows)
            if part.after is not None:
                given = None if given is None else given.through(made[part.after].form.dense())
                inner = replace(inner, cross=None)
            made[part.name] = self.rewrite(part.form, given, inner)
        return Rewritten(
            form.with_parts({name: one.form for name, one in made.items()}),
            {"parts": {name: one.report for name, one in made.items()}},
            _moved(form, {name: one.target for name, one in made.items()}),
        )


def _moved(form: Form, targets: Mapping[str, Tensor | None]) -> Tensor | None:
    """What an expression was fitted to, where some of its parts were moved; None where none was."""
    if all(target is None for target in targets.values()):
        return None
    parts = {part.name: part.form for part in form.parts()}
    moved = {name: Dense(target) for name, target in targets.items() if target is not None}
    return form.with_parts(parts | moved).dense()


class SiteStep(Step, ABC):
    """A step over all linears that share an input together with what feeds them.

    It works on the dense weights in front of every step that rewrites forms, and leaves an equal model, or
    one with fewer channels. The statistics that later steps see are those of what it leaves.
    """

    scope: ClassVar[Literal["modules", "sites", "model"]] = "sites"
    told_as: ClassVar[str | None] = None
    """What a block's part of the manifest calls its report; None for the site's name and its kind."""

    @abstractmethod
    def sites(self, block: BlockLayout) -> tuple[Site, ...]:
        """The sites of a block that it works at."""

    def touched(self, site: Site, block: BlockLayout) -> tuple[str, ...]:
        """The linears whose weights it changes when it works at `site`."""
        fed = site.feed.rows if site.feed is not None else None
        return site.linears if fed is None else (*site.linears, fed.linear)

    def signal(self, block: BlockLayout) -> Rows | None:
        """Outputs whose mean magnitude it asks for."""
        return None

    def narrowed(
        self, shape: tuple[int, int], linear: str, block: BlockLayout
    ) -> tuple[tuple[int, int], bool]:
        """The shape (out, in) that it leaves of a linear, as far as can be told, and whether that is sure."""
        return shape, True

    def unit(self, linear: str, block: BlockLayout) -> int:
        """Of what the number of inputs that it leaves of a linear is a multiple; 0 where it takes none."""
        return 0

    def lacks(self, later: Sequence[Step]) -> str | None:
        """What is missing among the `later` steps on the linears that it works at; None where nothing is."""
        return None

    @abstractmethod
    def rewrite_site(self, junction: Junction) -> SiteRewritten | None:
        """The new readers of the site, and what became of its channels; None to leave all as it is."""


@dataclass(frozen=True)
class Junction:
    """A site as a `SiteStep` sees it.

    Attributes:
        readers: the weights (out, n) of the linears that read the site, by name.
        feed: what feeds the site.
        statistics: of the input (n,); None where the step asks for none.
        bias: of the only reader, (out,); None where there is none, or more than one reader.
        activation: the mean magnitude of the signal, where the step asks for one.
        share: what the step's budget gives this site; None where nothing is shared.
        seed: for methods that draw.
        later: for each reader, the steps that rewrite its form afterwards.
    """

    readers: Mapping[str, Tensor]
    feed: Feed | None
    statistics: InputStatistics | None
    bias: Tensor | None = None
    activation: Tensor | None = None
    share: float | None = None
    seed: int = 0
    later: Mapping[str, Sequence[Step]] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteRewritten:
    """What a `SiteStep` leaves of a site.

    Attributes:
        readers: the new weights (out, n') by name.
        channels: what became of the input.
        bias: the new bias of the only reader; None where it stays.
        report: JSON-able facts for the manifest.
    """

    readers: Mapping[str, Tensor]
    channels: Channels
    bias: Tensor | None
    report: dict[str, Any]


def group_of(granularity: str) -> dict[str, int]:
    """`group:64` -> {"groups of 64": 64}, as `column_groups` has it; {} for the others."""
    size = parse_granularity(granularity)[1]
    return {} if size is None else {f"groups of {size}": size}


def options_of(step: Step) -> dict[str, Any]:
    """A step's options as plain JSON, under its key."""
    return {step.kind: step.model_dump(mode="json")}


def forms_before(earlier: Sequence[Step]) -> str | None:
    """The kind of the first of the steps that rewrites forms; None where there is none."""
    return next((s.kind for s in earlier if isinstance(s, FormStep)), None)
