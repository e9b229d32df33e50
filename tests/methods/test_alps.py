"""ALPS: the support it finds and the values on it, against least squares row by row."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lmpress.forms import Sparse
from lmpress.methods.alps import Admm, AlpsOptions, Metric, alps, refit
from lmpress.methods.patterns import keep_largest
from tests.methods.layers import layer, output_error, statistics_of
from tests.methods.test_sparsegpt import least_squares


def test_the_metric_is_the_damped_hessian_in_scaled_inputs() -> None:
    weight, _, statistics = layer(6, 12)
    hessian = statistics.require_hessian().double()
    metric = Metric.of(statistics.require_hessian(), 0.1)
    damped = hessian + torch.diag(0.1 * hessian.diagonal())
    scaled = metric.scaled(weight).double()
    expected = (weight.double() @ damped * weight.double()).sum()
    assert float(expected) == pytest.approx(float((scaled @ metric.matrix.double() * scaled).sum()), rel=1e-5)
    torch.testing.assert_close(metric.unscaled(metric.scaled(weight)), weight)


def test_refit_is_least_squares_on_each_rows_support() -> None:
    weight, _, statistics = layer(6, 16)
    hessian = statistics.require_hessian().double()
    metric = Metric.of(statistics.require_hessian(), 0.1)
    mask = keep_largest(weight.abs(), 0.5, None, per_row=False)
    expected = least_squares(weight, hessian + torch.diag(0.1 * hessian.diagonal()), mask)
    found = refit(weight, metric, mask, weight, 60)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert not found[~mask].any()


def test_refit_never_raises_the_loss() -> None:
    weight, x, statistics = layer(6, 16)
    metric = Metric.of(statistics.require_hessian(), 0.0)
    mask = keep_largest(weight.abs(), 0.5, None, per_row=False)
    errors = [output_error(weight, refit(weight, metric, mask, weight, k), x) for k in range(6)]
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.parametrize(("pattern", "kept"), [("unstructured", 24 * 12), ("2:4", 24 * 16), ("1:4", 24 * 8)])
def test_pattern_and_report(pattern: str, kept: int) -> None:
    weight, x, statistics = layer(24, 32)
    result = alps(weight, statistics, AlpsOptions(sparsity=0.625, pattern=pattern))
    assert isinstance(result.form, Sparse)
    assert result.form.pattern.kept == kept
    error = output_error(weight, result.form.dense(), x)
    assert result.report["output_error"] == pytest.approx(error, rel=1e-3)
    assert 30 <= result.report["iterations"] <= 300


def test_protected_entries_stay() -> None:
    weight, _, statistics = layer(8, 16)
    protected = torch.zeros(8, 16, dtype=torch.bool)
    protected[:, 5] = True
    metric = Metric.of(statistics.require_hessian(), 0.1)
    admm = Admm(metric, 0.25, None, protected=protected)
    admm.start(metric.scaled(weight))
    for _ in range(20):
        admm.step(metric.scaled(weight) @ metric.matrix)
    assert bool(admm.support[:, 5].all())
    assert int(admm.support.sum()) == 32


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations"):
        AlpsOptions(iterations=0)
    with pytest.raises(ValueError, match="sparsity lies"):
        AlpsOptions(sparsity=1.5)


def test_rows_and_the_dense_output_guide_the_support() -> None:
    weight, x, statistics = layer(24, 64)
    weights = torch.ones(24)
    weights[:8] = 4
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    original = x + 0.3 * noise * x.std(0)
    cross = (original - x).T @ x / len(x)

    def made(**how: torch.Tensor) -> torch.Tensor:
        return alps(weight, statistics, AlpsOptions(0.6, asymmetry=1.0), **how).form.dense()

    scale = weights[:, None]
    plain, shifted = made(), made(row_weights=weights)
    assert output_error(weight * scale, shifted * scale, x) < 0.9 * output_error(
        weight * scale, plain * scale, x
    )
    wanted = original @ weight.T
    moved = made(cross=cross)
    assert float((x @ moved.T - wanted).square().sum()) < float((x @ plain.T - wanted).square().sum())


@pytest.mark.parametrize("rank", [1, 3])
def test_a_metric_that_cannot_be_factored_is_damped_and_told(rank: int) -> None:
    """Without damping, inputs that say the same leave rounding alone between H and an indefinite matrix."""
    x = torch.randn(50, rank, generator=torch.Generator().manual_seed(2)) @ torch.randn(
        rank, 24, generator=torch.Generator().manual_seed(3)
    )
    weight = layer(8, 24)[0]
    statistics = statistics_of(100 * x)
    hessian = statistics.require_hessian()
    size = hessian.diagonal().sqrt()
    noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(4))
    hessian = hessian + 0.05 * noise.fill_diagonal_(0) * size * size[:, None]
    crooked = replace(statistics, hessian=(hessian + hessian.T) / 2)
    result = alps(weight, crooked, AlpsOptions(damping=0.0, iterations=120))
    assert isinstance(result.form, Sparse)
    assert result.form.density == 0.5
    assert bool(torch.isfinite(result.form.dense()).all())
    assert result.report["damping"] > 0
    whole = alps(weight, layer(8, 24)[2], AlpsOptions(damping=0.0, iterations=120))
    assert whole.report["damping"] == 0


def naive_admm(weight: Tensor, hessian: Tensor, damping: float, kept: int, most: int) -> tuple[Tensor, int]:
    """The support by the letter of the paper, float64, a new inverse at every step; and the steps."""
    hessian = hessian.double()
    hessian = hessian + torch.diag((damping + 1e-8) * hessian.diagonal())
    size = hessian.diagonal().sqrt()
    matrix, target = hessian / size / size[:, None], weight.double() * size

    def largest(values: Tensor) -> Tensor:
        mask = torch.zeros(values.numel(), dtype=torch.bool)
        mask[values.abs().flatten().topk(kept).indices] = True
        return mask.view(values.shape)

    rho, dual, last = 0.1, torch.zeros_like(target), largest(target)
    sparse, support = target * last, last
    for step in range(1, most + 1):
        wanted = target @ matrix - dual + rho * sparse
        dense = torch.linalg.solve(matrix + rho * torch.eye(len(matrix)), wanted, left=False)
        support = largest(dense + dual / rho)
        sparse = (dense + dual / rho) * support
        dual = dual + rho * (dense - sparse)
        if step % 3:
            continue
        moved = int((support != last).sum()) / kept
        if step >= 30 and moved < 3e-4:
            return support, step
        last = support
        rho *= 1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1 if moved > 0 else 0.2
    return support, most


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_support_is_that_of_admm_done_naively(seed: int) -> None:
    weight, _, statistics = layer(32, 48, seed=seed)
    options = AlpsOptions(sparsity=0.6, damping=0.05, refit=0)
    result = alps(weight, statistics, options)
    assert isinstance(result.form, Sparse)
    expected, steps = naive_admm(weight, statistics.require_hessian(), 0.05, round(0.4 * 32 * 48), 300)
    assert result.report["iterations"] == steps
    assert 30 <= steps < 300
    assert float((result.form.pattern.mask() != expected).float().mean()) < 0.002
    for few in (1, 5):
        started = alps(weight, statistics, replace(options, iterations=few))
        assert started.report["iterations"] == few
        assert isinstance(started.form, Sparse)
        expected, _ = naive_admm(weight, statistics.require_hessian(), 0.05, round(0.4 * 32 * 48), few)
        assert float((started.form.pattern.mask() != expected).float().mean()) < 0.002
