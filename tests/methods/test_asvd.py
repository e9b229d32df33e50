"""ASVD against the formula in float64."""

from dataclasses import replace

import pytest
import torch

from lmpress.forms import LowRank
from lmpress.methods.asvd import AsvdOptions, asvd
from lmpress.methods.svd_llm import SvdLlmOptions, svd_llm
from tests.methods.layers import layer, output_error, statistics_of


def test_the_formula() -> None:
    weight, x, statistics = layer(12, 20)
    result = asvd(weight, statistics, AsvdOptions(ratio=0.6))
    assert isinstance(result.form, LowRank)
    assert result.report["rank"] == result.form.rank == int(0.6 * 12 * 20 / 32)
    scale = x.double().abs().mean(0).sqrt()
    U, S, Vt = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    expected = U[:, :4] * S[:4] @ Vt[:4] / scale
    torch.testing.assert_close(result.form.dense().double(), expected, rtol=1e-3, atol=1e-4)
    assert result.report["relative_error"] ** 2 == pytest.approx(
        output_error(weight, result.form.dense(), x), rel=1e-3
    )


def test_between_plain_and_whitened_svd() -> None:
    weight, x, statistics = layer(48, 64)
    plain = asvd(weight, statistics, AsvdOptions(alpha=0.0)).form
    scaled = asvd(weight, statistics, AsvdOptions()).form
    whitened = svd_llm(weight, statistics, SvdLlmOptions()).form
    errors = [output_error(weight, form.dense(), x) for form in (plain, scaled, whitened)]
    assert errors == sorted(errors, reverse=True)


def test_alignment_and_refusals() -> None:
    weight, _, statistics = layer(48, 64)
    assert asvd(weight, statistics, AsvdOptions(ratio=0.8, multiple_of=8)).report["rank"] == 16
    with pytest.raises(ValueError, match="ratio"):
        AsvdOptions(ratio=0)
    with pytest.raises(ValueError, match="statistics of"):
        asvd(weight[:, :8], statistics, AsvdOptions())


def test_sizes_that_are_unknown_or_nothing() -> None:
    """Behind a factor the root mean square stands in; an input that is never active still has a column."""
    weight, x, _ = layer(12, 20)
    x[:, 4] = 0
    statistics = replace(statistics_of(x), abs_mean=None)
    form = asvd(weight, statistics, AsvdOptions(ratio=0.6, alpha=1.0)).form
    scale = x.double().square().mean(0).sqrt() + 1e-6
    U, S, Vt = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    live = [
        j for j in range(20) if j != 4
    ]  # what the dead one's column holds is float32's rounding, times 1e6
    expected = U[:, :4] * S[:4] @ Vt[:4] / scale
    torch.testing.assert_close(form.dense().double()[:, live], expected[:, live], rtol=1e-3, atol=1e-4)
    assert bool(torch.isfinite(form.dense()).all())


@pytest.mark.parametrize(
    ("ratio", "multiple_of", "rank"), [(0.01, 1, 1), (0.1, 8, 1), (1.0, 1, 7), (1.0, 3, 6)]
)
def test_ranks_are_at_least_one(ratio: float, multiple_of: int, rank: int) -> None:
    weight, _, statistics = layer(12, 20)
    assert asvd(weight, statistics, AsvdOptions(ratio, 0.5, multiple_of)).report["rank"] == rank
