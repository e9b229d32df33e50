"""AWQ's scales, against every power of the grid in float64 over the raw inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmpress.methods.awq import AwqOptions, Reader, awq_scales
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.statistics import InputStatistics
from tests.methods.data import statistics_of, weights

COLUMNS = 24
SYMMETRIC = RoundOptions(bits=5, granularity="channel", symmetric=True, scale_dtype=torch.float32)
GROUPS = RoundOptions(bits=3, granularity="group:8", symmetric=False, scale_dtype=torch.float32)


def outlying(tokens: int = 200, seed: int = 0) -> Tensor:
    """Inputs (tokens, COLUMNS), of which some are far larger than the others, and correlated."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(1.5 * torch.randn(COLUMNS, generator=generator, dtype=torch.float64))
    mix = torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    return (torch.randn(tokens, COLUMNS, generator=generator) @ mix).double() * sizes


def rounded(weight: Tensor, grid: RoundOptions) -> Tensor:
    """Every entry at the nearest point of its grid, one cell after the other, float64."""
    size = weight.shape[1] if grid.granularity == "channel" else int(grid.granularity.split(":")[1])
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            cell = weight[row, start : start + size]
            if grid.symmetric:
                top = 2 ** (grid.bits - 1) - 1
                step = cell.abs().max() / top
                out[row, start : start + size] = (cell / step).round().clamp(-top - 1, top) * step
            else:
                low, high, top = min(float(cell.min()), 0.0), max(float(cell.max()), 0.0), 2**grid.bits - 1
                step = (high - low) / top
                zero = round(-low / step)
                codes = ((cell / step).round() + zero).clamp(0, top)
                out[row, start : start + size] = (codes - zero) * step
    return out


def scale_of(magnitude: Tensor, alpha: float) -> Tensor:
    scale = magnitude**alpha
    return scale / (scale.max() * scale.min()) ** 0.5


def error(readers: list[Reader], scale: Tensor, x: Tensor) -> float:
    """The mean squared error of all outputs over the tokens x."""
    total = 0.0
    for reader in readers:
        weight = reader.weight.double()
        strayed = (rounded(weight * scale, reader.grid) / scale - weight) @ x.T
        total += float(strayed.square().sum(0).mean())
    return total


@pytest.mark.parametrize("weighed", [False, True])
def test_ranges_are_shrunken_in_the_search_as_they_will_be(weighed: bool) -> None:
    """A range that is shrunken by the weights alone cuts off what a scale made large."""
    x, weight = outlying(seed=5), weights(10, COLUMNS, seed=7).float()
    grid, moments = replace(SYMMETRIC, bits=3, clip=True), statistics_of(x)

    def strayed(scale: Tensor) -> float:
        seen = replace(moments, second_moment=moments.second_moment / scale.float().square())
        made = round_to_nearest(weight * scale.float(), seen if weighed else None, grid).form
        return float((((made.dense().double() / scale - weight) @ x.T).square().sum(0)).mean())

    errors = {i / 20: strayed(scale_of(x.abs().mean(0), i / 20)) for i in range(21)}
    _, report = awq_scales([Reader(weight, grid, weighed)], moments, AwqOptions(20))
    assert report["alpha"] == min(errors, key=errors.__getitem__)
    assert report["relative_error"] <= 1.0


def test_a_sample_of_rows_finds_about_what_all_of_them_find() -> None:
    x = outlying(seed=2)
    many = weights(600, COLUMNS, seed=3).float()
    errors = {
        i / 10: error([Reader(many, SYMMETRIC)], scale_of(x.abs().mean(0), i / 10), x) for i in range(11)
    }
    _, report = awq_scales([Reader(many, SYMMETRIC)], statistics_of(x), AwqOptions(10))
    assert errors[report["alpha"]] < 1.05 * min(errors.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("points", [4, 20])
def test_the_power_is_the_best_of_the_grid(points: int, seed: int) -> None:
    x = outlying(seed=seed)
    readers = [
        Reader(weights(10, COLUMNS, seed=seed + 10).float(), SYMMETRIC),
        Reader(weights(6, COLUMNS, seed=seed + 20).float(), GROUPS),
    ]
    scale, report = awq_scales(readers, statistics_of(x), AwqOptions(points))
    magnitude = x.abs().mean(0)
    errors = {i / points: error(readers, scale_of(magnitude, i / points), x) for i in range(points + 1)}
    best = min(errors, key=errors.__getitem__)
    assert best > 0
    assert report["alpha"] == best
    assert report["relative_error"] == pytest.approx(errors[best] / errors[0.0], rel=2e-3)
    assert report["relative_error"] < 0.9
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), scale_of(magnitude, best), rtol=1e-5, atol=0)
    assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-5)


