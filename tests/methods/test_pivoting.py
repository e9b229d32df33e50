"""Pivoted factors against the product, in float64; the parameters counted."""

import pytest
import torch

from lmpress.forms import Dense, LowRank, Pivoted
from lmpress.methods.pivoting import PivotOptions, pivot, pivot_rows, pivoted_rank


def factors(m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, r, generator=generator, dtype=torch.float64)
    left = left * torch.logspace(0, -4, r, dtype=torch.float64)  # as after an SVD, and worse
    right = torch.randn(r, n, generator=generator, dtype=torch.float64)
    return LowRank(Dense(left.to(dtype)), Dense(right.to(dtype)))


@pytest.mark.parametrize("shape", [(30, 20, 8), (20, 30, 20), (50, 40, 1), (64, 64, 40)])
def test_lossless_with_fewer_parameters(shape: tuple[int, int, int]) -> None:
    m, n, r = shape
    low_rank = factors(m, n, r)
    result = pivot(low_rank)
    assert isinstance(result.form, Pivoted)
    exact = low_rank.dense(torch.float64)
    torch.testing.assert_close(result.form.dense(torch.float64), exact, rtol=1e-9, atol=1e-9)
    tensors = result.form.tensors()
    numbers = sum(t.numel() for name, t in tensors.items() if name != "index")
    assert numbers == r * (m + n) - r * r
    assert tensors["index"].numel() == -(-m // 8)
    assert result.report["error"] < 1e-10
    assert result.report["reason"] is None


@pytest.mark.parametrize("seed", range(5))
def test_coefficients_are_bounded_and_reproduce_the_rows(seed: int) -> None:
    left = factors(60, 5, 20, seed).left.dense(torch.float64)
    chosen, coefficients, _ = pivot_rows(left, 1.05)
    assert int(chosen.sum()) == 20
    assert coefficients is not None
    assert float(coefficients.abs().max()) <= 1.05 + 1e-6
    torch.testing.assert_close(coefficients @ left[chosen], left[~chosen], rtol=1e-8, atol=1e-12)


def test_swaps_are_needed_and_end() -> None:
    # partial pivoting grows on this matrix: the coefficients of plain LU reach 2^(r-1)
    r = 12
    wilkinson = torch.eye(r, dtype=torch.float64) - torch.ones(r, r, dtype=torch.float64).tril(-1)
    left = torch.cat([wilkinson, -torch.ones(1, r, dtype=torch.float64)])
    _, grown, none = pivot_rows(left, 1e9)
    assert none == 0
    assert grown is not None
    assert float(grown.abs().max()) == pytest.approx(2 ** (r - 1))
    chosen, coefficients, swaps = pivot_rows(left, 1.1)
    assert swaps > 0
    assert coefficients is not None
    assert float(coefficients.abs().max()) <= 1.1
    torch.testing.assert_close(coefficients @ left[chosen], left[~chosen])


def test_dtypes_and_the_error_of_storing() -> None:
    result = pivot(factors(40, 30, 6, dtype=torch.float16))
    assert isinstance(result.form, Pivoted)
    assert result.form.tensors()["basis_weight"].dtype == torch.float16
    assert 1e-6 < result.report["error"] < 2e-3


def test_refused_where_it_is_not_safe() -> None:
    left = torch.randn(20, 4, dtype=torch.float64)
    left[:, 3] = left[:, 0] + left[:, 1]
    low_rank = LowRank(Dense(left), Dense(torch.randn(4, 10, dtype=torch.float64)))
    result = pivot(low_rank)
    assert result.form is low_rank
    assert "full rank" in result.report["reason"]
    wide = LowRank(Dense(torch.randn(3, 5)), Dense(torch.randn(5, 9)))
    assert pivot(wide).form is wide
    strict = pivot(factors(40, 30, 6, dtype=torch.float16), PivotOptions(largest_error=1e-9))
    assert "off by" in strict.report["reason"]


def test_bits_lost_is_what_noise_in_the_basis_shows() -> None:
    low_rank = factors(200, 30, 60)
    result = pivot(low_rank)
    form = result.form
    assert isinstance(form, Pivoted)
    noise = torch.randn(60, 3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = Pivoted(Dense(noise), form.coefficients, form.index).dense(torch.float64)
    gain = float(noisy.square().mean())  # noise of variance one in each stored entry
    assert result.report["bits_lost"] == pytest.approx(float(torch.tensor(gain).log2() / 2), abs=0.02)
    assert result.report["quantization_safe"] == (result.report["bits_lost"] <= 2)


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96)])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 1.0])
def test_rank_for_a_budget(shape: tuple[int, int], keep: float) -> None:
    m, n = shape
    rank = pivoted_rank(shape, keep)
    best = max(r for r in range(min(shape) + 1) if r * (m + n) - r * r <= keep * m * n + 1e-6)
    assert rank == best


@pytest.mark.parametrize(("safe_bits", "safe"), [(0.0, False), (9.0, True)])
def test_what_loses_more_bits_than_allowed_is_called_unsafe(safe_bits: float, safe: bool) -> None:
    report = pivot(factors(60, 30, 20), PivotOptions(safe_bits=safe_bits)).report
    assert 0 < report["bits_lost"] < 9
    assert report["quantization_safe"] is safe
