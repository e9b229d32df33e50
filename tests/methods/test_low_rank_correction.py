"""Corrections against the closed form in the whitened norm, in float64."""

import pytest
import torch
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Quantized, Sum
from lmpress.methods.low_rank_correction import CorrectionOptions, low_rank_correction
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from tests.methods.layers import layer, output_error
from tests.methods.test_subspace import whitened_tail


def rounded(weight: Tensor) -> Form:
    return round_to_nearest(weight, None, RoundOptions(bits=3)).form


def test_the_best_correction_in_the_whitened_norm() -> None:
    weight, _, statistics = layer(20, 32)
    hessian = statistics.require_hessian().double()
    form = rounded(weight)
    result = low_rank_correction(weight.double(), form, statistics, CorrectionOptions(rank=5, damping=0.0))
    assert isinstance(result.form, Sum)
    residual = weight.double() - form.dense(torch.float64)
    rest = weight.double() - result.form.dense(torch.float64)
    found = float((rest @ hessian * rest).sum())
    assert found == pytest.approx(whitened_tail(residual, hessian, 5), rel=1e-4)
    assert result.report["error_after"] < 0.8 * result.report["error_before"]


def test_the_metrics_are_in_order_on_the_outputs() -> None:
    weight, x, statistics = layer(48, 64)
    form = rounded(weight)
    errors = [
        output_error(weight, low_rank_correction(weight, form, statistics, options).form.dense(), x)
        for options in (CorrectionOptions(rank=6, metric=m) for m in ("none", "diagonal", "hessian"))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < output_error(weight, form.dense(), x)


def test_lqer_is_the_svd_of_the_error() -> None:
    weight, _, _ = layer(12, 16)
    form = rounded(weight)
    result = low_rank_correction(weight, form, None, CorrectionOptions(rank=3, metric="none"))
    U, S, Vt = torch.linalg.svd(weight - form.dense())
    expected = form.dense() + U[:, :3] * S[:3] @ Vt[:3]
    torch.testing.assert_close(result.form.dense(), expected, rtol=1e-4, atol=1e-5)


def test_a_sum_gets_one_more_term() -> None:
    weight, _, statistics = layer(12, 16)
    options = CorrectionOptions(rank=2)
    once = low_rank_correction(weight, rounded(weight), statistics, options)
    twice = low_rank_correction(weight, once.form, statistics, options)
    assert isinstance(twice.form, Sum)
    assert [term.kind for term in twice.form.terms] == ["quantized", "low_rank", "low_rank"]
    assert twice.report["error_after"] < once.report["error_after"]
    assert once.report["error_after"] == pytest.approx(twice.report["error_before"])


def test_quantized_factors_make_up_for_each_other() -> None:
    weight, x, statistics = layer(48, 64)
    form = rounded(weight)
    floating = low_rank_correction(weight, form, statistics, CorrectionOptions(rank=8)).form
    quantized = low_rank_correction(weight, form, statistics, CorrectionOptions(rank=8, bits=4)).form
    assert isinstance(floating, Sum)
    assert isinstance(quantized, Sum)

    def round_leaf(leaf: Form) -> Form:
        return round_to_nearest(leaf.dense(), None, RoundOptions(bits=4)).form

    plain = Sum((form, floating.terms[1].rewrite(round_leaf)))
    correction = quantized.terms[1]
    assert isinstance(correction, LowRank)
    assert isinstance(correction.left, Quantized)
    assert correction.num_bytes == plain.terms[1].num_bytes
    errors = [output_error(weight, f.dense(), x) for f in (form, plain, quantized, floating)]
    assert errors == sorted(errors, reverse=True)


def test_what_is_refused() -> None:
    weight, _, statistics = layer(12, 16)
    with pytest.raises(ValueError, match="correction of a form"):
        low_rank_correction(weight, Dense(weight.T), statistics, CorrectionOptions())
    with pytest.raises(ValueError, match="the form to correct is not finite"):
        low_rank_correction(weight, Dense(weight * float("nan")), statistics, CorrectionOptions())
    with pytest.raises(ValueError, match="needs statistics"):
        low_rank_correction(weight, rounded(weight), None, CorrectionOptions())
    with pytest.raises(ValueError, match="the metric"):
        CorrectionOptions(metric="taste")
    with pytest.raises(ValueError, match="Hessian alone"):
        CorrectionOptions(metric="none", bits=4)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_damping_that_it_took_is_told(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, statistics = layer(12, 16)
    options = CorrectionOptions(rank=2, damping=0.02, bits=bits)
    told = low_rank_correction(weight, rounded(weight), statistics, options).report["damping"]
    assert told == pytest.approx(0.02)
    whole = torch.linalg.eigh
    calls = [0]

    def fails_first(matrix: torch.Tensor) -> object:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return whole(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_first)
    mended = low_rank_correction(weight, rounded(weight), statistics, options).report["damping"]
    assert mended == pytest.approx(0.02 + 1e-6)
    none = CorrectionOptions(rank=2, metric="none")
    assert low_rank_correction(weight, rounded(weight), None, none).report["damping"] == 0


@pytest.mark.parametrize("metric", ["hessian", "none"])
def test_errors_are_of_the_output_where_the_hessian_is_known(metric: str) -> None:
    weight, x, statistics = layer(12, 16)
    form, options = rounded(weight), CorrectionOptions(rank=2, metric=metric)
    result = low_rank_correction(weight, form, statistics, options)
    for name, made in (("error_before", form), ("error_after", result.form)):
        assert result.report[name] == pytest.approx(output_error(weight, made.dense(), x), rel=1e-3)
    plain = low_rank_correction(weight, form, None, CorrectionOptions(rank=2, metric="none")).report
    strayed = (weight - form.dense()).square().sum() / weight.square().sum()
    assert plain["error_before"] == pytest.approx(float(strayed), rel=1e-4)
