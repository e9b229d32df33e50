"""One block: its sites in order, each gathered behind what the sites before it have become."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmpress.families import Layout, Site
from lmpress.forms import CompressedLinear, Dense, Form
from lmpress.methods.neuron_pruning import NeuronOptions, prune_neurons
from lmpress.methods.result import Rewritten
from lmpress.methods.svd_llm import factor_cost
from lmpress.pipeline.blocks import running
from lmpress.pipeline.plan import Plan
from lmpress.pipeline.prediction import ModulePlan
from lmpress.pipeline.stream import BlockStream
from lmpress.pipeline.walk import Gathered, Walk
from lmpress.recipes import FormStep, LeafContext, Pivot, PruneNeurons, in_storage
from lmpress.statistics import InputStatistics


@dataclass
class BlockResult:
    """What one block became.

    Attributes:
        forms: by linear (relative name), for the linears that a step touched.
        report: by linear, JSON-able; and "neurons" where some were pruned.
        kept: by linear, the outputs that are left of it, where some were pruned.
    """

    forms: dict[str, Form] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


def rewrite_block(
    block: nn.Module,
    name: str,
    layout: Layout,
    plan: Plan,
    walk: Walk | None,
    width: int | None,
    shares: Mapping[str, LeafContext] | None = None,
    original: Walk | None = None,
    rest: torch.dtype = torch.float32,
) -> BlockResult:
    """Apply the plan to one block, in place.

    Args:
        block: its real modules, in float32; afterwards every touched linear is a `CompressedLinear`, and
            every weight has the value that will be stored.
        name: the block's full name, such as "model.layers.3".
        walk: the calibration text on its way through this block; None where no step needs any.
        width: neurons to keep, or None.
        shares: by full name, what the modules of the block have of a budget that they share.
        original: the same of the dense model; None where no step needs it.
        rest: what norms and biases are stored in.
    """
    result = BlockResult()
    _settle(block, name, layout, plan, rest)
    prune = plan.recipe.steps[plan.neurons] if plan.neurons is not None else None
    for site in layout.sites:
        if isinstance(prune, PruneNeurons) and width is not None and layout.neurons.inputs[0] in site.linears:
            _prune(block, name, layout, plan, None if walk is None else walk.stream, width, result, rest)
        modules = {linear: plan.modules[f"{name}.{linear}"] for linear in site.linears}
        if any(module.steps for module in modules.values()):
            _rewrite_site(block, name, layout, site, modules, plan, walk, shares or {}, original, result)
    return result


def rewrite_early(block: nn.Module, name: str, layout: Layout, plan: Plan, before: int) -> None:
    """Apply the steps in front of step `before` that look at no text, in place."""
    for linear in layout.linears:
        module = plan.modules[f"{name}.{linear}"]
        for index in (index for index in module.steps if index < before):
            step = plan.recipe.steps[index]
            if isinstance(step, FormStep) and not step.needs_statistics:
                context = LeafContext(
                    module.granularity.get(index), _seed(plan.recipe.seed, f"{name}.{linear}")
                )
                form = current_form(block.get_submodule(linear))
                set_form(block, linear, store(step.rewrite(form, None, context).form, plan.dtype))


def current_form(module: nn.Module) -> Form:
    """The form that a linear holds: its own, or its dense weight."""
    if isinstance(module, CompressedLinear):
        return module.form
    return Dense(cast(Tensor, module.weight).data)


def set_form(block: nn.Module, linear: str, form: Form, bias: Tensor | None = None) -> None:
    """Let `linear` run `form`; its bias stays unless another one is given."""
    old = block.get_submodule(linear)
    kept = cast("Tensor | None", old.bias)
    bias = bias if bias is not None else (None if kept is None else kept.data)
    if isinstance(old, CompressedLinear) and bias is None:
        old.hold(form)
        old.runner = None
    else:
        block.set_submodule(linear, CompressedLinear(form, bias))


def _rewrite_site(
    block: nn.Module,
    name: str,
    layout: Layout,
    site: Site,
    modules: Mapping[str, ModulePlan],
    plan: Plan,
    walk: Walk | None,
    shares: Mapping[str, LeafContext],
    original: Walk | None,
    result: BlockResult,
) -> None:
    steps = [plan.recipe.steps[i] for module in modules.values() for i in module.steps]
    gathered: Gathered | None = None
    if walk is not None:
        gathered = walk.gather(
            site,
            hessian=any(step.needs_hessian for step in steps),
            # where no step asks, one batch is enough to tell how far the linears stray
            whole=any(step.needs_statistics for step in steps),
            original=original if any(step.needs_original for step in steps) else None,
            kept=_kept_inputs(site, layout, result),
        )
    cross = None if gathered is None else gathered.cross
    for linear, module in modules.items():
        if not module.steps:
            continue
        form = before = current_form(block.get_submodule(linear))
        weight, seed = before.dense(), _seed(plan.recipe.seed, f"{name}.{linear}")
        strayed = cross  # until a step has made up for it: another one would do so twice
        reports = []
        for index in module.steps:
            step = plan.recipe.steps[index]
            assert isinstance(step, FormStep)
            share = _share(shares.get(f"{name}.{linear}"), result.kept.get(linear))
            if share.rank and not _saves(share.rank, before.shape, plan, module):
                share = replace(share, rank=0)
            context = replace(
                share, granularity=module.granularity.get(index), seed=seed, weight=weight, cross=strayed
            )
            rewritten = step.rewrite(form, None if gathered is None else gathered.statistics, context)
            if step.needs_original and rewritten.form is not form:
                strayed = None
            form = rewritten.form
            reports.append({"step": step.kind} | rewritten.report)
        form = store(form, plan.dtype)
        set_form(block, linear, form)
        if walk is not None:
            _run_as_restored(block, linear, form)
        result.forms[linear] = form
        result.report[linear] = _report(before, form, gathered, reports)


def _kept_inputs(site: Site, layout: Layout, result: BlockResult) -> Tensor | None:
    """The channels of the dense model's input of `site` that are left of it."""
    if layout.neurons.output not in site.linears:
        return None
    return result.kept.get(layout.neurons.inputs[0])


