"""Streamed moments against one pass in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpress.statistics import InputStatistics, StatisticsAccumulator, counts_of_rows


def gather(
    batches: list[Tensor], masks: list[Tensor | None] | None = None, hessian: bool = True
) -> InputStatistics:
    accumulator = StatisticsAccumulator(batches[0].shape[-1], hessian=hessian)
    for batch, mask in zip(batches, masks or [None] * len(batches), strict=True):
        accumulator.update(batch, mask)
    return accumulator.result()


def check(statistics: InputStatistics, tokens: Tensor) -> None:
    """Against the moments of `tokens` (N, n) by their definitions."""
    x = tokens.double()
    count = x.shape[0]
    assert statistics.count == count
    assert statistics.features == x.shape[1]
    scale = float(x.abs().max())
    for name, expected, unit in (
        ("mean", x.sum(0) / count, scale),
        ("second_moment", (x**2).sum(0) / count, scale**2),
        ("abs_mean", x.abs().sum(0) / count, scale),
    ):
        actual = getattr(statistics, name)
        assert actual.dtype == torch.float32
        assert float((actual.double() - expected).abs().max()) <= 1e-6 * unit
    hessian = statistics.require_hessian()
    expected = torch.einsum("ti,tj->ij", x, x) / count
    assert float((hessian.double() - expected).abs().max()) <= 3e-5 * scale**2  # summed in float32
    assert torch.equal(hessian, hessian.T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31), st.booleans())
def test_streamed_is_one_shot_and_padding_never_counts(
    features: int, batches: int, length: int, seed: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(2, length, features, generator=generator) * 10 + 3 for _ in range(batches)]
    masks = [torch.rand(2, length, generator=generator) < (0.5 if masked else 2) for _ in range(batches)]
    masks[0][0, 0] = True
    tokens = torch.cat([x[mask] for x, mask in zip(xs, masks, strict=True)])
    dirty = [x.masked_fill(~mask[..., None], 1e30) for x, mask in zip(xs, masks, strict=True)]
    check(gather(dirty, [mask.long() for mask in masks]), tokens)


def test_padding_may_even_be_nan() -> None:
    x = torch.tensor([[[1.0, 2.0], [float("nan"), float("inf")]]])
    check(gather([x], [torch.tensor([[1, 0]])]), torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_activations_are_summed_in_high_precision(dtype: torch.dtype) -> None:
    x = (torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    check(gather(list(x.split(100))), x)


def test_a_mean_far_from_zero_over_many_batches() -> None:
    x = torch.full((1, 2), 0.1)
    accumulator = StatisticsAccumulator(2, hessian=True, hessian_dtype=torch.float64)
    for _ in range(3000):
        accumulator.update(x)
    check(accumulator.result(), x.expand(3000, 2))


def test_gradients_are_not_kept() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert not gather([x]).require_hessian().requires_grad


def test_no_token_is_an_error() -> None:
    accumulator = StatisticsAccumulator(2)
    accumulator.update(torch.ones(1, 3, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no token was seen"):
        accumulator.result()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    accumulator = StatisticsAccumulator(2)
    accumulator.update(torch.tensor([[1.0, value]]))
    with pytest.raises(ValueError, match="not finite"):
        accumulator.result()


def test_a_hessian_that_was_not_asked_for_is_missed_loudly() -> None:
    statistics = gather([torch.ones(3, 2)], hessian=False)
    assert statistics.hessian is None
    with pytest.raises(ValueError, match="only its diagonal"):
        statistics.require_hessian()


def test_through_is_the_statistics_of_the_product() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 1
    matrix = torch.randn(4, 7, generator=generator)
    through = gather([x]).through(matrix)
    direct = gather([(x.double() @ matrix.double().T).float()])
    assert through.count == 200
    assert through.abs_mean is None
    for name in ("mean", "second_moment", "hessian"):
        torch.testing.assert_close(getattr(through, name), getattr(direct, name), rtol=1e-4, atol=1e-3)
    hessian = through.require_hessian()
    assert torch.equal(hessian, hessian.T)
    assert torch.equal(hessian.diagonal(), through.second_moment)


def test_through_without_a_hessian_is_exact_for_independent_channels() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 3.0])] * 3)  # independent, mean 1, variance 4
    matrix = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 4.0]])
    through = gather([corners], hessian=False).through(matrix)
    product = corners @ matrix.T
    torch.testing.assert_close(through.mean, product.mean(0))
    torch.testing.assert_close(through.second_moment, product.square().mean(0))


@pytest.mark.parametrize("hessian", [True, False])
def test_select_is_the_statistics_of_the_selected(hessian: bool) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([4, 0, 3])
    selected, direct = gather([x], hessian=hessian).select(index), gather([x[:, index]], hessian=hessian)
    assert selected.features == 3
    for name in ("count", "mean", "second_moment", "abs_mean", "hessian"):
        torch.testing.assert_close(getattr(selected, name), getattr(direct, name))
    assert gather([x]).through(torch.eye(6)).select(index).abs_mean is None


def test_weights_of_tokens_count_in_every_moment() -> None:
    """By the definitions: the weighted means over all windows of a batch."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.tensor([3.0, 0.5, 0.0, 0.5])  # of mean 1
    batches = [torch.randn(windows, 4, 5, generator=generator) - 0.7 for windows in (1, 3)]
    accumulator = StatisticsAccumulator(5, hessian=True)
    for batch in batches:
        accumulator.update(batch, weights=weights)
    statistics, x = accumulator.result(), torch.cat(batches).double()
    counts = weights.double()[None, :, None]
    assert statistics.count == 16
    expected = {
        "mean": (counts * x).sum((0, 1)) / 16,
        "second_moment": (counts * x**2).sum((0, 1)) / 16,
        "abs_mean": (counts * x.abs()).sum((0, 1)) / 16,
        "hessian": torch.einsum("wti,wtj,t->ij", x, x, weights.double()) / 16,
    }
    for name, moment in expected.items():
        torch.testing.assert_close(getattr(statistics, name).double(), moment, rtol=1e-5, atol=1e-6)
    counted = counts_of_rows(weights, batches[1].reshape(-1, 5))
    assert counted.tolist() == weights.tolist() * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_inputs_and_many_rows_are_summed_whole(dtype: torch.dtype) -> None:
    """Wider than one panel of the products, and longer than one part of the sums."""
    x = torch.randn(1100, 300, generator=torch.Generator().manual_seed(5)) + 0.5
    accumulator = StatisticsAccumulator(300, hessian=True, hessian_dtype=dtype)
    accumulator.update(x)
    check(accumulator.result(), x)


def test_a_moment_behind_a_factor_is_never_below_zero() -> None:
    """Rounding may leave E[x^2] a little below E[x]^2."""
    mean = torch.tensor([1.0, 2.0])
    known = InputStatistics(9, mean, mean.square() - 1e-6, None, None)
    through = known.through(torch.tensor([[1000.0, -500.0]]))
    assert through.second_moment.tolist() == [0.0]
    assert through.mean.tolist() == [0.0]
