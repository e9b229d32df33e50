"""Entropy-coded quantization: the loss and the rate that theory foretells, and targets that are met."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmpress.forms import EntropyCoded, coded_bits
from lmpress.methods.entropy_quantization import (
    EntropyOptions,
    RateCurve,
    conditional_deviations,
    entropy_quantize,
    rate_curve,
    refine_step,
    solve_step,
)
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.hessian import damped_inverse_factor, layer_loss
from lmpress.statistics import InputStatistics
from tests.methods.test_gptq import inputs, random_weight, statistics_of

PLAIN = EntropyOptions(damping=0.01, dead_zone=0.0)


def form_of(
    weight: Tensor, statistics: InputStatistics, step: float, options: EntropyOptions = PLAIN
) -> EntropyCoded:
    form = entropy_quantize(weight, statistics, step, options).form
    assert isinstance(form, EntropyCoded)
    return form


def test_the_loss_is_what_theory_foretells() -> None:
    """At a small step, every weight adds step^2 / 12 to the damped loss, whatever the Hessian."""
    weight, statistics = random_weight(48, 64), statistics_of(inputs(64))
    hessian = statistics.require_hessian()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    for step in (0.003, 0.01):
        loss = layer_loss(weight - form_of(weight, statistics, step).dense(), damped)
        assert loss == pytest.approx(step**2 / 12 * weight.numel(), rel=0.06)


def test_steps_follow_the_factor() -> None:
    weight, statistics = random_weight(8, 32), statistics_of(inputs(32))
    form = form_of(weight, statistics, 0.02)
    rank = torch.argsort(statistics.second_moment)
    upper = damped_inverse_factor(statistics.require_hessian()[rank][:, rank], 0.01).upper
    expected = torch.empty(32)
    expected[rank] = 0.02 * upper.diagonal()
    torch.testing.assert_close(form.row_scale * form.column_scale.float(), expected[None], rtol=1e-3, atol=0)
    torch.testing.assert_close(conditional_deviations(statistics, PLAIN) * 0.02, expected, rtol=1e-5, atol=0)
    flat = form_of(weight, statistics, 0.02, EntropyOptions(damping=0.01, flat_columns=True))
    geometric = expected.log().mean().exp()
    assert torch.allclose(flat.row_scale * flat.column_scale.float(), geometric.expand(1, 32), rtol=1e-3)


def test_sensitive_outputs_get_finer_steps() -> None:
    weight, statistics = random_weight(8, 32), statistics_of(inputs(32))
    sensitivity = torch.tensor([1.0, 4.0, 16.0, 1.0, 1.0, 64.0, 1.0, 0.0])
    result = entropy_quantize(weight, statistics, 0.02, PLAIN, sensitivity=sensitivity)
    form = result.form
    assert isinstance(form, EntropyCoded)
    assert form.row_scale.shape == (8, 1)
    steps = form.row_scale.float()[:, 0]
    torch.testing.assert_close(steps[0] / steps[[1, 2, 5]], torch.tensor([2.0, 4.0, 8.0]), rtol=2e-3, atol=0)
    assert torch.isfinite(steps).all()  # an output of no sensitivity still has a step
    one = entropy_quantize(weight, statistics, 0.02, PLAIN, sensitivity=4.0).form
    half = entropy_quantize(weight, statistics, 0.01, PLAIN).form
    torch.testing.assert_close(one.dense(), half.dense())


def test_beats_gptq_at_the_same_size() -> None:
    weight, statistics = random_weight(96, 128), statistics_of(inputs(128))
    fixed = gptq(weight, statistics, GptqOptions(bits=4, granularity="group:64", clip=True))
    step = 0.03
    for _ in range(6):
        result = entropy_quantize(weight, statistics, step, EntropyOptions())
        step *= 2 ** (result.report["bits_per_weight"] - fixed.form.bits_per_weight)
    assert result.form.bits_per_weight == pytest.approx(fixed.form.bits_per_weight, abs=0.02)
    assert result.report["output_error"] < 0.6 * fixed.report["output_error"]


def test_the_dead_zone_pays_at_low_rates() -> None:
    """At equal loss, a bit and a half are cheaper with it: 6 dB a bit compare the two."""
    weight, statistics = random_weight(128, 96), statistics_of(inputs(96))
    effective = []
    for options in (PLAIN, EntropyOptions(damping=0.01, dead_zone=0.1)):
        result = entropy_quantize(weight, statistics, 0.3, options)
        bits = result.report["bits_per_weight"]
        assert bits < 2.5
        effective.append(bits + 0.5 * math.log2(result.report["output_error"]))
    assert effective[1] < effective[0] - 0.02


def test_codes_can_be_kept_within_a_byte() -> None:
    weight, statistics = random_weight(64, 48), statistics_of(inputs(48, spread=0.3))
    weight[5, 7] = 40.0  # four hundred deviations
    free = entropy_quantize(weight, statistics, 0.02, EntropyOptions())
    bounded = entropy_quantize(weight, statistics, 0.02, EntropyOptions(largest_code=127))
    assert isinstance(free.form, EntropyCoded)
    assert isinstance(bounded.form, EntropyCoded)
    assert int(free.form.codes().abs().max()) > 127
    assert bounded.report["code_bytes"] == 1
    assert int(bounded.form.codes().abs().max()) <= 127
    assert float((bounded.form.dense() - weight)[5, 7].abs()) < 0.5
    wider = (bounded.form.column_scale / free.form.column_scale)[0]
    assert (wider >= 1).all()
    assert wider[7] > 4
    assert float((wider == 1).float().mean()) > 0.5
    deviations = conditional_deviations(statistics, EntropyOptions())
    curve = rate_curve(weight, deviations, EntropyOptions(largest_code=127))
    assert 8 * bounded.form.num_bytes == pytest.approx(curve.total_bits(0.02), rel=0.05)


def test_report_and_half_precision() -> None:
    weight, statistics = random_weight(16, 32).to(torch.bfloat16), statistics_of(inputs(32))
    result = entropy_quantize(weight, statistics, 0.1, EntropyOptions())
    form = result.form
    assert isinstance(form, EntropyCoded)
    assert result.report["bits_per_weight"] == form.bits_per_weight
    assert result.report["zeros"] == pytest.approx(float((form.codes() == 0).float().mean()))
    reference = layer_loss(weight.float(), statistics.require_hessian())
    loss = layer_loss(weight.float() - form.dense(), statistics.require_hessian())
    assert result.report["output_error"] == pytest.approx(loss / reference, rel=1e-3)
    again = entropy_quantize(weight, statistics, 0.1, EntropyOptions()).form
    assert all(
        torch.equal(a, b) for a, b in zip(form.tensors().values(), again.tensors().values(), strict=True)
    )


def test_asymmetric_calibration_serves_the_original_outputs() -> None:
    weight, generator = random_weight(16, 32), torch.Generator().manual_seed(5)
    original = inputs(32, tokens=800)
    compressed = original + 0.5 * torch.randn(800, 32, generator=generator) * original.std(0)
    cross = (original - compressed).T @ compressed / len(original)
    options = EntropyOptions(asymmetry=1.0, damping=1e-4)

    def error(cross: Tensor | None) -> float:
        form = entropy_quantize(weight, statistics_of(compressed), 0.02, options, cross=cross).form
        return float((original @ weight.T - compressed @ form.dense().T).square().mean())

    assert error(cross) < 0.95 * error(None)


def layers(count: int = 3) -> list[tuple[Tensor, InputStatistics, float]]:
    return [
        (random_weight(160 + 64 * k, 96, seed=k) * (k + 1), statistics_of(inputs(96, seed=k)), 4.0**k)
        for k in range(count)
    ]


@pytest.mark.parametrize("target", [1.5, 3.0, 5.5])
def test_a_target_is_met(target: float) -> None:
    options, cases = EntropyOptions(), layers()
    curves = [
        rate_curve(w, conditional_deviations(s, options), options, sensitivity=sensitivity)
        for w, s, sensitivity in cases
    ]
    count = sum(w.numel() for w, _, _ in cases)

    def measure(step: float) -> float:
        forms = [entropy_quantize(w, s, step, options, sensitivity=k).form for w, s, k in cases]
        return sum(8 * form.num_bytes for form in forms) / count

    step = solve_step(curves, target)
    assert measure(step) == pytest.approx(target, rel=0.04)
    refined, rate = refine_step(measure, step, target, tolerance=0.01)
    assert target - 0.01 <= rate <= target
    assert measure(refined) == rate


def test_rate_curves_tell_what_rounding_takes() -> None:
    """Without feedback (a diagonal Hessian) a curve is exact at its knots, by row sensitivity too."""
    weight = random_weight(64, 48)
    energy = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1
    statistics = InputStatistics(9, torch.zeros(48), energy, None, torch.diag(energy))
    sensitivity = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    deviations = conditional_deviations(statistics, PLAIN)
    curve = rate_curve(weight, deviations, PLAIN, sensitivity=sensitivity)
    for knot in curve.log_steps[4:20:3]:
        form = entropy_quantize(weight, statistics, 2.0**knot, PLAIN, sensitivity=sensitivity).form
        assert 8 * form.num_bytes == pytest.approx(curve.total_bits(2.0**knot), rel=0.02, abs=96)
    assert curve.total_bits(2.0 ** (curve.log_steps[0] - 3)) == pytest.approx(
        curve.total_bits(2.0 ** curve.log_steps[0]) + 3 * weight.numel()
    )


def test_entropy_of_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (400, 300), generator=generator)
    assert coded_bits(codes) == pytest.approx(4 * codes.numel(), rel=0.02)
    assert coded_bits(torch.zeros(50, 50)) < 100


def test_a_rate_that_cannot_be_met_tells_the_least() -> None:
    weight, statistics, _ = layers(1)[0]
    curve = rate_curve(weight, conditional_deviations(statistics, PLAIN), PLAIN)
    with pytest.raises(ValueError, match=r"0\.010 bits a weight cannot be met: .* which is the least"):
        solve_step([curve], 0.01)
    with pytest.raises(ValueError, match="no weight"):
        solve_step([RateCurve(0, 0.0, (0.0,), (0.0,))], 3.0)


def test_refinement_stays_within_the_target() -> None:
    step, rate = refine_step(lambda s: -1.3 * math.log2(s) + 0.1, 2.0**-3, 3.0, tolerance=0.005, rounds=6)
    assert 2.995 <= rate <= 3.0
    assert rate == pytest.approx(-1.3 * math.log2(step) + 0.1)
    assert refine_step(lambda s: 5.0, 0.1, 3.0, tolerance=0.1, rounds=2)[1] == 5.0


def test_bad_requests() -> None:
    weight, statistics = random_weight(4, 16), statistics_of(inputs(16))
    with pytest.raises(ValueError, match="positive"):
        entropy_quantize(weight, statistics, 0.0, PLAIN)
    with pytest.raises(ValueError, match="sensitivity"):
        entropy_quantize(weight, statistics, 0.1, PLAIN, sensitivity=-1.0)
    with pytest.raises(ValueError, match="one an output"):
        entropy_quantize(weight, statistics, 0.1, PLAIN, sensitivity=torch.ones(3))
    with pytest.raises(ValueError, match="32 bits"):
        entropy_quantize(weight, statistics, 1e-12, PLAIN)
    with pytest.raises(ValueError, match="not fit a weight"):
        entropy_quantize(weight[:, :8], statistics, 0.1, PLAIN)
    with pytest.raises(ValueError, match="NaN"):
        entropy_quantize(weight * math.nan, statistics, 0.1, PLAIN)
    with pytest.raises(ValueError, match="damping"):
        EntropyOptions(damping=-1)
    with pytest.raises(ValueError, match="largest"):
        EntropyOptions(largest_code=0)


def test_a_step_too_small_for_the_largest_code_is_refused() -> None:
    weight, statistics = random_weight(8, 32), statistics_of(inputs(32))
    options = EntropyOptions(largest_code=7)
    with pytest.raises(ValueError, match="too small to keep every code within 7"):
        entropy_quantize(1e6 * weight, statistics, 0.01, options)


def naive_codes(
    weight: Tensor, statistics: InputStatistics, form: EntropyCoded, options: EntropyOptions
) -> Tensor:
    """Column by column in float64: the least active first, each error made up for by all that follow."""
    order = torch.argsort(statistics.second_moment, stable=True).tolist()
    hessian = statistics.require_hessian().double()
    hessian = hessian + options.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    steps = form.row_scale.double() * form.column_scale.double()
    target = weight.double()
    column = target.square().mean(0).sqrt()
    row = (target / column).square().mean(1).sqrt()
    spread = row[:, None] * (target / row[:, None]).square().mean(0).sqrt()
    left, codes = target.clone(), torch.zeros_like(target)
    for place, j in enumerate(order):
        later = order[place:]
        inverse = torch.linalg.inv(hessian[later][:, later])
        shift = (options.dead_zone * steps[:, j] / spread[:, j]).clamp_max(0.3)
        values = left[:, j] / steps[:, j]
        codes[:, j] = torch.sign(values) * (values.abs() + 0.5 - shift).floor().clamp_min(0)
        error = left[:, j] - codes[:, j] * steps[:, j]
        left[:, later] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


@pytest.mark.parametrize("dead_zone", [0.0, 0.1, 0.4])
def test_codes_are_those_of_feedback_done_naively(dead_zone: float) -> None:
    """Every column has a deviation and a step of its own: none may take those of another."""
    generator = torch.Generator().manual_seed(21)
    weight = random_weight(40, 24) * torch.exp(torch.randn(24, generator=generator))
    statistics = statistics_of(inputs(24))
    options = EntropyOptions(damping=0.05, dead_zone=dead_zone)
    sensitivity = torch.rand(40, generator=generator) + 0.2
    form = entropy_quantize(weight, statistics, 0.15, options, sensitivity=sensitivity).form
    assert isinstance(form, EntropyCoded)
    codes, expected = form.codes().double(), naive_codes(weight, statistics, form, options)
    assert 0.2 < float((codes == 0).double().mean()) < 0.9
    assert float((codes != expected).double().mean()) < 0.01  # rounding decides a few of them