def _saves(rank: int, shape: tuple[int, int], plan: Plan, module: ModulePlan) -> bool:
    """Whether factors of this rank take less than the weight, which may have lost neurons since."""
    pivoted = any(isinstance(plan.recipe.steps[index], Pivot) for index in module.steps)
    return factor_cost(shape, rank, pivoted) < shape[0] * shape[1]


def _share(share: LeafContext | None, kept: Tensor | None) -> LeafContext:
    """A module's share of a budget, without the outputs that were pruned."""
    if share is None or share.sensitivity is None or kept is None:
        return share or LeafContext()
    return replace(share, sensitivity=share.sensitivity[kept.to(share.sensitivity.device)])


def _prune(
    block: nn.Module,
    name: str,
    layout: Layout,
    plan: Plan,
    stream: BlockStream | None,
    width: int,
    result: BlockResult,
    rest: torch.dtype,
) -> None:
    neurons, step = layout.neurons, plan.recipe.steps[plan.neurons or 0]
    assert isinstance(step, PruneNeurons)
    output = block.get_submodule(neurons.output)
    total = current_form(output).shape[1]
    if width >= total:
        result.report["neurons"] = {"kept": total, "removed": 0}
        return
    assert stream is not None
    site = layout.site_of(neurons.output)
    signal = neurons.signal if step.importance == "activation" else None
    statistics, activation = stream.gather(block, site, step.needs_hessian, signal)
    bias = cast("Tensor | None", output.bias)
    choice = prune_neurons(
        current_form(output).dense(),
        statistics,
        width,
        NeuronOptions(importance=step.importance, compensate=step.compensate),
        activation=activation,
        output_bias=None if bias is None else bias.data,
    )

    def hold(linear: str, weight: Tensor, its_bias: Tensor | None) -> None:
        form: Form = Dense(weight)
        if not plan.modules[f"{name}.{linear}"].steps:  # else rounded when all of them are done
            form = store(form, plan.dtype)
        set_form(block, linear, form, its_bias)
        _run_as_restored(block, linear, form)
        result.forms[linear] = form
        result.report[linear] = _plain_report(form)

    for linear in neurons.inputs:
        module = block.get_submodule(linear)
        its_bias = cast("Tensor | None", module.bias)
        result.kept[linear] = choice.keep
        hold(
            linear,
            current_form(module).dense()[choice.keep],
            None if its_bias is None else its_bias.data[choice.keep],
        )
    shifted = None
    if bias is not None and choice.bias_delta is not None:
        shifted = (bias.data + choice.bias_delta.to(bias)).to(rest).to(bias)
    hold(neurons.output, choice.output, shifted)
    result.report["neurons"] = choice.report


