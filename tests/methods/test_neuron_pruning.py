"""Neuron pruning against least squares on the activations, and against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpress.methods.neuron_pruning import (
    NeuronChoice,
    NeuronOptions,
    aligned_width,
    allocate_widths,
    paper_ratios,
    prune_neurons,
    removal_curve,
)
from lmpress.statistics import InputStatistics
from tests.methods.data import inputs, statistics_of, weights

EXACT = NeuronOptions(damping=0.0)


def case(d: int, f: int, seed: int, tokens: int = 300) -> tuple[Tensor, Tensor, InputStatistics]:
    x = inputs(f, tokens, seed)
    return weights(d, f, seed + 1), x, statistics_of(x)


def regression(weight: Tensor, x: Tensor, kept: list[int], bias: bool) -> tuple[Tensor, Tensor, float]:
    """The best columns (d, kept) and constant (d,) for the outputs, by lstsq; and the mean squared error."""
    design = x[:, kept]
    if bias:
        design = torch.cat([design, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    solution = torch.linalg.lstsq(design, x @ weight.T, driver="gelsd").solution  # (kept + 1, d)
    loss = float((x @ weight.T - design @ solution).square().sum() / len(x))
    constant = solution[-1] if bias else torch.zeros(len(weight), dtype=x.dtype)
    return solution[: len(kept)].T, constant, loss


def loss_of(weight: Tensor, x: Tensor, choice: NeuronChoice) -> float:
    y = x[:, choice.keep] @ choice.output.T.double()
    if choice.bias_delta is not None:
        y = y + choice.bias_delta
    return float((x @ weight.T - y).square().sum() / len(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("importance", ["output", "activation"])
@pytest.mark.parametrize("keep", [1, 7, 19, 20])
def test_the_kept_columns_solve_the_regression(bias: bool, importance: str, keep: int) -> None:
    weight, x, statistics = case(6, 20, 0)
    before = statistics.require_hessian().clone()
    choice = prune_neurons(
        weight,
        statistics,
        keep,
        NeuronOptions(importance, damping=0.0),
        activation=statistics.abs_mean,
        output_bias=torch.zeros(6) if bias else None,
    )
    assert torch.equal(statistics.require_hessian(), before)
    assert choice.keep.dtype == torch.int64
    assert len(choice.keep) == keep
    assert torch.equal(choice.keep, choice.keep.unique())  # ascending
    columns, constant, loss = regression(weight, x, choice.keep.tolist(), bias)
    torch.testing.assert_close(choice.output, columns, rtol=1e-4, atol=1e-5)
    if bias:
        assert choice.bias_delta is not None
        torch.testing.assert_close(choice.bias_delta, constant, rtol=1e-4, atol=1e-5)
    else:
        assert choice.bias_delta is None
    total = float((x @ weight.T).square().sum() / len(x))
    assert loss_of(weight, x, choice) == pytest.approx(loss, abs=1e-6 * total)
    assert choice.report["relative_error"] == pytest.approx(math.sqrt(loss / total), abs=1e-5)
    plain = weight.clone()
    plain[:, choice.keep] = 0
    dropped = float((x @ plain.T).square().sum() / len(x))
    assert choice.report["relative_error_dropped"] == pytest.approx(math.sqrt(dropped / total), rel=1e-6)
    assert (choice.report["kept"], choice.report["removed"]) == (keep, 20 - keep)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**20), st.booleans())
def test_the_first_removal_is_the_cheapest_of_all(d: int, f: int, seed: int, bias: bool) -> None:
    weight, x, statistics = case(d, f, seed)
    choice = prune_neurons(weight, statistics, f - 1, EXACT, output_bias=torch.zeros(d) if bias else None)
    losses = [regression(weight, x, [i for i in range(f) if i != j], bias)[2] for j in range(f)]
    assert loss_of(weight, x, choice) <= min(losses) * (1 + 1e-4) + 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(3, 9), st.data(), st.integers(0, 2**20))
def test_removal_is_greedy_one_by_one(d: int, f: int, data: st.DataObject, seed: int) -> None:
    weight, x, statistics = case(d, f, seed)
    kept = list(range(f))
    keep = data.draw(st.integers(1, f - 1))
    while len(kept) > keep:  # every candidate tried by regression
        trials = [(regression(weight, x, [i for i in kept if i != j], False)[2], j) for j in kept]
        kept.remove(min(trials)[1])
    choice = prune_neurons(weight, statistics, keep, EXACT)
    reference = regression(weight, x, kept, False)[2]
    assert loss_of(weight, x, choice) <= reference * (1 + 1e-4) + 1e-9


def test_many_neurons_in_batches_are_as_good_as_one_by_one() -> None:
    weight, x, statistics = case(8, 120, 3, tokens=1000)
    choice = prune_neurons(weight, statistics, 20, EXACT)  # batches of four
    hessian, kept = statistics.require_hessian().double(), list(range(120))
    while len(kept) > 20:
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        columns = weight @ hessian[:, kept] @ inverse
        kept.pop(int((columns.square().sum(0) / inverse.diagonal()).argmin()))
    reference = regression(weight, x, kept, False)[2]
    assert loss_of(weight, x, choice) <= 1.02 * reference


def test_twins_do_not_go_together() -> None:
    weight, x, _ = case(4, 40, 4)
    x[:, 20:] = x[:, :20]  # each neuron has a twin: one of them is free to remove
    weight[:, 20:] = weight[:, :20]
    choice = prune_neurons(weight, statistics_of(x), 20, NeuronOptions(damping=1e-6))
    assert sorted(int(j) % 20 for j in choice.keep) == list(range(20))
    assert choice.report["relative_error"] < 0.01
    assert choice.report["relative_error_dropped"] > 0.4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 8), st.data(), st.integers(0, 2**20))
def test_without_compensation_the_loss_of_dropping_is_what_counts(
    d: int, f: int, data: st.DataObject, seed: int
) -> None:
    weight, x, statistics = case(d, f, seed)
    keep = data.draw(st.integers(1, f - 1))
    bias = torch.zeros(d)
    choice = prune_neurons(weight, statistics, keep, NeuronOptions(compensate=False), output_bias=bias)
    assert torch.equal(choice.output, weight[:, choice.keep])
    assert choice.bias_delta is None

    def dropping(gone: list[int]) -> float:
        return float((x[:, gone] @ weight[:, gone].T).square().sum() / len(x))

    gone: list[int] = []
    while len(gone) < f - keep:
        gone.append(min((j for j in range(f) if j not in gone), key=lambda j: dropping([*gone, j])))
    assert loss_of(weight, x, choice) <= dropping(gone) * (1 + 1e-9)
    assert choice.report["relative_error"] == pytest.approx(choice.report["relative_error_dropped"])


def test_activation_needs_no_statistics() -> None:
    weight = weights(3, 6, 0)
    activation = torch.tensor([0.5, 3.0, 0.1, 2.0, 0.5, 0.1])
    options = NeuronOptions("activation", compensate=False)
    choice = prune_neurons(weight, None, 3, options, activation=activation)
    assert choice.keep.tolist() == [0, 1, 3]  # of equals, the first stays
    assert torch.equal(choice.output, weight[:, [0, 1, 3]])
    assert choice.report == {"kept": 3, "removed": 3, "damping": 0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_damping_takes_few_tokens_and_dead_neurons(dtype: torch.dtype, bias: bool) -> None:
    x = inputs(30, 12, 5)  # fewer tokens than neurons
    x[:, [3, 4]] = 0
    x[:, 9] = 2.0  # a constant neuron
    weight = weights(6, 30, 6).to(dtype)
    output_bias = torch.zeros(6) if bias else None
    choice = prune_neurons(
        weight, statistics_of(x, torch.float32), 20, NeuronOptions(), output_bias=output_bias
    )
    assert choice.output.dtype == dtype
    assert bool(torch.isfinite(choice.output).all())
    assert not {3, 4} & set(choice.keep.tolist())
    assert choice.report["relative_error"] < 0.2
    if choice.bias_delta is not None:
        assert choice.bias_delta.dtype == dtype
        assert 9 not in choice.keep.tolist()  # the bias does what it did
        assert loss_of(weight.double(), x, choice) < 0.05 * float((x @ weight.double().T).square().sum() / 12)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_curve_is_the_loss_of_the_best_columns(has_bias: bool) -> None:
    weight, x, statistics = case(5, 24, 7)
    widths = [6, 24, 12, 23, 1]
    curve = removal_curve(weight, statistics, widths, damping=0.0, has_bias=has_bias)
    assert curve[1] == 0.0
    ordered = [loss for _, loss in sorted(zip(widths, curve, strict=True))]
    assert ordered == sorted(ordered, reverse=True)
    bias = torch.zeros(5) if has_bias else None
    for width, loss in zip(widths, curve, strict=True):
        choice = prune_neurons(weight, statistics, width, EXACT, output_bias=bias)
        assert loss == pytest.approx(loss_of(weight, x, choice), rel=1e-3, abs=1e-6)


def test_the_curve_of_a_damped_solution_is_its_undamped_loss() -> None:
    weight, x, statistics = case(5, 24, 8, tokens=30)
    (loss,) = removal_curve(weight, statistics, [10])
    choice = prune_neurons(weight, statistics, 10, NeuronOptions())
    assert loss == pytest.approx(loss_of(weight, x, choice), rel=1e-4)
    assert removal_curve(weight, statistics, []) == []
    assert removal_curve(weight, statistics, [24, 24]) == [0.0, 0.0]


def test_paper_ratios_by_the_formula() -> None:
    means = [1.0, 0.1, 0.01, 10**-0.5]
    assert paper_ratios(means, 0.0, 0.05) == pytest.approx([0.0, 0.025, 0.05, 0.0125])
    assert paper_ratios(means, 0.1, 0.3)[1] == pytest.approx(0.2)
    assert paper_ratios([0.3, 0.3], 0.02, 0.05) == [0.02, 0.02]
    assert paper_ratios([], 0.0, 0.05) == []
    silent = paper_ratios([1.0, 0.0], 0.0, 0.05)
    assert silent == pytest.approx([0.0, 0.05])
    for ratios in ((0.2, 0.1), (-0.1, 0.1), (0.0, 1.0)):
        with pytest.raises(ValueError, match="min <= max"):
            paper_ratios(means, *ratios)
    with pytest.raises(ValueError, match="finite"):
        paper_ratios([1.0, float("nan")], 0.0, 0.05)


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "kept"),
    [
        (1536, 0.05, 1, 1459),  # int(1459.2), as the reference does
        (1536, 0.05, 32, 1472),  # 1459.2 / 32 = 45.6
        (1536, 0.06, 32, 1440),  # 1443 / 32 = 45.1
        (1536, 0.0, 1000, 1536),  # nothing to remove
        (1536, 0.001, 32, 1536),
        (100, 0.5, 20, 60),  # a half goes upwards
        (100, 0.99, 32, 32),  # never nothing
        (20, 0.9, 32, 20),  # never more than there is
        (1010, 0.001, 32, 1010),
        (5, 1.0, 1, 1),
    ],
)
def test_aligned_widths(width: int, ratio: float, multiple: int, kept: int) -> None:
    assert aligned_width(width, ratio, multiple) == kept


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_allocation_is_the_best_of_all(data: st.DataObject) -> None:
    layers, unit = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3, 32]))
    loss = st.integers(0, 100)  # whole numbers: sums are exact, ties are frequent
    curves = []
    for _ in range(layers):
        full = data.draw(st.integers(5, 8)) * unit
        steps = data.draw(st.sets(st.integers(1, 4), max_size=3))
        curves.append({full: 0.0} | {full - step * unit: float(data.draw(loss)) for step in steps})
    weights_ = [float(data.draw(st.integers(0, 5))) for _ in range(layers)]
    most = sum(max(c) - min(c) for c in curves)
    total = data.draw(st.integers(-2, most))

    def cost(widths: tuple[int, ...] | list[int]) -> float:
        return sum(w * c[width] for w, c, width in zip(weights_, curves, widths, strict=True))

    def removed(widths: tuple[int, ...] | list[int]) -> int:
        return sum(max(c) - width for c, width in zip(curves, widths, strict=True))

    chosen = allocate_widths(curves, weights_, total)
    assert all(width in curve for width, curve in zip(chosen, curves, strict=True))
    assert removed(chosen) >= total
    assert cost(chosen) == min(cost(w) for w in itertools.product(*curves) if removed(w) >= total)
    with pytest.raises(ValueError, match="cannot remove"):
        allocate_widths(curves, weights_, most + 1)


def test_allocation_keeps_all_where_nothing_is_asked() -> None:
    assert allocate_widths([{8: 0.0, 4: 0.0}, {6: 0.0, 3: 1.0}], [1.0, 1.0], 0) == [8, 6]
    with pytest.raises(ValueError, match="2 curves, but 1 weights"):
        allocate_widths([{8: 0.0}, {6: 0.0}], [1.0], 0)


def test_what_cannot_be_pruned_is_refused() -> None:
    weight, _, statistics = case(3, 6, 9)
    diagonal = InputStatistics(3, statistics.mean, statistics.second_moment, None, None)
    for keep in (0, 7):
        with pytest.raises(ValueError, match="keep 1 to 6 neurons"):
            prune_neurons(weight, statistics, keep, EXACT)
    for missing in (None, diagonal):
        with pytest.raises(ValueError, match="need the Hessian"):
            prune_neurons(weight, missing, 3, EXACT)
    with pytest.raises(ValueError, match="mean activations of the 6 neurons"):
        prune_neurons(
            weight, None, 3, NeuronOptions("activation", compensate=False), activation=torch.ones(5)
        )
    with pytest.raises(ValueError, match="widths lie between"):
        removal_curve(weight, statistics, [0])
    with pytest.raises(ValueError, match="output or activation"):
        NeuronOptions("magnitude")
    with pytest.raises(ValueError, match="damping is not negative"):
        NeuronOptions(damping=-1)
    with pytest.raises(ValueError, match="no width for"):
        aligned_width(0, 0.5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_neurons(weight * math.nan, statistics, 3, EXACT)
