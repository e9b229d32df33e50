"""Steps that factor: what they make of one weight, and what they cannot follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.forms import Dense, LowRank, Pivoted, Quantized, Sparse, Sum
from lmpress.recipes import Correct, LeafContext, Pivot, Quantize, SparseLowRank, Svd
from tests.recipes.steps.data import CONTEXT, WEIGHT, after, refused, statistics, strayed


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"quantize": {}}, {"svd": {"ratio": 0.5}}], ["svd comes before quantize"]),
        ([{"correct": {}}], ["correct", "there is none"]),
        ([{"pivot": {}}], ["put an svd"]),
        ([{"svd": {"ratio": 0.5}}, {"quantize": {}}, {"pivot": {}}], ["pivot comes before"]),
        ([{"svd": {"ratio": 0.5}}, {"sparsify": {"sparsity": 0.5}}, {"pivot": {}}], ["right after"]),
        ([{"sparsify": {"sparsity": 0.5}}, {"svd": {"ratio": 0.5}}], ["svd comes before sparsify"]),
        (
            [
                {"svd": {"ratio": 0.5, "targets": "linears"}},
                {"entropy_quantize": {}},
                {"pivot": {}},
            ],
            ["pivot comes before", "entropy_quantize"],
        ),
        ([{"entropy_quantize": {}}, {"svd": {"ratio": 0.5}}], ["svd comes before entropy_quantize"]),
    ],
)
def test_what_cannot_follow(steps: list[dict[str, Any]], words: list[str]) -> None:
    refused(steps, words)


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


@pytest.mark.parametrize("method", ["asvd", "svd_llm"])
def test_the_other_factorizations_keep_the_share(method: str) -> None:
    form = after(Svd(method=method, ratio=0.8))
    assert isinstance(form, LowRank)
    assert form.rank == int(0.8 * 24 * 32 / (24 + 32))
    assert strayed(form) >= 0.99 * strayed(after(Svd(ratio=0.8)))
