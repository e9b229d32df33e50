"""Steps that make weights sparse: what they make of one weight, and what they cannot follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.forms import LowRank, Quantized, Sparse, Sum
from lmpress.recipes import SparseLowRank, Sparsify
from tests.recipes.steps.data import WEIGHT, after, refused, strayed


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"quantize": {}}, {"sparsify": {"sparsity": 0.5}}], ["sparsify comes before quantize"]),
        (
            [{"svd": {"ratio": 0.5, "targets": "mlp"}}, {"sparse_low_rank": {"sparsity": 0.5}}],
            ["sparse_low_rank comes before svd"],
        ),
        (
            [{"entropy_quantize": {}}, {"sparsify": {"sparsity": 0.5}}],
            ["sparsify comes before entropy_quantize"],
        ),
    ],
)
def test_what_cannot_follow(steps: list[dict[str, Any]], words: list[str]) -> None:
    refused(steps, words)


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
