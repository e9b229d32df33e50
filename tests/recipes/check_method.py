"""What every step that rewrites a form has to hold to, whatever its method: `check_method(step)`.

In the manner of scikit-learn's `check_estimator`: one call, many small checks, each with a message that names
the step. A new step needs one line in `test_check_method.py`, and a new check here holds all steps to it.

    check_method(Quantize(bits=4))
    check_method(Pivot(), start=factored)       # a step that needs more than a dense weight to begin with
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Pivoted, Quantized, Sparse, Sum
from lmpress.methods.result import Rewritten
from lmpress.recipes import FormStep, LeafContext
from lmpress.statistics import InputStatistics, StatisticsAccumulator

ROWS, COLUMNS, TOKENS = 12, 32, 300

Start = Callable[[Tensor], Form]


def check_method(step: FormStep, start: Start = Dense, *, row_wise: bool = True) -> None:
    """AssertionError where a step breaks what all steps hold to.

    Args:
        step: rewrites what `start` makes of a weight.
        start: the form that the step begins with.
        row_wise: whether permuted rows of the weight come out as permuted rows of the result.
    """
    inputs_stay_as_they_are(step, start)
    one_request_one_answer(step, start)
    the_report_is_of_the_form(step, start)
    what_is_not_finite_is_refused(step, start)
    degenerate_weights_and_inputs(step, start)
    needs_are_honest(step, start)
    if row_wise:
        permuted_rows_are_permuted(step, start)


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """(rows, columns), float32, rows and columns of unequal sizes."""
    generator = torch.Generator().manual_seed(11)
    sizes = torch.rand(rows, 1, generator=generator) + 0.3
    return torch.randn(rows, columns, generator=generator) * sizes


def inputs(columns: int = COLUMNS) -> Tensor:
    """(TOKENS, columns), correlated, of unequal sizes, not around zero."""
    generator = torch.Generator().manual_seed(12)
    mixed = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(TOKENS, columns, generator=generator) @ mixed
    return (x + 0.2) * (torch.rand(columns, generator=generator) + 0.2)


def moments(x: Tensor) -> InputStatistics:
    accumulator = StatisticsAccumulator(x.shape[1], hessian=True)
    accumulator.update(x)
    return accumulator.result()


def context(step: FormStep, dense: Tensor, x: Tensor | None = None) -> LeafContext:
    """All that a step could be told of a module; what it did not ask for must not matter."""
    rows, columns = dense.shape
    x = inputs(columns) if x is None else x
    generator = torch.Generator().manual_seed(13)
    size = float(dense.square().mean().sqrt() * x.square().mean().sqrt())
    shares = {"bits": 5, "rate": 0.1 * size or 0.1, "ranks": max(1, min(rows, columns) // 4), "density": 0.6}
    return LeafContext(
        seed=5,
        weight=dense,
        share=None if step.budget is None else shares[step.budget],
        sensitivity=torch.rand(rows, generator=generator) + 0.1,
        probability=torch.rand(rows, generator=generator) + 0.1,
        cross=(0.3 * x.roll(1, 1)).T @ x / len(x),
    )


def made(
    step: FormStep, start: Start, dense: Tensor, statistics: InputStatistics | None, **other: Any
) -> Rewritten:
    return step.rewrite(start(dense), statistics, replace(context(step, dense), **other))


def equal(one: Form, other: Form) -> bool:
    """Whether two forms are the same, to the bit."""
    if one.describe() != other.describe():
        return False
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def inputs_stay_as_they_are(step: FormStep, start: Start) -> None:
    dense, statistics = weight(), moments(inputs())
    form, told = start(dense), context(step, dense)
    watched = [dense, *form.tensors().values()]
    watched += [getattr(statistics, f.name) for f in fields(statistics)]
    watched += [getattr(told, f.name) for f in fields(told)]
    watched = [tensor for tensor in watched if isinstance(tensor, Tensor)]
    before = [tensor.clone() for tensor in watched]
    step.rewrite(form, statistics, told)
    assert all(map(torch.equal, before, watched)), f"{step!r} changes what it is given"


def one_request_one_answer(step: FormStep, start: Start) -> None:
    first, second = (made(step, start, weight(), moments(inputs())) for _ in range(2))
    assert equal(first.form, second.form), f"{step!r} gives another result the second time"
    assert first.report == second.report
    assert first.form.shape == (ROWS, COLUMNS)


def the_report_is_of_the_form(step: FormStep, start: Start) -> None:
    """What is told of density, rank, bits and error is what the form has, not what was wished for."""
    dense, statistics = weight(), moments(inputs())
    before = start(dense)
    result = step.rewrite(before, statistics, context(step, dense))
    if result.report.get("reason") is not None:
        return
    wanted = before.dense() if result.target is None else result.target
    facts = facts_of(result.form, before, dense, wanted, inputs().double())
    for key in facts.keys() & result.report.keys():
        told, fact = result.report[key], facts[key]
        same = told == (pytest.approx(fact, rel=2e-3, abs=1e-6) if isinstance(fact, float) else fact)
        assert same, f"{step!r} reports {key} = {told}, and the form has {fact}"
    assert facts.keys() & result.report.keys(), f"{step!r} reports nothing that can be checked"


def facts_of(form: Form, before: Form, dense: Tensor, wanted: Tensor, x: Tensor) -> dict[str, Any]:
    """What a report may tell, measured on the form and by running it on the inputs themselves."""
    terms = form.terms if isinstance(form, Sum) else (form,)
    sparse = [term for term in terms if isinstance(term, Sparse)]
    factors = [term for term in terms if isinstance(term, LowRank | Pivoted)]
    kept = sum(int(term.pattern.mask().sum()) for term in sparse)
    rank = sum(term.rank for term in factors)
    size = form.shape[0] * form.shape[1]
    own = form.dense(torch.float64)

    def error(reference: Tensor, found: Tensor) -> float:
        reference, found = reference.double(), found.double()
        return float(((reference - found) @ x.T).square().sum() / (reference @ x.T).square().sum())

    facts: dict[str, Any] = {
        "bits_per_weight": 8 * sum(t.numel() * t.element_size() for t in form.tensors().values()) / size,
        "zeros": float((own == 0).double().mean()),
        "density": kept / size if sparse else float((own != 0).double().mean()),
        "parameters": (kept + rank * sum(form.shape)) / size,
        "output_error": error(wanted, own),
        "relative_error": error(dense, own) ** 0.5,
        "error_before": error(dense, before.dense()),
        "error_after": error(dense, own),
        "weight_error": float((own - wanted.double()).norm() / wanted.double().norm()),
        "error": float((own - wanted.double()).norm() / wanted.double().norm()),
    }
    if factors:
        facts["rank"] = factors[-1].rank  # of a sum, the term that the step added
    bits = {leaf.bits for leaf in leaves(form) if isinstance(leaf, Quantized)}
    if isinstance(form, Quantized):
        facts |= {"granularity": form.granularity, "symmetric": form.symmetric}
    return facts | ({"bits": bits.pop()} if len(bits) == 1 else {})


def leaves(form: Form) -> Iterator[Form]:
    """All leaves, those of a sparse form's values too."""
    found: list[Form] = []

    def visit(leaf: Form) -> Form:
        found.append(leaf.values if isinstance(leaf, Sparse) else leaf)
        return leaf

    form.rewrite(visit)
    return iter(found)


