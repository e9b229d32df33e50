"""Shares of one budget against pooling every score, and scores against removal done in earnest."""

import pytest
import torch

from lmpress.methods.sparsity_allocation import (
    QUANTILES,
    SPREAD,
    removal_costs,
    removal_curve,
    shares_for_budget,
)
from tests.methods.layers import layer


def test_a_cost_is_what_the_loss_rises_by() -> None:
    weight, _, statistics = layer(3, 12)
    hessian = statistics.require_hessian().double()
    hessian.diagonal().mul_(1.05)
    costs = removal_costs(statistics, 0.05)
    for j in (0, 7):
        rest = [k for k in range(12) if k != j]
        moment = (weight.double() @ hessian)[:, rest]
        fitted = torch.zeros(3, 12, dtype=torch.float64)
        fitted[:, rest] = torch.linalg.solve(hessian[rest][:, rest], moment.T).T  # the rest makes up for it
        lost = weight.double() - fitted
        rises = ((lost @ hessian) * lost).sum(1)
        torch.testing.assert_close((weight[:, j].square() * costs[j]).double(), rises, rtol=1e-3, atol=1e-6)


def test_a_curve_has_the_quantiles_of_the_scores() -> None:
    weight, _, statistics = layer(40, 64)
    sensitivity = torch.rand(40) + 0.1
    costs = removal_costs(statistics, 0.1)
    scores = (weight.square() * costs * sensitivity[:, None]).log2().flatten()
    curve = removal_curve(weight, costs, sensitivity)
    below = [float((scores < level).float().mean()) for level in curve]
    assert below == pytest.approx([(k + 0.5) / QUANTILES for k in range(QUANTILES)], abs=1 / QUANTILES)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_the_shares_are_those_of_one_threshold_over_all_scores(keep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, shifts = [(64, 64), (64, 192), (192, 64)], [0.0, 0.5, -0.2]
    statistics = [layer(4, n, seed=i)[2] for i, (_, n) in enumerate(shapes)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    costs = [removal_costs(own, 0.1) for own in statistics]
    rows = [torch.full((shape[0],), 2.0**shift) for shape, shift in zip(shapes, shifts, strict=True)]
    pooled = [w.square() * c * r[:, None] for w, c, r in zip(weights, costs, rows, strict=True)]
    every = torch.cat([scores.flatten() for scores in pooled]).sort(descending=True).values
    threshold = every[round(keep * len(every))]
    expected = [float((s > threshold).float().mean()) for s in pooled]
    reach = SPREAD * min(keep, 1 - keep)
    assert all(abs(share - keep) < reach for share in expected)
    curves = [removal_curve(w, c, r) for w, c, r in zip(weights, costs, rows, strict=True)]
    shares = shares_for_budget(curves, [w.numel() for w in weights], keep)
    assert max(shares) - min(shares) > 0.02
    assert shares == pytest.approx(expected, abs=0.01)
    total = sum(w.numel() for w in weights)
    assert sum(s * w.numel() for s, w in zip(shares, weights, strict=True)) == pytest.approx(keep * total)


def test_no_module_is_given_up_or_left_whole() -> None:
    faint, loud = [float(x) for x in range(-QUANTILES, 0)], [float(x) for x in range(QUANTILES)]
    for keep in (0.5, 0.2):
        shares = shares_for_budget([faint, loud], [100, 100], keep)
        reach = SPREAD * min(keep, 1 - keep)
        assert shares == pytest.approx([keep - reach, keep + reach], abs=1e-3)


def test_one_curve_a_module() -> None:
    assert shares_for_budget([], [], 0.5) == []
    with pytest.raises(ValueError, match="one curve"):
        shares_for_budget([[0.0]], [1, 2], 0.5)


def test_a_module_without_a_gradient_is_missed_least() -> None:
    weight, _, statistics = layer(16, 32)
    costs = removal_costs(statistics, 0.1)
    curves = [removal_curve(weight, costs, torch.full((16,), s)) for s in (0.0, 1e-9)]
    assert max(curves[0]) < min(curves[1])
    assert shares_for_budget(curves, [1, 1], 0.5) == pytest.approx([0.5 - SPREAD / 2, 0.5 + SPREAD / 2])
