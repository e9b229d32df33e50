"""What a weight would lose at every number of bits, against the formula written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.hessian import layer_loss
from lmpress.methods.mixed_precision import error_deviations, predicted_losses
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from tests.methods.test_gptq import inputs, random_weight, statistics_of

BITS = (2, 3, 4, 5, 6, 7, 8)


def written_out(weight: Tensor, deviations: Tensor, bits: int, group: int, sensitivity: Tensor) -> float:
    """sum_ij s_i e_ij^2 / U_jj^2 for the asymmetric grid with a float16 scale a group, in float64."""
    total = 0.0
    for i, row in enumerate(weight.double()):
        for start in range(0, len(row), group):
            cell = row[start : start + group]
            low, high = min(float(cell.min()), 0.0), max(float(cell.max()), 0.0)
            scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = min(round(-low / scale), 2**bits - 1)
            codes = ((cell / scale).round() + zero).clamp(0, 2**bits - 1)
            error = cell - scale * (codes - zero)
            scaled = error / deviations[start : start + group].double()
            total += float(sensitivity[i]) * float(scaled.square().sum())
    return total


@pytest.mark.parametrize("group", [8, 32])
def test_the_formula_written_out(group: int) -> None:
    weight = random_weight(12, 32)
    deviations = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.2
    sensitivity = torch.rand(12, generator=torch.Generator().manual_seed(2))
    told = predicted_losses(
        weight,
        deviations,
        BITS,
        granularity=f"group:{group}",
        symmetric=False,
        clip=False,
        sensitivity=sensitivity,
    )
    expected = [written_out(weight, deviations, bits, group, sensitivity) for bits in BITS]
    assert told == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("granularity", "clip"), [("channel", False), ("group:16", True), ("tensor", False)])
def test_a_sample_of_rows_tells_what_all_of_them_do(granularity: str, clip: bool) -> None:
    weight = random_weight(600, 32)
    deviations = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.2
    sensitivity = torch.rand(600, generator=torch.Generator().manual_seed(2)) + 0.5

    def losses(rows: int) -> list[float]:
        return predicted_losses(
            weight,
            deviations,
            (2, 4, 8),
            granularity=granularity,
            symmetric=True,
            clip=clip,
            sensitivity=sensitivity,
            sample_rows=rows,
        )

    exact = granularity == "tensor"  # one scale for all rows: none may be left out
    assert losses(128) == pytest.approx(losses(600), rel=1e-9 if exact else 0.15)


@pytest.mark.parametrize("order", ["group-aware", "activation", "none"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_bits_of_gptq_cost_about_what_is_predicted(bits: int, order: str) -> None:
    """The errors of the weight as it is stand in for those after compensation, in the damped metric."""
    weight, statistics = random_weight(64, 48), statistics_of(inputs(48))
    hessian = statistics.require_hessian()
    damped = hessian + 0.03 * hessian.diagonal().mean() * torch.eye(48)
    options = GptqOptions(bits=bits, granularity="group:16", damping=0.03, order=order, clip=False)
    told = predicted_losses(
        weight,
        error_deviations(statistics, options),
        [bits],
        granularity="group:16",
        symmetric=True,
        clip=False,
    )
    loss = layer_loss(weight - gptq(weight, statistics, options).form.dense(), damped)
    assert loss == pytest.approx(told[0], rel=0.25)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_bits_of_rounding_cost_about_what_is_predicted(bits: int) -> None:
    weight, statistics = random_weight(64, 48), statistics_of(inputs(48))
    deviations = error_deviations(statistics, None)
    told = predicted_losses(weight, deviations, [bits], granularity="channel", symmetric=True, clip=False)
    form = round_to_nearest(weight, None, RoundOptions(bits=bits)).form
    loss = layer_loss(weight - form.dense(), statistics.require_hessian())
    assert loss == pytest.approx(told[0], rel=0.15)


def test_a_sensitivity_counts_in_proportion() -> None:
    weight, deviations = random_weight(8, 16), torch.ones(16)

    def loss(sensitivity: float | Tensor) -> float:
        return predicted_losses(
            weight,
            deviations,
            [3],
            granularity="channel",
            symmetric=True,
            clip=False,
            sensitivity=sensitivity,
        )[0]

    one = torch.nn.functional.one_hot(torch.arange(8)).float()
    assert loss(4.0) == pytest.approx(4 * loss(1.0))
    assert sum(loss(row) for row in one) == pytest.approx(loss(1.0))


def test_a_sample_is_spread_over_all_rows_and_scaled_up() -> None:
    weight, deviations = random_weight(9, 16), torch.ones(16)

    def loss(rows: Tensor, sample: int) -> float:
        how = {"granularity": "channel", "symmetric": True, "clip": False}
        return predicted_losses(rows, deviations, [3], sample_rows=sample, **how)[0]

    each = [loss(row[None], 1) for row in weight]
    assert loss(weight, 3) == pytest.approx(3 * (each[0] + each[4] + each[8]))
    assert loss(weight, 9) == pytest.approx(sum(each))
    assert loss(weight, 8) != pytest.approx(sum(each), rel=1e-3)


def test_a_sample_has_128_rows_where_nothing_is_said() -> None:
    weight = random_weight(300, 8)
    how = {"granularity": "channel", "symmetric": True, "clip": False}
    told = predicted_losses(weight, torch.ones(8), [3], **how)
    assert told == predicted_losses(weight, torch.ones(8), [3], sample_rows=128, **how)
    assert told != predicted_losses(weight, torch.ones(8), [3], sample_rows=127, **how)


def test_deviations_of_rounding_are_of_the_mean_square() -> None:
    x = inputs(6) * torch.tensor([1.0, 1.0, 0.0, 1.0, 1e-6, 1.0])
    statistics = statistics_of(x)
    square = statistics.second_moment
    expected = torch.maximum(square, 1e-6 * square.mean()).rsqrt()
    torch.testing.assert_close(error_deviations(statistics, None), expected)
    assert error_deviations(statistics_of(torch.zeros(4, 6)), None).tolist() == [1.0] * 6
