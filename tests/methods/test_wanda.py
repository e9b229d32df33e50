"""Wanda against its definition, entry by entry."""

import pytest
import torch

from lmpress.forms import Sparse
from lmpress.methods.wanda import WandaOptions, wanda
from tests.methods.layers import layer, output_error


def test_each_row_keeps_its_best_scores() -> None:
    weight, x, statistics = layer(5, 12)
    result = wanda(weight, statistics, WandaOptions(sparsity=0.25))
    norms = x.double().square().mean(0).sqrt().tolist()
    dense = result.form.dense()
    for i in range(5):
        scores = [abs(float(weight[i, j])) * norms[j] for j in range(12)]
        best = sorted(range(12), key=lambda j: -scores[j])[:9]
        for j in range(12):
            assert dense[i, j] == (weight[i, j] if j in best else 0)
    assert result.report["output_error"] == pytest.approx(output_error(weight, dense, x), rel=1e-4)
    assert result.report["density"] == 0.75


def test_pattern_and_dtype() -> None:
    weight, _, statistics = layer(4, 16)
    form = wanda(weight.bfloat16(), statistics, WandaOptions(pattern="2:4")).form
    assert isinstance(form, Sparse)
    assert form.pattern.name == "2:4"
    assert form.dense(torch.bfloat16).view(4, 4, 4).count_nonzero(2).eq(2).all()
    assert form.formula == "Sparse(bf16; 2:4)"


def test_magnitude_needs_no_statistics() -> None:
    weight, _, _ = layer(4, 16)
    dense = wanda(weight, None, WandaOptions(score="magnitude", per_row=False)).form.dense()
    threshold = weight.abs().flatten().sort().values[31]
    assert torch.equal(dense, torch.where(weight.abs() > threshold, weight, 0))


def test_what_is_refused() -> None:
    weight, _, statistics = layer(4, 16)
    with pytest.raises(ValueError, match="second moments"):
        wanda(weight, None, WandaOptions())
    with pytest.raises(ValueError, match="statistics of 16"):
        wanda(weight[:, :8], statistics, WandaOptions())
    with pytest.raises(ValueError, match="the score"):
        WandaOptions(score="luck")
