"""Entropy-coded tables: targets that are met, and errors put where they cost least."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmpress.forms import EntropyCoded
from lmpress.methods.entropy_quantization import EntropyOptions
from lmpress.methods.entropy_table import entropy_round
from lmpress.methods.hessian import layer_loss
from tests.methods.test_gptq import inputs, statistics_of


def table() -> Tensor:
    """(tokens, width): rows of different length, as those of rare and common tokens are."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(700, 48, generator=generator) * torch.rand(700, 1, generator=generator)


@pytest.mark.parametrize("largest_code", [None, 127])
@pytest.mark.parametrize("bits", [0.7, 2.0, 3.5, 6.5])
def test_a_table_meets_its_bits(bits: float, largest_code: int | None) -> None:
    result = entropy_round(table(), bits, EntropyOptions(largest_code=largest_code))
    rate = 8 * result.form.num_bytes / table().numel()
    assert bits - 0.005 * max(1.0, bits) <= rate <= bits
    assert result.report["bits_per_weight"] == rate
    error = float((table() - result.form.dense()).norm() / table().norm())
    assert result.report["weight_error"] == pytest.approx(error, rel=1e-4)


def test_one_step_for_a_table_costs_what_the_high_rate_formula_says() -> None:
    result = entropy_round(table(), 6.0, EntropyOptions(dead_zone=0.0))
    form = result.form
    assert isinstance(form, EntropyCoded)
    steps = form.row_scale.float() * form.column_scale.float()
    assert steps.unique().numel() == 1
    mean_square = float((table() - form.dense()).square().mean())
    assert mean_square == pytest.approx(float(steps[0, 0]) ** 2 / 12, rel=0.03)
    assert torch.equal(form.codes(), (table() / steps).round().to(form.codes()))


def test_rows_of_a_table_that_count_more_are_finer() -> None:
    sensitivity = torch.ones(700)
    sensitivity[::2] = 16.0
    form = entropy_round(table(), 5.0, EntropyOptions(dead_zone=0.0), sensitivity=sensitivity).form
    error = (table() - form.dense()).square()
    assert float(error[1::2].mean() / error[::2].mean()) == pytest.approx(16.0, rel=0.1)
    weighted = float((error * sensitivity[:, None]).sum())
    plain = entropy_round(table(), 5.0, EntropyOptions(dead_zone=0.0)).form
    assert weighted < float(((table() - plain.dense()).square() * sensitivity[:, None]).sum())


def test_codes_of_a_table_can_be_kept_within_a_byte() -> None:
    spiked = table()
    spiked[3, 5] = 40.0
    free, bounded = (entropy_round(spiked, 5.0, EntropyOptions(largest_code=c)) for c in (None, 127))
    assert isinstance(free.form, EntropyCoded)
    assert isinstance(bounded.form, EntropyCoded)
    assert int(free.form.codes().abs().max()) > 127
    assert int(bounded.form.codes().abs().max()) <= 127
    assert bounded.report["code_bytes"] == 1
    assert float((bounded.form.dense() - spiked)[3, 5].abs()) < 0.4
    assert bounded.form.bits_per_weight <= 5.0


def test_a_table_whose_bits_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"0\.010 bits a weight cannot be met: .* which is the least"):
        entropy_round(table(), 0.01, EntropyOptions())
    with pytest.raises(ValueError, match="NaN"):
        entropy_round(table() * math.nan, 4.0, EntropyOptions())


def test_a_metric_moves_errors_to_where_they_cost_least() -> None:
    """With the Hessian of what a head sees, its outputs change less at the same bits."""
    weight, statistics = table(), statistics_of(inputs(48, 4096))
    probability = torch.rand(700, generator=torch.Generator().manual_seed(2)).pow(4)
    options = EntropyOptions(dead_zone=0.0, damping=0.01)
    losses = {}
    for name, known in {"plain": None, "metric": statistics}.items():
        rows = probability if known is not None else 1.0
        result = entropy_round(weight, 4.0, options, sensitivity=rows, statistics=known)
        assert 3.9 <= result.report["bits_per_weight"] <= 4.0
        error = (weight - result.form.dense()) * probability.sqrt()[:, None]
        losses[name] = layer_loss(error, statistics.require_hessian())
    assert losses["metric"] < 0.5 * losses["plain"]


def test_many_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmpress.methods import entropy_quantization

    statistics = statistics_of(inputs(48, 1024))
    whole = entropy_round(table(), 4.0, EntropyOptions(), statistics=statistics).form
    monkeypatch.setattr(entropy_quantization, "ROWS", 100)
    assert torch.equal(
        entropy_round(table(), 4.0, EntropyOptions(), statistics=statistics).form.dense(), whole.dense()
    )


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_steps_that_float16_cannot_hold_are_its_smallest(size: float) -> None:
    sensitivity = torch.rand(700, generator=torch.Generator().manual_seed(4)) ** 4
    tiny = table() * size
    result = entropy_round(tiny, 8.0, EntropyOptions(), sensitivity=sensitivity)
    form = result.form
    assert isinstance(form, EntropyCoded)
    assert float(form.row_scale.min()) > 0
    assert result.report["bits_per_weight"] <= 8.0
    assert float((tiny - form.dense()).norm()) <= 0.3 * float(tiny.norm())


@pytest.mark.parametrize("dead_zone", [0.0, 0.15])
def test_codes_of_a_table_without_a_metric(dead_zone: float) -> None:
    """The nearest points, thresholds shifted by the dead zone times the step over the entry's deviation."""
    weight = table() * torch.linspace(0.3, 2.0, 48)
    sensitivity = torch.linspace(0.5, 3.0, 700)
    options = EntropyOptions(dead_zone=dead_zone)
    result = entropy_round(weight, 2.5, options, sensitivity=sensitivity)
    form = result.form
    assert isinstance(form, EntropyCoded)
    steps = form.row_scale.double() * form.column_scale.double()
    target = weight.double()
    column = target.square().mean(0).sqrt()
    row = (target / column).square().mean(1).sqrt()
    spread = row[:, None] * (target / row[:, None]).square().mean(0).sqrt()
    values = target / steps
    shift = (dead_zone * steps / spread).clamp_max(0.3)
    expected = torch.sign(values) * (values.abs() + 0.5 - shift).floor().clamp_min(0)
    assert float((form.codes() != expected).double().mean()) < 1e-3
    assert result.report["zeros"] == pytest.approx(float((expected == 0).double().mean()), abs=1e-3)
    assert result.report["code_bytes"] == 1
    error = float((target - form.dense()).norm() / target.norm())
    assert result.report["weight_error"] == pytest.approx(error, rel=1e-4)
    assert result.report["bits_per_weight"] <= 2.5


def test_a_report_of_a_table_of_nothing() -> None:
    report = entropy_round(torch.zeros(60, 48), 4.0, EntropyOptions()).report
    assert report["zeros"] == 1.0
    assert report["weight_error"] == 0.0