def store(form: Form, dtype: torch.dtype) -> Form:
    """The form with its dense leaves as they are stored."""

    def rewriter(leaf: Form) -> Form:
        return Dense(in_storage(leaf.weight, dtype)) if isinstance(leaf, Dense) else leaf

    return form.rewrite(rewriter)


def _settle(block: nn.Module, name: str, layout: Layout, plan: Plan, rest: torch.dtype) -> None:
    """Give what no step touches, norms and biases among it, the value that will be stored."""
    weights = {f"{linear}.weight": linear for linear in layout.linears}
    for key, parameter in block.named_parameters():
        linear = weights.get(key)
        if linear is None:
            parameter.data = parameter.data.to(rest).to(parameter.dtype)
        elif not plan.modules[f"{name}.{linear}"].steps:
            parameter.data = in_storage(parameter.data, plan.dtype).to(parameter.dtype)


def _run_as_restored(block: nn.Module, linear: str, form: Form) -> None:
    """Let the text run through what a reader of the shard would run, to the bit."""
    module, restored = block.get_submodule(linear), running(form)
    assert isinstance(module, CompressedLinear)
    module.runner = lambda _, x: restored.forward(x)


def _report(
    before: Form, form: Form, gathered: Gathered | None, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    W, error = before.dense(), before.dense() - form.dense()
    report = _plain_report(form)
    if gathered is None:
        report["relative_weight_error"] = _ratio(error, W)
    else:
        x = gathered.sample
        report["relative_output_error"] = _ratio(x @ error.T, x @ W.T)
    return report | {"steps": steps}


def _plain_report(form: Form) -> dict[str, Any]:
    return {"form": form.formula, "shape": list(form.shape), "bytes": form.num_bytes}


def _ratio(error: Tensor, whole: Tensor) -> float:
    return round(float(error.norm() / whole.norm().clamp_min(1e-30)), 6)


def _seed(seed: int, name: str) -> int:
    """The same for the same module in every run, different for different modules."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) & 0x7FFFFFFF


@dataclass(frozen=True)
class TableMetric:
    """What errors in an embedding or a head cost.

    Attributes:
        probability: of each token, (vocabulary,).
        statistics: with the Hessian of an error in a row, (width, width).
    """

    probability: Tensor
    statistics: InputStatistics


def rewrite_outer(form: Form, module: ModulePlan, plan: Plan, metric: TableMetric | None = None) -> Rewritten:
    """Apply the plan to an embedding or a head.

    Args:
        metric: what errors in it cost; None where no step asks.
    """
    before, reports = form, []
    for index in module.steps:
        step = plan.recipe.steps[index]
        assert isinstance(step, FormStep)
        known = metric if step.weighs_tokens else None
        context = LeafContext(
            module.granularity.get(index), sensitivity=None if known is None else known.probability
        )
        rewritten = step.rewrite(form, None if known is None else known.statistics, context)
        form = rewritten.form
        reports.append({"step": step.kind} | rewritten.report)
    form = store(form, plan.dtype)
    return Rewritten(form, _report(before, form, None, reports))
