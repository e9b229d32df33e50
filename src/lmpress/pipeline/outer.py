"""What stands outside the blocks: embeddings and heads, by the plan."""

from __future__ import annotations

from lmpress.forms import Form
from lmpress.methods.result import Rewritten
from lmpress.pipeline.reports import error_report
from lmpress.plan import Plan
from lmpress.recipes import LeafContext
from lmpress.source import store
from lmpress.survey import TableMetric


def rewrite_outer(form: Form, name: str, plan: Plan, metric: TableMetric | None = None) -> Rewritten:
    """Apply the plan to an embedding or a head.

    Args:
        metric: what errors in it cost; None where no step asks.
    """
    before, reports = form, []
    if metric is not None:
        metric = metric.to(form.dense().device)
    for index, step in plan.form_steps(name):
        known = metric if step.weighs_tokens else None
        context = LeafContext(
            plan.modules[name].granularity.get(index),
            probability=None if known is None else known.probability,
        )
        rewritten = step.rewrite(form, None if known is None else known.statistics, context)
        form = rewritten.form
        reports.append({"step": step.kind} | rewritten.report)
    form = store(form, plan.dtype)
    return Rewritten(form, error_report(before, form, None) | {"steps": reports})