def what_is_not_finite_is_refused(step: FormStep, start: Start) -> None:
    dense, statistics = weight(), moments(inputs())
    for value in (torch.nan, torch.inf):
        spoiled = dense.clone()
        spoiled[3, 5] = value
        with pytest.raises(ValueError, match=r"not finite|NaN|infinity"):
            step.rewrite(start_of(start, dense, spoiled), statistics, context(step, spoiled))
        if not step.needs_statistics:
            continue
        for name in ("second_moment", "hessian") if step.needs_hessian else ("second_moment",):
            moment = getattr(statistics, name).clone()
            moment.view(-1)[0] = value
            with pytest.raises(ValueError, match=r"not finite|NaN|infinity"):
                made(step, start, dense, replace(statistics, **{name: moment}))


def start_of(start: Start, dense: Tensor, spoiled: Tensor) -> Form:
    """The form that the step begins with, its first floating-point weight spoiled as `spoiled` is."""
    form = start(dense)
    value, done = spoiled[3, 5], []

    def spoil(leaf: Form) -> Form:
        if done or not isinstance(leaf, Dense):
            return leaf
        done.append(leaf)
        changed = leaf.weight.clone()
        changed[-1, -1] = value
        return Dense(changed)

    return form.rewrite(spoil)


def degenerate_weights_and_inputs(step: FormStep, start: Start) -> None:
    """Thin, flat and empty of information: the shape stays, and no number stops being finite."""
    plain = inputs()
    cases = {
        "one row": (weight(1), plain),
        "one column": (weight(ROWS, 1), inputs(1)),
        "no rank": (torch.zeros(ROWS, COLUMNS), plain),
        "one direction": (weight(ROWS, 1) @ weight(1), plain),
        "a zero row": (weight() * (torch.arange(ROWS) != 2)[:, None], plain),
        "no input": (weight(), torch.zeros(TOKENS, COLUMNS)),
        "a dead input": (weight(), plain * (torch.arange(COLUMNS) != 7)),
        "constant inputs": (weight(), torch.ones(TOKENS, 1) * plain[:1]),
        "inputs that are alike": (weight(), plain[:, :1].expand(-1, COLUMNS)),
        "two tokens": (weight(), plain[:2]),
        "large numbers": (1e4 * weight(), 1e3 * plain),
        "small numbers": (1e-5 * weight(), 1e-3 * plain),
    }
    for name, (dense, x) in cases.items():
        if any(dense.shape[1] % size for size in step.column_groups.values()):
            continue
        try:
            result = step.rewrite(start(dense), moments(x), context(step, dense, x))
        except ValueError as refused:  # scales alone may be more than a budget of bits
            if "cannot be met" not in str(refused):
                raise
            continue
        assert result.form.shape == tuple(dense.shape), f"{step!r}: {name}"
        assert bool(torch.isfinite(result.form.dense()).all()), f"{step!r}: {name} gives what is not finite"
        assert all(value == value for value in result.report.values()), f"{step!r}: {name} reports NaN"


