"""One block: its sites in order, each gathered behind what the sites before it have become."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lmpress.families import BlockLayout, Site
from lmpress.forms import Dense, Form
from lmpress.pipeline.reports import error_report, plain_report
from lmpress.plan import Plan
from lmpress.recipes import FormStep, Junction, LeafContext, SiteStep
from lmpress.source import bias_of, current_form, failing_at, run_as_restored, set_form, store
from lmpress.source.feeds import Fed, feed_with
from lmpress.statistics import Channels
from lmpress.stream import Gathered, Walk
from lmpress.survey import Shares


@dataclass(frozen=True)
class BlockResult:
    """What one block became.

    Attributes:
        forms: by linear (relative name), for the linears that a step touched.
        report: by linear, JSON-able; and what steps over sites tell, under names of their own.
    """

    forms: Mapping[str, Form]
    report: Mapping[str, Any]


@dataclass
class BlockTask:
    """One block to rewrite, in place.

    Attributes:
        plan: what is to be done.
        index: of the block.
        block: its real modules, in float32; afterwards every touched linear is a `CompressedLinear`, and
            every weight has the value that will be stored.
        walk: the calibration text on its way through this block; None where no step needs any.
        original: the same of the dense model; None where no step needs it.
        shares: what modules have of the budgets that they share.
        sensitivity: mean squared gradients by output, by full name.
        rest: what norms and biases are stored in.
    """

    plan: Plan
    index: int
    block: nn.Module
    walk: Walk | None = None
    original: Walk | None = None
    shares: Shares = field(default_factory=dict)
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)
    rest: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._forms: dict[str, Form] = {}
        self._report: dict[str, Any] = {}
        self._inputs: dict[str, Channels] = {}  # what became of the channels that a site reads
        self._outputs: dict[str, Channels] = {}  # what became of the outputs of a linear

    @property
    def layout(self) -> BlockLayout:
        """Of the block."""
        return self.plan.layout.block(self.index)

    @cached_property
    def name(self) -> str:
        """The block's full name, such as "model.layers.3"."""
        return self.plan.layout.block_name(self.index)

    def run(self) -> BlockResult:
        """Rewrite the block. LmpressError, with the module's name, where a method fails."""
        self._settle()
        for site in self.layout.sites:
            for at, index, step in self._site_steps(site):
                with failing_at(f"{self.name}.{at.name}"):
                    self._rewrite_channels(at, index, step)
            if any(self.plan.modules[self._full(linear)].steps for linear in site.linears):
                self._rewrite_site(site)
        return BlockResult(self._forms, self._report)

    def _full(self, linear: str) -> str:
        return f"{self.name}.{linear}"

    def _settle(self) -> None:
        """Give what no step touches, norms and biases among it, the value that will be stored."""
        weights = {f"{linear}.weight": linear for linear in self.layout.linears}
        for key, parameter in self.block.named_parameters():
            linear = weights.get(key)
            if linear is None:
                parameter.data = parameter.data.to(self.rest).to(parameter.dtype)
            elif not self.plan.modules[self._full(linear)].steps:
                parameter.data = store(Dense(parameter.data), self.plan.dtype).dense()

    def _site_steps(self, site: Site) -> list[tuple[Site, int, SiteStep]]:
        """The steps over sites whose turn it is in front of `site`, the first whose linears they change."""
        order = {linear: i for i, each in enumerate(self.layout.sites) for linear in each.linears}
        here = self.layout.sites.index(site)
        return [
            (at, index, step)
            for index, step in self.plan.recipe.site_steps
            for at in self.layout.sites
            if index in self.plan.sites.get(f"{self.name}.{at.name}", ())
            and min(order[linear] for linear in step.touched(at, self.layout)) == here
        ]

    def _rewrite_channels(self, site: Site, index: int, step: SiteStep) -> None:
        """Apply a step to a site and to what feeds it, before any of their forms is rewritten."""
        gathered = self._ahead(site, step)
        linears = {linear: self.block.get_submodule(linear) for linear in site.linears}
        alone = next(iter(linears.values())) if len(linears) == 1 else None
        rewritten = step.rewrite_site(
            Junction(
                readers={linear: current_form(module).dense() for linear, module in linears.items()},
                feed=site.feed,
                statistics=None if gathered is None else gathered.statistics,
                bias=None if alone is None else bias_of(alone),
                activation=None if gathered is None else gathered.activation,
                share=self.shares.get((index, self._full(site.linears[0]))),
                seed=seed_of(self.plan.recipe.seed, f"{self.name}.{site.name}"),
                later={linear: self._later(linear) for linear in linears},
            )
        )
        if rewritten is None:
            return
        told = step.told_as or f"{site.name}.{step.kind}"
        self._report[told] = dict(rewritten.report)
        if rewritten.channels == Channels():
            return
        fed = feed_with(self.block, self.layout, site, rewritten.channels, self.rest)
        for linear, (weight, bias) in fed.linears.items():
            self._hold(linear, weight, bias)
        for linear, channels in fed.outputs.items():
            self._outputs[linear] = self._outputs.get(linear, Channels()).then(channels)
        self._read(site, rewritten.readers, rewritten.bias, fed)

    def _read(self, site: Site, readers: Mapping[str, Tensor], bias: Tensor | None, fed: Fed) -> None:
        """Let the linears of a site read what it is now."""
        for linear, weight in readers.items():
            self._hold(linear, fed.settled(weight), bias)
        self._inputs[site.name] = self._inputs.get(site.name, Channels()).then(fed.channels)

    def _ahead(self, site: Site, step: SiteStep) -> Gathered | None:
        """What a site sees as the block is now, before the text has come there."""
        if self.walk is None or not step.needs_statistics:
            return None
        ahead = Walk(self.walk.at, self.block, memory=0)
        return ahead.gather(site, step.needs_hessian, signal=step.signal(self.layout))

    def _hold(self, linear: str, weight: Tensor, bias: Tensor | None) -> None:
        """Let a linear have this weight, and this bias, where one is given, as it will be stored."""
        form: Form = Dense(weight)
        if bias is not None:
            bias = bias.to(self.rest).to(bias)
        if not self.plan.modules[self._full(linear)].steps:  # else rounded when all of them are done
            form = store(form, self.plan.dtype)
        set_form(self.block, linear, form, bias)
        run_as_restored(self.block, linear, form)
        self._forms[linear] = form
        self._report[linear] = plain_report(form)

    def _rewrite_site(self, site: Site) -> None:
        """Rewrite the forms of the linears that read a site."""
        with failing_at(f"{self.name}.{site.name}"):
            gathered = self._gather(site)
        for linear in site.linears:
            if self.plan.modules[self._full(linear)].steps:
                with failing_at(self._full(linear)):
                    self._rewrite_form(linear, gathered)

    def _gather(self, site: Site) -> Gathered | None:
        if self.walk is None:
            return None
        steps = [step for linear in site.linears for step in self._later(linear)]
        return self.walk.gather(
            site,
            hessian=any(step.needs_hessian for step in steps),
            # where no step asks, one batch is enough to tell how far the linears stray
            whole=any(step.needs_statistics for step in steps),
            original=self.original if any(step.needs_original for step in steps) else None,
            channels=self._inputs.get(site.name),
        )

    def _later(self, linear: str) -> list[FormStep]:
        return [step for _, step in self.plan.form_steps(self._full(linear))]

    def _rewrite_form(self, linear: str, gathered: Gathered | None) -> None:
        form = before = current_form(self.block.get_submodule(linear))
        full, target = self._full(linear), before.dense()
        cross = None if gathered is None else gathered.cross
        statistics = None if gathered is None else gathered.statistics
        reports = []
        steps = self.plan.form_steps(full)
        for place, (index, step) in enumerate(steps):
            context = LeafContext(
                granularity=self.plan.modules[full].granularity.get(index),
                seed=seed_of(self.plan.recipe.seed, full),
                weight=target,
                share=self.shares.get((index, full)),
                sensitivity=self._sensitivity(linear),
                cross=cross,
                later=tuple(later.kind for _, later in steps[place + 1 :]),
            )
            # what a step did not ask for is not given to it: else its result would hang on its neighbours
            rewritten = step.rewrite(form, statistics if step.needs_statistics else None, context)
            if step.needs_original and rewritten.form is not form:
                cross = None  # it has made up for what strayed: another one would do so twice
            if rewritten.target is not None:  # a later step that fits to anything else would undo the move
                target = target + (rewritten.target - form.dense())
            form = rewritten.form
            reports.append({"step": step.kind} | rewritten.report)
        form = store(form, self.plan.dtype)
        set_form(self.block, linear, form)
        if self.walk is not None:
            run_as_restored(self.block, linear, form)
        self._forms[linear] = form
        self._report[linear] = error_report(before, form, gathered) | {"steps": reports}

    def _sensitivity(self, linear: str) -> Tensor | None:
        squares = self.sensitivity.get(self._full(linear))
        if squares is None or linear not in self._outputs:
            return squares
        return self._outputs[linear].gradients(squares)


def rewrite_early(block: nn.Module, index: int, plan: Plan, before: int) -> None:
    """Apply the steps in front of step `before` that look at no text, in place."""
    for linear in plan.layout.block(index).linears:
        name = f"{plan.layout.block_name(index)}.{linear}"
        for place, step in plan.form_steps(name):
            if place < before and not step.needs_statistics:
                granularity = plan.modules[name].granularity.get(place)
                context = LeafContext(granularity, seed_of(plan.recipe.seed, name))
                form = step.rewrite(current_form(block.get_submodule(linear)), None, context).form
                set_form(block, linear, store(form, plan.dtype))


def seed_of(seed: int, name: str) -> int:
    """The same for the same module in every run, different for different modules."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) & 0x7FFFFFFF
