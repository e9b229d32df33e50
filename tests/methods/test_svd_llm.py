"""SVD-LLM against Eckart-Young and least squares, and ranks against exhaustive search."""

from itertools import product

import pytest
import torch

from lmpress.forms import LowRank
from lmpress.methods.svd_llm import (
    SvdLlmOptions,
    factor_cost,
    ranks_for_budget,
    row_weights,
    spectrum,
    svd_llm,
)
from tests.methods.layers import layer, output_error, statistics_of
from tests.methods.test_subspace import whitened_tail


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_truncation_is_eckart_young_in_the_whitened_norm(shape: tuple[int, int]) -> None:
    weight, _, statistics = layer(*shape)
    hessian = statistics.require_hessian().double()
    form = svd_llm(weight.double(), statistics, SvdLlmOptions(rank=5, damping=0.0)).form
    rest = weight.double() - form.dense(torch.float64)
    assert float((rest @ hessian * rest).sum()) == pytest.approx(whitened_tail(weight, hessian, 5), rel=1e-4)


def test_rank_of_the_ratio() -> None:
    weight, x, statistics = layer(24, 40)
    result = svd_llm(weight, statistics, SvdLlmOptions(ratio=0.7))
    assert isinstance(result.form, LowRank)
    assert result.form.rank == result.report["rank"] == int(0.7 * 24 * 40 / 64)
    error = output_error(weight, result.form.dense(), x)
    assert result.report["relative_error"] ** 2 == pytest.approx(error, rel=1e-3)


def test_the_update_is_least_squares_towards_the_original_output() -> None:
    weight, x, statistics = layer(12, 20)
    original = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) @ torch.diag(
        x.std(0)
    )
    cross = (original - x).double().T @ x.double() / len(x)
    options = SvdLlmOptions(rank=5, damping=0.0, update=1.0)
    plain = svd_llm(weight.double(), statistics, options).form
    updated = svd_llm(weight.double(), statistics, options, cross=cross).form
    assert isinstance(updated, LowRank)
    wanted = original.double() @ weight.double().T
    inner = x.double() @ updated.right.dense(torch.float64).T
    expected = torch.linalg.lstsq(inner, wanted).solution.T
    torch.testing.assert_close(updated.left.dense(torch.float64), expected, rtol=1e-4, atol=1e-4)

    def error(matrix: torch.Tensor) -> float:
        return float((x.double() @ matrix.T - wanted).square().sum())

    assert error(updated.dense(torch.float64)) < error(plain.dense(torch.float64))


def test_row_weights_shift_the_error() -> None:
    weight, x, statistics = layer(16, 24)
    weight[:8] *= 5  # the loud rows would take all the rank
    weights = torch.ones(16)
    weights[8:] = 10
    options = SvdLlmOptions(rank=6)
    plain = svd_llm(weight, statistics, options).form.dense()
    shifted = svd_llm(weight, statistics, options, row_weights=weights).form.dense()
    assert output_error(weight[8:], shifted[8:], x) < 0.7 * output_error(weight[8:], plain[8:], x)
    assert output_error(weight[:8], shifted[:8], x) > output_error(weight[:8], plain[:8], x)


def test_the_spectrum_tells_the_loss_of_every_rank() -> None:
    weight, _, statistics = layer(10, 14)
    hessian = statistics.require_hessian().double()
    values = spectrum(weight, hessian, damping=0.0)
    for rank in (0, 3, 9):
        assert float(values[rank:].sum()) == pytest.approx(whitened_tail(weight, hessian, rank), rel=1e-4)


SHAPES = [(8, 12), (10, 6), (9, 9)]


def spectra() -> list[torch.Tensor]:
    result = []
    for i, shape in enumerate(SHAPES):
        weight, x, _ = layer(*shape, seed=i)
        result.append(spectrum(weight * (i + 1), statistics_of(x).require_hessian()))
    return result


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 1.0])
def test_one_relative_error_for_all(keep: float, pivoted: bool) -> None:
    energies = spectra()
    ranks = ranks_for_budget(energies, SHAPES, keep, pivoted=pivoted)
    costs = [factor_cost(s, min(s) if r is None else r, pivoted) for s, r in zip(SHAPES, ranks, strict=True)]
    budget = keep * sum(m * n for m, n in SHAPES)
    assert sum(costs) <= budget
    # brute force: the least largest relative error that the budget allows

    def worst(choice: tuple[int, ...]) -> float:
        return max(float(e[r:].sum() / e.sum()) for e, r in zip(energies, choice, strict=True))

    best = min(
        worst(choice)
        for choice in product(*(range(1, min(s) + 1) for s in SHAPES))
        if sum(factor_cost(s, r, pivoted) for s, r in zip(SHAPES, choice, strict=True)) <= budget
    )
    found = worst(tuple(min(s) if r is None else r for s, r in zip(SHAPES, ranks, strict=True)))
    assert found == pytest.approx(best, abs=1e-9)


def test_sensitive_weights_get_more() -> None:
    energies = spectra()
    low = ranks_for_budget(energies, SHAPES, 0.5, sensitivities=[1e-3, 1.0, 1.0], pivoted=True)
    high = ranks_for_budget(energies, SHAPES, 0.5, sensitivities=[1e3, 1.0, 1.0], pivoted=True)
    assert (low[0] or 8) < (high[0] or 8)
    assert sum(
        factor_cost(s, min(s) if r is None else r, True) for s, r in zip(SHAPES, high, strict=True)
    ) <= 0.5 * sum(m * n for m, n in SHAPES)


def test_dense_where_factors_would_be_larger() -> None:
    flat = [torch.ones(8), torch.tensor([1.0] + [1e-9] * 7)]
    assert ranks_for_budget(flat, [(8, 8), (8, 8)], 0.65) == [None, 1]
    assert ranks_for_budget([], [], 0.5) == []


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="share to keep"):
        ranks_for_budget(spectra(), SHAPES, 0.0)
    with pytest.raises(ValueError, match="one spectrum"):
        ranks_for_budget(spectra(), SHAPES[:2], 0.5)
    with pytest.raises(ValueError, match="ratio"):
        SvdLlmOptions(ratio=1.5)


def test_rows_weigh_the_root_of_their_sensitivity() -> None:
    """An output that no gradient was seen for counts as a ten-thousandth of the mean, and not as nothing."""
    found = row_weights(torch.tensor([4.0, 0.0, 2.0]))
    torch.testing.assert_close(found.square(), torch.tensor([4.0, 2e-4, 2.0]))
    assert row_weights(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