def test_inputs_of_one_size_are_left_as_they_are() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(0, 2, (100, COLUMNS), generator=generator) * 2.0 - 1.0
    readers = [Reader(weights(8, COLUMNS, seed=1), GROUPS)]
    scale, report = awq_scales(readers, statistics_of(x), AwqOptions())
    assert torch.equal(scale, torch.ones(COLUMNS))
    assert report == {"alpha": 0.0, "relative_error": 1.0}


def test_weights_on_their_grid_are_left_as_they_are() -> None:
    codes = torch.randint(-15, 16, (8, COLUMNS), generator=torch.Generator().manual_seed(2)).float()
    codes[:, 0] = 15.0
    scale, report = awq_scales([Reader(codes, SYMMETRIC)], statistics_of(outlying()), AwqOptions())
    assert torch.equal(scale, torch.ones(COLUMNS))
    assert report == {"alpha": 0.0, "relative_error": 1.0}


def test_channels_of_one_row_are_scaled_alike() -> None:
    """As the largest of them asks for: (groups, repeats, d) with one scale for all repeats."""
    x, heads = outlying(seed=5), (2, 3)
    readers = [Reader(weights(10, COLUMNS, seed=6), GROUPS)]
    scale, report = awq_scales(readers, statistics_of(x), AwqOptions(10), heads)
    assert report["alpha"] > 0
    parts = scale.view(2, 3, 4)
    assert torch.equal(parts, parts[:, :1].expand(-1, 3, -1))
    largest = x.abs().mean(0).view(2, 3, 4).amax(1, keepdim=True).expand(-1, 3, -1).reshape(-1)
    errors = {i / 10: error(readers, scale_of(largest, i / 10), x) for i in range(11)}
    assert report["alpha"] == min(errors, key=errors.__getitem__)
    torch.testing.assert_close(scale.double(), scale_of(largest, report["alpha"]), rtol=1e-5, atol=0)


def test_inputs_that_never_come_have_a_scale() -> None:
    x = outlying()
    x[:, 3] = 0.0
    readers = [Reader(weights(8, COLUMNS, seed=1), GROUPS)]
    scale, report = awq_scales(readers, statistics_of(x), AwqOptions())
    assert report["alpha"] > 0
    assert bool((scale > 0).all() and scale.isfinite().all())
    magnitude = x.abs().mean(0)
    magnitude[3] = 1e-4 * magnitude.mean()
    torch.testing.assert_close(scale.double(), scale_of(magnitude, report["alpha"]), rtol=1e-5, atol=0)
    nothing = awq_scales(readers, statistics_of(torch.zeros(4, COLUMNS)), AwqOptions())
    assert torch.equal(nothing[0], torch.ones(COLUMNS))
    assert nothing[1] == {"alpha": 0.0, "relative_error": 1.0}


def test_what_is_refused() -> None:
    statistics = statistics_of(outlying())
    readers = [Reader(weights(8, COLUMNS, seed=1), GROUPS)]

    def refused(given: InputStatistics, words: str, among: list[Reader] = readers) -> None:
        with pytest.raises(ValueError, match=words):
            awq_scales(among, given, AwqOptions())

    refused(replace(statistics, hessian=None), "Hessian")
    refused(replace(statistics, abs_mean=None), "mean magnitude")
    refused(
        statistics, f"16 inputs, and statistics of {COLUMNS}", [*readers, Reader(weights(8, 16, 1), GROUPS)]
    )
    with pytest.raises(ValueError, match="at least one alpha"):
        AwqOptions(points=0)
    assert AwqOptions(points=1).points == 1
