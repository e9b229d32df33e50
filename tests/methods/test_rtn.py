"""Rounding to nearest against brute force over all points of the grid."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpress.forms import Quantized
from lmpress.methods.rtn import (
    SHRINKS,
    RoundOptions,
    choose_scale_dtype,
    fit_grid,
    parse_granularity,
    quantize_to_grid,
    round_to_nearest,
)
from tests.methods.data import inputs, statistics_of, weights

GRANULARITIES = ("tensor", "channel", "group:4")


def rounded(weight: Tensor, options: RoundOptions) -> Quantized:
    form = round_to_nearest(weight, None, options).form
    assert isinstance(form, Quantized)
    return form


def spread(per_scale: Tensor, shape: torch.Size) -> Tensor:
    """A value for every entry from one for every scale."""
    if per_scale.shape[1] > 1:
        per_scale = per_scale.repeat_interleave(shape[1] // per_scale.shape[1], dim=1)
    return per_scale.expand(shape)


def points(form: Quantized) -> Tensor:
    """All values that an entry can take, (out, in, 2^bits), float64."""
    scale = spread(form.scale.double(), torch.Size(form.shape))
    low = 0
    if form.symmetric:
        low = -127 if form.bits == 8 else -(2 ** (form.bits - 1))
    codes = torch.arange(low, 2 ** (form.bits - 1) if form.symmetric else 2**form.bits)
    zero = form.zero()
    offset = 0 if zero is None else spread(zero.double(), torch.Size(form.shape))[..., None]
    return scale[..., None] * (codes.double() - offset)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_every_entry_goes_to_the_nearest_point(
    bits: int, granularity: str, symmetric: bool, clip: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = weights(5, 12, seed).to(dtype)
    weight[:, 3] = 0
    form = rounded(weight, RoundOptions(bits, granularity, symmetric, clip=clip))
    assert (form.bits, form.symmetric) == (bits, symmetric)
    dense = form.dense(torch.float64)
    assert bool((dense[:, 3] == 0).all())  # zero is exact
    error = (dense - weight.double()).abs()
    scale = spread(form.scale.double().abs(), weight.shape)
    nearest = (points(form) - weight.double()[..., None]).abs().amin(-1)
    assert bool((error <= nearest + 1e-5 * scale).all())
    inside = (weight >= points(form).amin(-1)) & (weight <= points(form).amax(-1))
    assert bool((error[inside] <= scale[inside] * 0.50001).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 8), st.sampled_from(GRANULARITIES), st.booleans(), st.integers(0, 2**31))
def test_unclipped_grids_reach_every_entry(bits: int, granularity: str, symmetric: bool, seed: int) -> None:
    weight = weights(5, 12, seed)
    form = rounded(weight, RoundOptions(bits, granularity, symmetric))
    scale = spread(form.scale.double(), weight.shape)
    # half a step, and what rounding the scale to 16 bits moves the outermost code by
    slack = 2.0**-11 * 2**bits
    assert bool(((form.dense(torch.float64) - weight).abs() <= scale * (0.5 + slack)).all())


def test_scales_by_the_formula() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.25], [3.0, 4.0, 0.0, 1.0]])
    options = {"scale_dtype": torch.float32}
    scale, zero = fit_grid(weight, 8, "channel", True, **options)
    assert zero is None
    torch.testing.assert_close(scale, torch.tensor([[2 / 127], [4 / 127]]))
    scale, _ = fit_grid(weight, 8, "tensor", True, **options)
    torch.testing.assert_close(scale, torch.tensor([[4 / 127]]))
    scale, _ = fit_grid(weight, 8, "group:2", True, **options)
    torch.testing.assert_close(scale, torch.tensor([[2.0, 0.5], [4.0, 1.0]]) / 127)
    scale, zero = fit_grid(weight, 4, "channel", False, **options)
    torch.testing.assert_close(scale, torch.tensor([[3 / 15], [4 / 15]]))
    assert zero is not None
    assert zero.tolist() == [[10], [0]]  # 2 / 0.2; a range that starts at 0


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_costs_and_pays_at_few_bits(bits: int, symmetric: bool) -> None:
    weight = weights(16, 64, 3)
    errors = [
        float((rounded(weight, RoundOptions(bits, "channel", symmetric, clip=clip)).dense() - weight).norm())
        for clip in (False, True)
    ]
    assert errors[1] < errors[0]


def test_the_symmetric_grid_of_few_bits_uses_the_better_range() -> None:
    narrow = torch.tensor([[-3.0, 3.0, 1.0, 2.0, 3.0, -3.0, 0.0, 1.0]])  # integers of 3 bits without -4
    assert torch.equal(rounded(narrow, RoundOptions(3)).dense(), narrow)
    full = torch.tensor([[-4.0, 3.0, 1.0, 2.0, -3.0, 0.0, 1.0, 1.0]])
    for weight in (full, -full):  # the scale takes the sign
        assert torch.equal(rounded(weight, RoundOptions(3)).dense(), weight)


def test_clipping_weighs_the_error_by_the_input() -> None:
    weight = weights(8, 32, 5)
    x = inputs(32, 200, 6)
    x[:, ::2] *= 30
    statistics = statistics_of(x)
    options = RoundOptions(3, "channel", clip=True)

    def loss(form: Quantized) -> Tensor:
        return ((form.dense(torch.float64) - weight).square() * statistics.second_moment).sum(1)

    informed = round_to_nearest(weight, statistics, options).form
    assert isinstance(informed, Quantized)
    blind = rounded(weight, options)
    assert bool((loss(informed) <= loss(blind) * (1 + 1e-6)).all())
    assert float(loss(informed).sum()) < 0.99 * float(loss(blind).sum())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_zero_rows_and_groups_stay_zero(granularity: str, symmetric: bool, clip: bool) -> None:
    weight = torch.zeros(3, 8)
    result = round_to_nearest(weight, None, RoundOptions(4, granularity, symmetric, clip=clip))
    assert bool((result.form.dense() == 0).all())
    assert result.report["weight_error"] == 0.0
    weight[0, 0] = 1
    dense = rounded(weight, RoundOptions(4, granularity, symmetric, clip=clip)).dense()
    assert bool((dense[1:] == 0).all())


def test_scales_are_half_precision_where_that_is_enough() -> None:
    weight = weights(4, 16, 0)
    assert rounded(weight, RoundOptions(8)).scale.dtype == torch.float16
    for factor in (1e-4, 1e10):
        form = rounded(weight * factor, RoundOptions(8))
        assert form.scale.dtype == torch.float32
        relative = (form.dense(torch.float64) / factor - weight).norm() / weight.norm()
        assert float(relative) < 0.01
    assert choose_scale_dtype(weight * 1e-3, 4, "channel", True) == torch.float16
    assert choose_scale_dtype(weight * 1e-7, 4, "channel", True) == torch.float32


def test_a_scale_dtype_that_was_asked_for_is_kept_or_refused() -> None:
    weight = weights(4, 16, 0)
    assert rounded(weight, RoundOptions(8, scale_dtype=torch.bfloat16)).scale.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"does not fit into torch\.float16"):
        round_to_nearest(weight * 1e10, None, RoundOptions(8, scale_dtype=torch.float16))
    tiny = rounded(weight * 1e-12, RoundOptions(8, scale_dtype=torch.float16))
    assert bool((tiny.scale != 0).all())
    assert bool(torch.isfinite(tiny.dense()).all())


def test_codes_of_a_foreign_grid_are_clamped() -> None:
    weight = torch.tensor([[-100.0, 0.9, 100.0]])
    one = torch.ones(1, 1)
    assert quantize_to_grid(weight, one, None, 8).tolist() == [[-100, 1, 100]]
    assert quantize_to_grid(weight * 10, one, None, 8).tolist() == [[-127, 9, 127]]
    assert quantize_to_grid(weight, one, None, 4).tolist() == [[-8, 1, 7]]
    assert quantize_to_grid(weight, one, one.to(torch.uint8) * 3, 4).tolist() == [[0, 4, 15]]


@pytest.mark.parametrize(("text", "parsed"), [("tensor", ("tensor", None)), ("group:64", ("group", 64))])
def test_granularities(text: str, parsed: tuple[str, int | None]) -> None:
    assert parse_granularity(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "row", "group", "group:", "group:0", "group:-4", "group:4.0", "tensor:4"]
)
def test_what_is_no_granularity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tensor, channel or group:N"):
        parse_granularity(text)
    with pytest.raises(ValueError, match="tensor, channel or group:N"):
        RoundOptions(8, text)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 5 do not divide the 12 columns"):
        round_to_nearest(weights(2, 12, 0), None, RoundOptions(4, "group:5"))
    with pytest.raises(ValueError, match="2 to 8 bits, not 9"):
        RoundOptions(9)
    for bad in (float("nan"), float("inf")):
        weight = weights(2, 12, 0)
        weight[1, 1] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            round_to_nearest(weight, None, RoundOptions(8))


def test_the_report_measures_the_weight() -> None:
    weight = weights(8, 32, 1)
    result = round_to_nearest(weight, None, RoundOptions(4, "group:8"))
    expected = float((result.form.dense(torch.float64) - weight).norm() / weight.norm())
    assert result.report["weight_error"] == pytest.approx(expected, rel=1e-4)
    assert {k: result.report[k] for k in ("bits", "granularity", "symmetric", "scale_dtype")} == {
        "bits": 4,
        "granularity": "group:8",
        "symmetric": True,
        "scale_dtype": "float16",
    }


def test_ranges_shrink_from_whole_to_three_tenths() -> None:
    assert SHRINKS[0] == 1.0
    assert SHRINKS[-1] == pytest.approx(0.3)
    assert all(before - after == pytest.approx(0.02) for before, after in pairwise(SHRINKS))
