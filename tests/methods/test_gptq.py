"""GPTQ against exact OBS in float64, against brute force, and against plain rounding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.forms import Quantized
from lmpress.methods.gptq import GptqOptions, columns_in_order, gptq
from lmpress.methods.hessian import damped_inverse_factor, layer_loss
from lmpress.methods.rtn import RoundOptions, fit_grid, round_to_nearest
from lmpress.statistics import InputStatistics


def inputs(n: int, tokens: int = 400, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    scale = torch.exp(spread * torch.randn(n, generator=generator))
    return torch.randn(tokens, n, generator=generator) @ mixing * scale


def statistics_of(x: Tensor) -> InputStatistics:
    hessian = (x.T @ x / len(x)).float()
    return InputStatistics(len(x), x.mean(0), hessian.diagonal().clone(), x.abs().mean(0), hessian)


def random_weight(rows: int, columns: int, seed: int = 7) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def loss_of(weight: Tensor, form: Any, statistics: InputStatistics) -> float:
    return layer_loss(weight - form.dense(), statistics.require_hessian())


CASES = [
    {"bits": 4, "granularity": "group:16", "symmetric": True},
    {"bits": 3, "granularity": "group:16", "symmetric": False},
    {"bits": 2, "granularity": "channel", "symmetric": False},
    {"bits": 3, "granularity": "channel", "symmetric": True},
    {"bits": 8, "granularity": "channel", "symmetric": True},
    {"bits": 4, "granularity": "tensor", "symmetric": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("order", ["none", "group-aware", "activation"])
def test_better_than_rounding_and_on_the_grid(case: dict[str, Any], order: str) -> None:
    weight, statistics = random_weight(24, 64), statistics_of(inputs(64))
    result = gptq(weight, statistics, GptqOptions(**case, order=order, clip=True))
    form = result.form
    assert isinstance(form, Quantized)
    assert (form.bits, form.granularity, form.symmetric) == tuple(case.values())
    rounded = round_to_nearest(weight, statistics, RoundOptions(**case, clip=True)).form
    loss, plain = loss_of(weight, form, statistics), loss_of(weight, rounded, statistics)
    assert loss < 0.9 * plain
    reference = layer_loss(weight, statistics.require_hessian())
    assert result.report["output_error"] == pytest.approx(loss / reference, rel=1e-3)
    assert result.report["rounded_error"] > result.report["output_error"]


@pytest.mark.parametrize("order", ["none", "group-aware", "activation"])
def test_columns_follow_exact_obs(order: str) -> None:
    """In float64: fix the columns one by one, and re-solve the others by least squares each time."""
    weight, statistics = random_weight(10, 32), statistics_of(inputs(32))
    options = GptqOptions(
        bits=3, granularity="group:8", symmetric=True, order=order, clip=False, damping=0.02
    )
    form = gptq(weight, statistics, options).form
    hessian = statistics.require_hessian().double()
    hessian = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    scale, _ = fit_grid(weight, 3, "group:8", True)
    current, original = weight.double().clone(), weight.double()
    rank = columns_in_order(statistics.second_moment, options).tolist()
    for k, j in enumerate(rank):
        step = scale[:, j // 8].double()
        current[:, j] = (current[:, j] / step).round().clamp(-4, 3) * step
        done, rest = rank[: k + 1], rank[k + 1 :]
        if rest:
            fixed = (current - original)[:, done]
            solved = torch.linalg.solve(hessian[rest][:, rest], hessian[rest][:, done] @ fixed.T).T
            current[:, rest] = original[:, rest] - solved
    same = (form.dense().double() - current).abs() < 1e-6
    assert same.double().mean() > 0.99  # a tie or a float32 rounding may tip a code


def test_sweeps_reach_the_optimum_of_a_tiny_grid() -> None:
    weight, statistics = random_weight(20, 4), statistics_of(inputs(4, spread=0.3))
    options = GptqOptions(bits=2, granularity="channel", symmetric=True, damping=0.0, clip=False)
    scale, _ = fit_grid(weight, 2, "channel", True)
    hessian = statistics.require_hessian()
    grid = torch.tensor(list(itertools.product(range(-2, 2), repeat=4))).float()
    difference = weight[:, None, :] - scale.float()[:, :, None] * grid  # (out, points, in)
    losses = ((difference @ hessian) * difference).sum(-1)
    best = losses.amin(1)

    def by_row(form: Any) -> Tensor:
        d = weight - form.dense()
        return ((d @ hessian) * d).sum(-1)

    plain = by_row(round_to_nearest(weight, None, RoundOptions(bits=2)).form)
    solved = by_row(gptq(weight, statistics, options).form)
    swept = by_row(gptq(weight, statistics, GptqOptions(**{**vars(options), "sweeps": 3})).form)
    assert (solved >= best * 0.999).all()
    assert (swept <= solved * 1.001).all()
    assert best.sum() <= swept.sum() <= solved.sum() < plain.sum()
    assert swept.sum() < 1.1 * best.sum()


def test_sweeps_never_raise_the_loss() -> None:
    weight, statistics = random_weight(16, 48), statistics_of(inputs(48))
    options = GptqOptions(bits=3, granularity="group:16", damping=0.0, symmetric=False, clip=True)
    losses = [
        loss_of(weight, gptq(weight, statistics, replace(options, sweeps=n)).form, statistics)
        for n in range(4)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[3] < losses[0]


def test_rows_do_not_know_of_each_other() -> None:
    weight, statistics = random_weight(12, 32), statistics_of(inputs(32))
    options = GptqOptions(bits=4, granularity="group:8", symmetric=False, clip=True)
    whole = gptq(weight, statistics, options).form.dense()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = gptq(weight[order], statistics, options).form.dense()
    assert ((shuffled - whole[order]).abs() < 1e-6).double().mean() > 0.99


def test_inputs_may_be_permuted_within_the_order() -> None:
    """With columns sorted by energy, a permutation of the inputs permutes the result."""
    x = inputs(32)
    weight, statistics = random_weight(12, 32), statistics_of(x)
    options = GptqOptions(bits=4, granularity="channel", order="activation", clip=True)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    whole = gptq(weight, statistics, options).form.dense()
    permuted = gptq(weight[:, order], statistics_of(x[:, order]), options).form.dense()
    assert ((permuted - whole[:, order]).abs() < 1e-6).double().mean() > 0.99


def test_orders() -> None:
    energy = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0])
    assert columns_in_order(energy, GptqOptions(order="none")).tolist() == [0, 1, 2, 3, 4, 5]
    grouped = GptqOptions(order="group-aware", granularity="group:2")
    assert columns_in_order(energy, grouped).tolist() == [3, 2, 1, 0, 4, 5]
    assert columns_in_order(energy, GptqOptions(order="activation")).tolist() == [3, 1, 4, 5, 2, 0]


def test_dynamic_groups_fit_the_compensated_weight() -> None:
    weight, statistics = random_weight(24, 64), statistics_of(inputs(64))
    for symmetric in (True, False):
        options = GptqOptions(bits=3, granularity="group:16", symmetric=symmetric, clip=True)
        result = gptq(weight, statistics, replace(options, static_groups=False))
        static = gptq(weight, statistics, options)
        assert isinstance(result.form, Quantized)
        assert isinstance(static.form, Quantized)
        assert not torch.equal(result.form.scale, static.form.scale)
        assert result.report["output_error"] < 0.8 * result.report["rounded_error"]
        assert result.report["rounded_error"] == static.report["rounded_error"]


def test_a_diagonal_hessian_leaves_plain_rounding() -> None:
    weight = random_weight(8, 16)
    energy = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.1
    statistics = InputStatistics(9, torch.zeros(16), energy, None, torch.diag(energy))
    result = gptq(weight, statistics, GptqOptions(bits=4, granularity="group:8", damping=0.0, clip=True))
    solved = result.form
    rounded = round_to_nearest(
        weight, statistics, RoundOptions(bits=4, granularity="group:8", clip=True)
    ).form
    assert torch.equal(solved.dense(), rounded.dense())
    assert result.report["rounded_error"] == result.report["output_error"]


def test_asymmetric_calibration_serves_the_original_outputs() -> None:
    weight, generator = random_weight(16, 32), torch.Generator().manual_seed(5)
    original = inputs(32, tokens=800)
    compressed = original + 0.5 * torch.randn(800, 32, generator=generator) * original.std(0)
    statistics = statistics_of(compressed)
    cross = (original - compressed).T @ compressed / len(original)
    options = GptqOptions(bits=4, granularity="channel", asymmetry=1.0, damping=1e-4, clip=True)

    def error(form: Any) -> float:
        return float((original @ weight.T - compressed @ form.dense().T).square().mean())

    plain = gptq(weight, statistics, options).form
    moved = gptq(weight, statistics, options, cross=cross).form
    target = weight @ original.T @ compressed @ torch.linalg.inv(compressed.T @ compressed)
    least = float((original @ weight.T - compressed @ target.T).square().mean())
    assert error(moved) < error(plain)
    assert error(moved) < 1.1 * least
    none = gptq(weight, statistics, GptqOptions(**{**vars(options), "asymmetry": 0.0}), cross=cross).form
    assert torch.equal(none.dense(), plain.dense())


def test_a_singular_hessian_is_mended_and_told() -> None:
    weight, statistics = random_weight(8, 64), statistics_of(inputs(64, tokens=10))
    options = GptqOptions(bits=4, granularity="channel", damping=0.0, clip=True)
    report = gptq(weight, statistics, options).report
    assert report["damping"] > 0
    assert report["tokens"] == 10
    assert report["output_error"] < report["rounded_error"]


def test_dead_inputs_are_rounded() -> None:
    x = inputs(16)
    x[:, 5] = 0
    weight = random_weight(8, 16)
    result = gptq(weight, statistics_of(x), GptqOptions(bits=8, granularity="channel", clip=True))
    assert result.report["dead_inputs"] == 1
    assert float((result.form.dense() - weight)[:, 5].abs().max()) < 0.01


def test_bad_requests() -> None:
    weight, statistics = random_weight(4, 16), statistics_of(inputs(16))
    with pytest.raises(ValueError, match="bits"):
        GptqOptions(bits=9)
    with pytest.raises(ValueError, match="order"):
        GptqOptions(order="random")
    with pytest.raises(ValueError, match="static"):
        GptqOptions(order="activation", granularity="group:64", static_groups=False)
    with pytest.raises(ValueError, match="divide"):
        gptq(weight, statistics, GptqOptions(granularity="group:5"))
    with pytest.raises(ValueError, match="not fit a weight"):
        gptq(weight[:, :8], statistics, GptqOptions())
    with pytest.raises(ValueError, match="Hessian"):
        gptq(weight, InputStatistics(1, torch.zeros(16), torch.ones(16), None, None), GptqOptions())
    with pytest.raises(ValueError, match="cross"):
        gptq(weight, statistics, GptqOptions(granularity="channel", asymmetry=0.5), cross=torch.zeros(3, 3))


def test_half_precision_weights_and_determinism() -> None:
    weight, statistics = random_weight(8, 32).to(torch.bfloat16), statistics_of(inputs(32))
    first = gptq(weight, statistics, GptqOptions(granularity="group:8", clip=True)).form
    again = gptq(weight, statistics, GptqOptions(granularity="group:8", clip=True)).form
    assert torch.equal(first.dense(), again.dense())
    upper = damped_inverse_factor(statistics.require_hessian()).upper
    assert upper.dtype == torch.float32
