"""Low-rank factors against Eckart-Young, worked out in float64 with a square root of H."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpress.forms import Dense, LowRank
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.methods.svd import SvdOptions, closed_form_left, relative_error, svd
from tests.methods.data import inputs, statistics_of, weights

SHAPES = [(30, 40), (40, 30), (40, 12), (12, 40), (33, 33)]


def low_rank_plus_noise(m: int, n: int, seed: int, rank: int = 3, noise: float = 0.02) -> Tensor:
    return weights(m, rank, seed) @ weights(rank, n, seed + 1) + noise * weights(m, n, seed + 2)


def square_root(hessian: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(hessian)
    return vectors * values.clamp_min(0).sqrt()


def best(weight: Tensor, hessian: Tensor | None, rank: int) -> float:
    """The least relative error of any matrix of that rank (Eckart-Young in the whitened norm)."""
    whitened = weight if hessian is None else weight @ square_root(hessian)
    sigma = torch.linalg.svdvals(whitened)
    return float((sigma[rank:].square().sum() / sigma.square().sum()).sqrt())


def error_of(weight: Tensor, result: Rewritten, x: Tensor | None) -> float:
    """By the activations themselves."""
    delta = weight - result.form.dense(torch.float64)
    if x is None:
        return float(delta.norm() / weight.norm())
    return float((x @ delta.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [400, 9])  # fewer tokens than inputs: a singular Hessian
def test_whitened_factors_are_optimal(shape: tuple[int, int], tokens: int) -> None:
    m, n = shape
    weight, x = weights(m, n, 1), inputs(n, tokens, 2)
    statistics = statistics_of(x)
    for ratio in (0.2, 0.5, 0.9):
        result = svd(weight, statistics, SvdOptions(ratio=ratio, damping=0.0))
        rank = int(ratio * m * n / (m + n))
        assert isinstance(result.form, LowRank)
        assert result.form.rank == result.report["rank"] == rank
        optimum = best(weight, statistics.hessian, rank)
        assert error_of(weight, result, x) == pytest.approx(optimum, rel=1e-5, abs=2e-5)
        assert result.report["relative_error"] == pytest.approx(optimum, rel=1e-5, abs=2e-5)
        assert result.report["kept_variance"] == pytest.approx(1 - optimum**2, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_factors_are_optimal(shape: tuple[int, int]) -> None:
    weight = weights(*shape, 3)
    result = svd(weight, None, SvdOptions(ratio=0.6, whiten=False))
    assert error_of(weight, result, None) == pytest.approx(
        best(weight, None, result.report["rank"]), rel=1e-9
    )
    assert result.report["relative_error"] == pytest.approx(error_of(weight, result, None), rel=1e-9)


def test_damping_of_a_hundredth_costs_next_to_nothing() -> None:
    weight, x = weights(40, 30, 4), inputs(30, 500, 5)
    result = svd(weight, statistics_of(x), SvdOptions(ratio=0.5))
    optimum = best(weight, statistics_of(x).hessian, result.report["rank"])
    assert optimum <= error_of(weight, result, x) <= 1.01 * optimum
    assert result.report["damping"] == 1e-2


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(0.3, 0.999), st.booleans(), st.integers(0, 2**20))
def test_rank_by_retained_variance(shape: tuple[int, int], share: float, whiten: bool, seed: int) -> None:
    m, n = shape
    weight = low_rank_plus_noise(m, n, seed)
    x = inputs(n, 3 * n, seed)
    statistics = statistics_of(x)
    result = svd(weight, statistics, SvdOptions(keep_variance=share, whiten=whiten, damping=0.0))
    hessian = statistics.hessian if whiten else None
    brute = next(r for r in range(1, min(m, n) + 1) if 1 - best(weight, hessian, r) ** 2 >= share)
    assert result.report["rank"] == brute
    assert (result.report["reason"] is None) == (brute * (m + n) < m * n)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(0.01, 0.9), st.booleans(), st.integers(0, 2**20))
def test_rank_by_error(shape: tuple[int, int], error: float, known: bool, seed: int) -> None:
    m, n = shape
    weight = low_rank_plus_noise(m, n, seed)
    statistics = statistics_of(inputs(n, 3 * n, seed)) if known else None
    result = svd(weight, statistics, SvdOptions(max_error=error, whiten=known, damping=0.0))
    hessian = None if statistics is None else statistics.hessian
    brute = next(r for r in range(1, min(m, n) + 1) if best(weight, hessian, r) <= error)
    assert result.report["rank"] == brute
    if isinstance(result.form, LowRank):
        assert result.report["relative_error"] <= error * (1 + 1e-9)


def test_a_plain_svd_may_be_held_to_an_error_of_the_outputs() -> None:
    weight, x = low_rank_plus_noise(40, 30, 6), inputs(30, 200, 7)
    result = svd(weight, statistics_of(x), SvdOptions(max_error=0.05, whiten=False))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    ranks = [
        r
        for r in range(1, 31)
        if float((x @ (weight - u[:, :r] * s[:r] @ vh[:r]).T).norm()) <= 0.05 * float((x @ weight.T).norm())
    ]
    assert result.report["rank"] == ranks[0]


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"ratio": 0.5, "multiple_of": 4}, 8),  # floor(0.5 * 40 * 30 / 70) = 8
        ({"ratio": 0.6, "multiple_of": 4}, 8),  # 10, downwards
        ({"ratio": 0.1, "multiple_of": 4}, 1),  # never 0
        ({"max_error": 0.999, "multiple_of": 4}, 4),  # 1, upwards
        ({"keep_variance": 1.0, "multiple_of": 64}, 30),  # never above the full rank
    ],
)
def test_alignment(options: dict[str, Any], rank: int) -> None:
    result = svd(weights(40, 30, 8), None, SvdOptions(whiten=False, **options))
    assert result.report["rank"] == rank


def test_a_weight_stays_dense_where_factors_are_not_smaller() -> None:
    weight = weights(24, 24, 9)
    result = svd(weight, None, SvdOptions(keep_variance=0.999, whiten=False))
    assert isinstance(result.form, Dense)
    assert result.form.weight is weight
    rank = result.report["rank"]
    assert result.report["reason"] == (
        f"rank {rank} of 24 would take more than the dense weight (break-even 12)"
    )
    smaller = svd(weight, None, SvdOptions(ratio=11.5 / 12, whiten=False))
    assert smaller.report["reason"] is None
    assert smaller.form.num_bytes < Dense(weight).num_bytes
    equal = svd(weight, None, SvdOptions(ratio=1.0, whiten=False))  # rank 12: as many bytes, for nothing
    assert isinstance(equal.form, Dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_factors_have_the_dtype_and_alike_sizes(dtype: torch.dtype, size: float) -> None:
    weight = (low_rank_plus_noise(40, 30, 10) * size).to(dtype)
    x = inputs(30, 200, 11)
    form = svd(weight, statistics_of(x), SvdOptions(ratio=0.5)).form
    assert isinstance(form, LowRank)
    for factor in (form.left, form.right):
        assert isinstance(factor, Dense)
        assert factor.weight.dtype == dtype
        assert factor.weight.is_contiguous()
    left, right = form.left.dense().square().mean(), form.right.dense().square().mean()
    assert float(left) == pytest.approx(float(right), rel=0.05)


def test_components_are_shared_so_that_eight_bits_hurt_little() -> None:
    weight, x = weights(96, 80, 20) * torch.logspace(0, -2, 80), inputs(80, 400, 21)
    hessian = statistics_of(x).hessian
    form = svd(weight, statistics_of(x), SvdOptions(ratio=0.8)).form
    assert isinstance(form, LowRank)

    def damage(left: Tensor, right: Tensor) -> float:
        a, b = (round_to_nearest(factor, None, RoundOptions(8)).form for factor in (left, right))
        return relative_error(left @ right, a.dense(torch.float64) @ b.dense(torch.float64), hessian)

    left, right = form.left.dense(torch.float64), form.right.dense(torch.float64)
    basis = left / left.norm(dim=0)
    plain = right * left.norm(dim=0)[:, None]
    size = plain.norm(dim=1)
    assert damage(left, right) < damage(basis, plain)  # all in the right factor
    assert damage(left, right) < damage(basis * size, plain / size[:, None])  # all in the left one


def test_signs_and_bits_are_determined() -> None:
    weight, statistics = weights(20, 30, 12), statistics_of(inputs(30, 100, 13))
    for options in (SvdOptions(ratio=0.5), SvdOptions(ratio=0.5, whiten=False)):
        first, second = (svd(weight, statistics, options).form for _ in range(2))
        mirrored = svd(weight.flip(0), statistics, options).form
        assert isinstance(first, LowRank)
        assert isinstance(second, LowRank)
        assert isinstance(mirrored, LowRank)
        left = first.left.dense(torch.float64)
        assert torch.equal(left, second.left.dense(torch.float64))
        largest = left.gather(0, left.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())
        torch.testing.assert_close(mirrored.left.dense(torch.float64).flip(0), left)


@pytest.mark.parametrize("whiten", [True, False])
def test_zero_weights_and_dead_inputs(whiten: bool) -> None:
    x = inputs(30, 100, 14)
    x[:, 5] = 0
    options = SvdOptions(keep_variance=0.9, whiten=whiten)
    zero = svd(torch.zeros(40, 30), statistics_of(x), options)
    assert bool((zero.form.dense() == 0).all())
    assert zero.report["relative_error"] == 0.0
    nothing = statistics_of(torch.zeros(3, 30))
    assert bool(torch.isfinite(svd(weights(40, 30, 1), nothing, options).form.dense()).all())


def paper_rank(weight: Tensor, tau: float) -> int | None:
    """The reference implementation of SPQ, step by step; None where it leaves the layer alone."""
    m, n = weight.shape
    energy = torch.linalg.svdvals(weight).square()
    share = energy.cumsum(0) / energy.sum()
    k = int((share < tau).sum()) + 1
    stored = max(0.1, 1 - k / min(m, n))
    r = int((1 - stored) * min(m, n))
    return None if r / min(m, n) > 0.8 or r * (m + n) >= m * n else r


@pytest.mark.parametrize("shape", [(60, 60), (30, 90), (90, 30)])
@pytest.mark.parametrize("rank", [2, 13, 20, 27, 29])
def test_paper_mode(shape: tuple[int, int], rank: int) -> None:
    weight = low_rank_plus_noise(*shape, seed=rank, rank=rank, noise=1e-3)
    result = svd(weight, None, SvdOptions(keep_variance=0.96, whiten=False, paper=True))
    expected = paper_rank(weight, 0.96)
    if expected is None:
        assert isinstance(result.form, Dense)
        assert result.report["reason"]
    else:
        assert isinstance(result.form, LowRank)
        assert result.form.rank == expected
        left, right = result.form.left.dense(torch.float64), result.form.right.dense(torch.float64)
        sigma = torch.linalg.svdvals(weight)[:expected]
        torch.testing.assert_close(left.T @ left, torch.diag(sigma**2), atol=1e-8, rtol=1e-6)  # U S
        torch.testing.assert_close(right @ right.T, torch.eye(expected, dtype=torch.float64))  # V^T


def test_paper_mode_gives_up_above_four_fifths() -> None:
    result = svd(torch.eye(10).repeat(9, 1), None, SvdOptions(keep_variance=0.85, whiten=False, paper=True))
    assert isinstance(result.form, Dense)  # rank 9 of 10, though 9 * 100 would be no more than 90 * 10
    assert result.report["reason"] == "rank 9 of 10 is above 0.8 of the full rank"


def test_closed_form_left_is_least_squares() -> None:
    weight, x = weights(12, 16, 15), inputs(16, 300, 16)
    right = weights(5, 16, 17)
    left, used = closed_form_left(weight, right, statistics_of(x), damping=0.0)
    assert used == 0
    expected = torch.linalg.lstsq(x @ right.T, x @ weight.T).solution.T
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-6)
    duplicated = torch.cat([right, right[:1]])  # B H B^T is singular
    twin, _ = closed_form_left(weight, duplicated, statistics_of(x), damping=0.0)
    torch.testing.assert_close(twin @ duplicated, left @ right, rtol=1e-4, atol=1e-4)


def test_relative_error_by_activations() -> None:
    weight, other, x = weights(6, 8, 1), weights(6, 8, 2), inputs(8, 50, 3)
    expected = float((x @ (weight - other).T).norm() / (x @ weight.T).norm())
    assert relative_error(weight, other, statistics_of(x).hessian) == pytest.approx(expected)
    assert relative_error(weight, other, None) == pytest.approx(
        float((weight - other).norm() / weight.norm())
    )
    assert relative_error(torch.zeros(2, 2), torch.ones(2, 2), None) == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of keep_variance, ratio, max_error; got none"),
        ({"ratio": 0.5, "max_error": 0.1}, "got ratio, max_error"),
        ({"keep_variance": 1.5}, "keep_variance lies in"),
        ({"ratio": 0.0}, "ratio lies in"),
        ({"max_error": -0.1}, "max_error is not negative"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of is at least 1"),
        ({"ratio": 0.5, "damping": -1.0}, "damping at least 0"),
        ({"keep_variance": 0.9, "paper": True}, "whiten=False"),
        ({"ratio": 0.9, "whiten": False, "paper": True}, "goes with keep_variance"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SvdOptions(**options)


def test_what_cannot_be_factored_is_refused() -> None:
    weight = weights(4, 6, 0)
    with pytest.raises(ValueError, match="needs the Hessian"):
        svd(weight, None, SvdOptions(ratio=0.5))
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        svd(weight, None, SvdOptions(ratio=0.5, whiten=False))