def needs_are_honest(step: FormStep, start: Start) -> None:
    """What a step says that it does not need does not change its result."""
    dense, statistics = weight(), moments(inputs())
    whole = made(step, start, dense, statistics).form
    if not step.needs_statistics:
        assert made(step, start, dense, None).form.shape == whole.shape
    of_tables = step.targets == "embeddings"  # whose statistics are a metric, and always have a Hessian
    if not step.needs_hessian and not of_tables:
        bare = replace(statistics, hessian=None)
        assert equal(whole, made(step, start, dense, bare).form), f"{step!r} uses the Hessian all the same"
    if not step.needs_original:
        other = made(step, start, dense, statistics, cross=None)
        assert equal(whole, other.form), f"{step!r} uses the dense model all the same"
        assert other.target is None
    if step.budget is None:
        other = made(step, start, dense, statistics, sensitivity=None)
        assert equal(whole, other.form), f"{step!r} uses sensitivities all the same"
    if not step.weighs_tokens:
        other = made(step, start, dense, statistics, probability=None)
        assert equal(whole, other.form), f"{step!r} uses the probabilities of tokens all the same"


def permuted_rows_are_permuted(step: FormStep, start: Start) -> None:
    """No output is treated by where it stands. (Products of permuted rows round in another way, so that
    a few entries may fall on the other side of a threshold.)"""
    dense, statistics = weight(), moments(inputs())
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(14))
    told = context(step, dense)
    assert told.sensitivity is not None
    assert told.probability is not None
    moved = {"sensitivity": told.sensitivity[order], "probability": told.probability[order]}
    whole = made(step, start, dense, statistics).form.dense()
    permuted = made(step, start, dense[order], statistics, **moved).form.dense()
    strayed = float((permuted - whole[order]).norm() / whole.norm())
    assert strayed < 0.02, f"{step!r}: rows that change places come out different, by {strayed:.2g}"
