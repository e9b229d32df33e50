"""Steps that put weights on a grid: what they make of one weight, and what they cannot follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.forms import Dense, EntropyCoded, Quantized, Sparse
from lmpress.recipes import EntropyQuantize, LeafContext, Quantize, Sparsify
from tests.recipes.steps.data import WEIGHT, after, refused, statistics, strayed


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"sparsify": {"sparsity": 0.5}}, {"quantize": {"bits": 4}}], ["solver: gptq", "bits"]),
        (
            [
                {"sparsify": {"sparsity": 0.5}},
                {"quantize": {"solver": "gptq", "symmetric": False}},
            ],
            ["after sparsify", "symmetric grid"],
        ),
        (
            [{"sparsify": {"sparsity": 0.5, "bits": 4}}, {"quantize": {"solver": "gptq"}}],
            ["quantized these modules already"],
        ),
        (
            [{"sparsify": {"sparsity": 0.5}}, {"entropy_quantize": {}}],
            ["stores zeros at what they are worth"],
        ),
        ([{"sparse_low_rank": {"sparsity": 0.5}}, {"entropy_quantize": {}}], ["leave sparse_low_rank out"]),
        (
            [{"svd": {"ratio": 0.5}}, {"correct": {"bits": 8}}, {"entropy_quantize": {}}],
            ["correct with bits has quantized"],
        ),
    ],
)
def test_what_cannot_follow(steps: list[dict[str, Any]], words: list[str]) -> None:
    refused(steps, words)


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
