"""What the steps make of one weight: forms, and statistics that follow them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.forms import Dense, EntropyCoded, Form, LowRank, Pivoted, Quantized, Sparse, Sum
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.result import Rewritten
from lmpress.recipes import (
    Correct,
    EntropyQuantize,
    LeafContext,
    Pivot,
    Quantize,
    SparseLowRank,
    Sparsify,
    Svd,
)
from lmpress.recipes.steps.base import LeafStep
from lmpress.statistics import InputStatistics
from lmpress.statistics.inputs import StatisticsAccumulator

GENERATOR = torch.Generator().manual_seed(7)
WEIGHT = torch.randn(24, 32, generator=GENERATOR)
MIXED = torch.eye(32) + 0.2 * torch.randn(32, 32, generator=GENERATOR)
INPUTS = torch.randn(400, 32, generator=GENERATOR) @ MIXED * torch.linspace(0.1, 2.0, 32)
CONTEXT = LeafContext(seed=3, weight=WEIGHT)


def statistics() -> InputStatistics:
    accumulator = StatisticsAccumulator(32, hessian=True)
    accumulator.update(INPUTS)
    return accumulator.result()


def strayed(form: Form, weight: torch.Tensor = WEIGHT) -> float:
    """The relative squared error of the outputs, by running them."""
    return float(((form.dense() - weight) @ INPUTS.T).square().sum() / (weight @ INPUTS.T).square().sum())


def after(step: Any, form: Form | None = None) -> Form:
    made: Form = step.rewrite(Dense(WEIGHT) if form is None else form, statistics(), CONTEXT).form
    return made


def test_each_method_of_sparsify_keeps_what_it_is_told() -> None:
    errors = {}
    for method in ("sparsegpt", "alps", "wanda", "magnitude"):
        form = after(Sparsify(method=method, sparsity=0.5))
        assert isinstance(form, Sparse)
        assert form.density == 0.5
        errors[method] = strayed(form)
    assert max(errors["alps"], errors["sparsegpt"]) < errors["wanda"] < errors["magnitude"]


def test_the_joint_pass_and_its_two_cases() -> None:
    survivors = after(Sparsify(pattern="2:4", bits=4))
    assert isinstance(survivors, Sparse)
    assert isinstance(survivors.values, Quantized)
    assert survivors.values.shape == (24, 16)
    everything = after(Sparsify(pattern="2:4", bits=4, case="all"))
    assert isinstance(everything, Quantized)
    assert int((everything.dense() != 0).sum()) <= 24 * 16


def test_quantize_keeps_the_pattern_of_what_is_sparse() -> None:
    sparse = after(Sparsify(method="wanda", pattern="2:4"))
    assert isinstance(sparse, Sparse)
    form = after(Quantize(bits=4, solver="gptq"), sparse)
    assert isinstance(form, Sparse)
    assert isinstance(form.values, Quantized)
    assert torch.equal(form.pattern.packed, sparse.pattern.packed)
    nearest = after(Quantize(bits=4), Dense(sparse.dense())).dense()
    assert strayed(form, sparse.dense()) < strayed(Dense(nearest), sparse.dense())
    with pytest.raises(ValueError, match="solver: gptq"):
        after(Quantize(bits=4), sparse)
    with pytest.raises(ValueError, match="already"):
        after(Quantize(bits=4, solver="gptq"), form)


def test_correct_comes_back_to_the_weight_that_the_module_began_with() -> None:
    form = after(Quantize(bits=2), after(Svd(ratio=0.8)))
    corrected = after(Correct(rank=6), form)
    assert isinstance(corrected, Sum)
    assert corrected.terms[0] is form
    assert strayed(corrected) < 0.7 * strayed(form)
    # Eckart-Young in the metric of the inputs: no correction of this rank does better
    root = torch.linalg.cholesky(statistics().require_hessian().double())
    tail = torch.linalg.svdvals((WEIGHT - form.dense()).double() @ root)[6:].square().sum()
    best = float(tail / (WEIGHT.double() @ root).square().sum())
    assert best <= strayed(corrected) < 1.01 * best
    coded = after(Correct(rank=6, bits=8), form)
    assert all(isinstance(leaf, Quantized) for leaf in (coded.terms[1].left, coded.terms[1].right))
    with pytest.raises(ValueError, match="began with"):
        Correct().rewrite(form, statistics(), LeafContext())


def test_pivot_is_lossless_and_leaves_alone_what_it_cannot_do() -> None:
    factors = after(Svd(ratio=0.8))
    form = after(Pivot(), factors)
    assert isinstance(form, Pivoted)
    assert form.num_bytes < factors.num_bytes
    torch.testing.assert_close(form.dense(), factors.dense(), rtol=1e-4, atol=1e-4)
    told = Pivot().rewrite(Dense(WEIGHT), None, CONTEXT)
    assert isinstance(told.form, Dense)
    assert "no factors" in told.report["reason"]
    strict = Pivot(largest_bits_lost=0.0).rewrite(factors, None, CONTEXT)
    assert strict.form is factors
    assert "lose" in strict.report["reason"]
    assert isinstance(after(Pivot(largest_bits_lost=None), factors), Pivoted)
    with pytest.raises(ValueError, match="put pivot earlier"):
        after(Pivot(), after(Quantize(), factors))


def test_pivot_takes_the_low_rank_term_of_a_sum() -> None:
    both = after(SparseLowRank(sparsity=0.5, kappa=0.5, iterations=20))
    form = after(Pivot(), both)
    assert isinstance(form, Sum)
    assert [type(term) for term in form.terms] == [Sparse, Pivoted]
    torch.testing.assert_close(form.dense(), both.dense(), rtol=1e-4, atol=1e-4)


def test_the_coefficients_are_fitted_to_what_the_basis_gives() -> None:
    pivoted = after(Pivot(), after(Svd(ratio=0.8)))
    assert isinstance(pivoted, Pivoted)
    form = after(Quantize(bits=4, solver="gptq"), pivoted)
    assert isinstance(form, Pivoted)
    behind = statistics().through(form.basis.dense())
    options = GptqOptions(bits=4, granularity="channel", damping=0.03, clip=False)
    alone = gptq(pivoted.coefficients.dense(), behind, options).form
    assert torch.equal(form.coefficients.dense(), alone.dense())


def test_sparse_low_rank_spends_its_budget_and_takes_its_seed() -> None:
    step = SparseLowRank(sparsity=0.5, kappa=0.4, iterations=30)
    form = after(step)
    assert isinstance(form, Sum)
    assert [type(term) for term in form.terms] == [Sparse, LowRank]
    kept = sum(tensor.numel() for name, tensor in form.tensors().items() if name != "term0_pattern")
    assert kept <= 0.5 * WEIGHT.numel() < kept + sum(WEIGHT.shape)
    assert torch.equal(form.dense(), after(step).dense())
    searched = SparseLowRank(sparsity=0.5, kappa=None, iterations=30)
    assert strayed(after(searched)) < strayed(form)  # this weight has little of low rank


@pytest.mark.parametrize("method", ["asvd", "svd_llm"])
def test_the_other_factorizations_keep_the_share(method: str) -> None:
    form = after(Svd(method=method, ratio=0.8))
    assert isinstance(form, LowRank)
    assert form.rank == int(0.8 * 24 * 32 / (24 + 32))
    assert strayed(form) >= 0.99 * strayed(after(Svd(ratio=0.8)))


def expected_square(sensitivity: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
    """E[g_k^2] at hidden values that reach the outputs by `through`, by autograd on each output alone.

    Gradients of the outputs that are independent, of mean square s_i: the squares of what each gives add up.
    """
    hidden = torch.zeros(through.shape[1], dtype=torch.float64, requires_grad=True)
    total = torch.zeros_like(hidden)
    for i, s in enumerate(sensitivity.double()):
        loss = s.sqrt() * (through.double() @ hidden)[i]
        (gradient,) = torch.autograd.grad(loss, hidden)
        total += gradient.square()
    return total.detach().float()


class Spy(LeafStep):
    """Leaves every leaf as it is, and notes what it came with."""

    kind = "spy"

    def rewrite_leaf(self, leaf: Form, statistics: Any, context: LeafContext) -> Any:
        SEEN.append((leaf, statistics, context))
        return Rewritten(leaf, {})


SEEN: list[tuple[Form, Any, LeafContext]] = []


def seen_by_leaves(form: Form, context: LeafContext) -> list[LeafContext]:
    SEEN.clear()
    Spy().rewrite(form, statistics(), context)
    return [context for _, _, context in SEEN]


def test_sensitivity_goes_behind_a_factor() -> None:
    left, sensitivity = torch.randn(24, 5, generator=GENERATOR), torch.rand(24, generator=GENERATOR)
    context = LeafContext(seed=4, share=0.1, sensitivity=sensitivity).behind(left)
    assert (context.seed, context.share) == (4, 0.1)
    assert context.sensitivity is not None
    torch.testing.assert_close(context.sensitivity, expected_square(sensitivity, left))
    assert LeafContext(share=3).behind(left) == LeafContext(share=3)


def test_sensitivity_of_pivoted_rows() -> None:
    form = after(Pivot(), after(Svd(ratio=0.8)))
    assert isinstance(form, Pivoted)
    sensitivity = torch.rand(24, generator=GENERATOR)
    inner, outer = seen_by_leaves(form, LeafContext(sensitivity=sensitivity))
    # every output of the module in terms of the basis outputs: dense() = through @ basis
    through = form.dense().double() @ torch.linalg.pinv(form.basis.dense().double())
    expected = expected_square(sensitivity, through)
    assert inner.sensitivity is not None
    assert outer.sensitivity is not None
    torch.testing.assert_close(inner.sensitivity, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(outer.sensitivity, sensitivity[~form.pivots()])
    assert outer.sensitivity.shape[0] == form.coefficients.shape[0]
    plain = LeafContext(share=4)
    assert seen_by_leaves(form, plain) == [plain, plain]


def test_every_leaf_gets_a_sensitivity_an_output() -> None:
    sensitivity = torch.rand(24, generator=GENERATOR)
    factors = after(Svd(ratio=0.8))
    for form in (factors, after(Pivot(), factors), Sum((Dense(WEIGHT), factors))):
        assert len(seen_by_leaves(form, LeafContext(sensitivity=sensitivity))) >= 2
        for leaf, _, context in SEEN:
            assert context.sensitivity is not None
            assert context.sensitivity.shape == (leaf.shape[0],)


def test_what_strays_is_told_to_the_leaves_that_read_the_input_of_the_module() -> None:
    """Behind a factor nobody knows it; statistics there are those of what the factor gives."""
    cross = torch.rand(32, 32, generator=GENERATOR)
    factors = after(Svd(ratio=0.8))
    assert isinstance(factors, LowRank)
    terms = Sum((Dense(WEIGHT), factors))
    right, left = factors.right, factors.left
    told = [context.cross for context in seen_by_leaves(terms, LeafContext(cross=cross))]
    assert [leaf for leaf, _, _ in SEEN] == [terms.terms[0], right, left]
    assert told[0] is cross
    assert told[1] is cross
    assert told[2] is None
    inner = INPUTS @ right.dense().T
    known = SEEN[2][1].require_hessian()
    torch.testing.assert_close(known, inner.T @ inner / len(inner), rtol=1e-4, atol=1e-4)


def test_entropy_quantize_takes_the_common_step_or_bits_of_its_own() -> None:
    step = EntropyQuantize(bits=4.0)
    with pytest.raises(ValueError, match="needs the Hessian"):
        step.rewrite(Dense(WEIGHT), None, LeafContext(share=0.05))
    form = step.rewrite(Dense(WEIGHT), statistics(), LeafContext(share=0.05)).form
    assert isinstance(form, EntropyCoded)
    finer = step.rewrite(Dense(WEIGHT), statistics(), LeafContext(share=0.01)).form
    assert strayed(finer) < strayed(form) / 10
    for known in (None, statistics()):
        table = step.rewrite(Dense(WEIGHT), known, LeafContext()).form
        assert isinstance(table, EntropyCoded)
        assert table.bits_per_weight <= 4.0
    with pytest.raises(ValueError, match="takes dense weights"):
        step.rewrite(after(Quantize()), statistics(), LeafContext(share=0.05))


def test_quantize_takes_the_bits_of_its_share() -> None:
    step = Quantize(bits=4.25, allocation="mixed")
    form = step.rewrite(Dense(WEIGHT), statistics(), LeafContext(share=6)).form
    assert isinstance(form, Quantized)
    assert form.bits == 6
