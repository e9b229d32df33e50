"""SparseGPT against OBS done naively in float64, and the orders that the papers report."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lmpress.forms import Quantized, Sparse
from lmpress.methods.alps import AlpsOptions, alps
from lmpress.methods.rtn import fit_grid
from lmpress.methods.sparsegpt import (
    SparseGptOptions,
    prune_then_quantize,
    quantize_survivors,
    sparsegpt,
)
from lmpress.methods.wanda import WandaOptions, wanda
from tests.methods.layers import layer, output_error, statistics_of


def obs(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Remove what is not in `mask` column by column, each time with the inverse of what is left of H."""
    result = weight.double().clone()
    columns = weight.shape[1]
    for i in range(weight.shape[0]):
        for j in range(columns):
            if not mask[i, j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                result[i, j:] -= result[i, j] / inverse[0, 0] * inverse[:, 0]
                result[i, j] = 0
    return result


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def least_squares(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The best values on each row's support."""
    result = torch.zeros_like(weight, dtype=torch.float64)
    for i in range(weight.shape[0]):
        kept = mask[i]
        moment = (hessian @ weight[i].double())[kept]
        result[i, kept] = torch.linalg.solve(hessian[kept][:, kept], moment)
    return result


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "6:8"])
def test_values_are_those_of_obs_on_the_same_mask(pattern: str) -> None:
    weight, _, statistics = layer(5, 16)
    form = sparsegpt(weight, statistics, SparseGptOptions(sparsity=0.4, pattern=pattern, block=8)).form
    assert isinstance(form, Sparse)
    mask = form.pattern.mask()
    expected = obs(weight, damped(statistics.require_hessian()), mask)
    torch.testing.assert_close(form.dense().double(), expected, rtol=2e-3, atol=2e-3)


def test_the_mask_of_the_first_block_is_by_the_obs_score() -> None:
    weight, _, statistics = layer(5, 16)
    form = sparsegpt(weight, statistics, SparseGptOptions(block=16)).form
    assert isinstance(form, Sparse)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(statistics.require_hessian())), upper=True)
    scores = (weight.double() / upper.diagonal()).square()
    assert set(scores.flatten().topk(40).indices.tolist()) == set(
        form.pattern.mask().flatten().nonzero()[:, 0].tolist()
    )


def test_close_to_the_best_of_all_masks_on_one_row() -> None:
    weight, _, statistics = layer(1, 8)
    hessian = damped(statistics.require_hessian())

    def loss(candidate: Tensor) -> float:
        difference = weight.double() - candidate.double()
        return float((difference @ hessian * difference).sum())

    best = min(
        loss(least_squares(weight, hessian, torch.isin(torch.arange(8), torch.tensor(kept))[None]))
        for kept in combinations(range(8), 4)
    )
    found = loss(sparsegpt(weight, statistics, SparseGptOptions(sweeps=20)).form.dense())
    plain = loss(wanda(weight, statistics, WandaOptions()).form.dense())
    assert best <= found * (1 + 1e-5)
    assert found < plain
    assert found < 3 * best


def test_sweeps_reach_least_squares_on_the_support() -> None:
    weight, _, statistics = layer(4, 16)
    form = sparsegpt(weight, statistics, SparseGptOptions(sweeps=200, damping=0.1)).form
    assert isinstance(form, Sparse)
    expected = least_squares(weight, damped(statistics.require_hessian(), 0.1), form.pattern.mask())
    torch.testing.assert_close(form.dense().double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_published_order(pattern: str) -> None:
    weight, x, statistics = layer(64, 96)
    magnitude = wanda(weight, None, WandaOptions(pattern=pattern, score="magnitude", per_row=False))
    plain = wanda(weight, statistics, WandaOptions(pattern=pattern))
    obs_based = sparsegpt(weight, statistics, SparseGptOptions(pattern=pattern, block=32))
    swept = sparsegpt(weight, statistics, SparseGptOptions(pattern=pattern, block=32, sweeps=2))
    admm = alps(weight, statistics, AlpsOptions(pattern=pattern, damping=0.01))
    errors = [output_error(weight, r.form.dense(), x) for r in (magnitude, plain, obs_based, swept, admm)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    assert obs_based.report["output_error"] == pytest.approx(errors[2], rel=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("case", ["survivors", "all"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:16"])
def test_joint_quantization(pattern: str, case: str, granularity: str) -> None:
    weight, x, statistics = layer(24, 32)
    options = SparseGptOptions(pattern=pattern, bits=4, case=case, granularity=granularity, block=16)
    result = sparsegpt(weight, statistics, options)
    dense = result.form.dense()
    assert int((dense == 0).sum()) >= 24 * 16
    if case == "all":
        assert isinstance(result.form, Quantized)
    else:
        assert isinstance(result.form, Sparse)
        assert result.form.pattern.kept == 24 * 16
        assert bool((dense == 0)[~result.form.pattern.mask()].all())
    floating = sparsegpt(weight, statistics, SparseGptOptions(pattern=pattern, block=16))
    ratio = output_error(weight, dense, x) / output_error(weight, floating.form.dense(), x)
    assert 0.8 < ratio < 3
    assert result.report["output_error"] == pytest.approx(output_error(weight, dense, x), rel=1e-3)


def test_case_b_stores_less_and_fits_the_survivors() -> None:
    weight, x, statistics = layer(64, 128)
    cases = [
        sparsegpt(weight, statistics, SparseGptOptions(bits=3, case=case, sparsity=0.75, pattern="1:4"))
        for case in ("survivors", "all")
    ]
    assert cases[0].form.num_bytes < 0.55 * cases[1].form.num_bytes  # 3/4 + 2/4 bits instead of 3
    errors = [output_error(weight, r.form.dense(), x) for r in cases]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_one_pass_beats_prune_then_quantize(pattern: str, seed: int) -> None:
    weight, x, statistics = layer(64, 96, seed=seed)
    options = SparseGptOptions(pattern=pattern, bits=3, block=32)
    joint = output_error(weight, sparsegpt(weight, statistics, options).form.dense(), x)
    sequential = prune_then_quantize(weight, statistics, options)
    assert joint < output_error(weight, sequential.form.dense(), x)
    assert sequential.report["output_error"] == pytest.approx(
        output_error(weight, sequential.form.dense(), x), rel=1e-3
    )


def test_quantizing_survivors_keeps_the_pattern_and_beats_rounding() -> None:
    weight, x, statistics = layer(32, 64)
    pruned = wanda(weight, statistics, WandaOptions()).form
    assert isinstance(pruned, Sparse)
    options = SparseGptOptions(bits=3, granularity="channel", clip=False)
    form = quantize_survivors(pruned, statistics, options).form
    assert isinstance(form, Sparse)
    assert torch.equal(form.pattern.mask(), pruned.pattern.mask())
    scale = form.dense().abs().amax(1, keepdim=True) / 4  # each row's largest survivor is on code 3 or -4
    rounded = (pruned.dense() / scale).round().clamp(-4, 3) * scale
    assert output_error(pruned.dense(), form.dense(), x) < output_error(pruned.dense(), rounded, x)


def test_everything_dead_and_everything_kept() -> None:
    weight, x, _ = layer(4, 8)
    x[:, 3] = 0
    statistics = statistics_of(x)
    result = sparsegpt(weight, statistics, SparseGptOptions(sparsity=0.5))
    assert bool(torch.isfinite(result.form.dense()).all())
    assert result.report["dead_inputs"] == 1
    kept = sparsegpt(weight, statistics, SparseGptOptions(sparsity=0.0)).form
    assert torch.equal(kept.dense(), weight)
    assert not sparsegpt(weight, statistics, SparseGptOptions(sparsity=1.0)).form.dense().any()


def test_what_is_refused() -> None:
    weight, _, statistics = layer(4, 10)
    with pytest.raises(ValueError, match="multiple of 4"):
        sparsegpt(weight, statistics, SparseGptOptions(pattern="2:4"))
    with pytest.raises(ValueError, match="not fit a weight"):
        sparsegpt(weight[:, :8], statistics, SparseGptOptions())
    with pytest.raises(ValueError, match="symmetric grid"):
        SparseGptOptions(bits=4, symmetric=False)
    with pytest.raises(ValueError, match="infinity"):
        sparsegpt(weight * torch.inf, statistics, SparseGptOptions())


def test_rows_that_count_more_keep_more_of_their_entries() -> None:
    weight, x, statistics = layer(24, 64)
    weights = torch.ones(24)
    weights[:8] = 4

    def kept(rows: Tensor | None) -> tuple[Tensor, float]:
        form = sparsegpt(weight, statistics, SparseGptOptions(sparsity=0.6), row_weights=rows).form
        assert isinstance(form, Sparse)
        assert form.pattern.kept == round(0.4 * 24 * 64)
        scale = weights[:, None]
        return form.pattern.mask().float().mean(1), output_error(weight * scale, form.dense() * scale, x)

    even, worse = kept(None)
    shifted, better = kept(weights)
    assert float(shifted[:8].mean()) > 1.3 * float(even[:8].mean())
    assert better < 0.9 * worse


@pytest.mark.parametrize("bits", [None, 4])
def test_asymmetric_calibration_comes_back_to_the_dense_output(bits: int | None) -> None:
    weight, x, statistics = layer(24, 64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    original = x + 0.3 * noise * x.std(0)
    cross = (original - x).T @ x / len(x)
    wanted = original @ weight.T

    def error(asymmetry: float) -> float:
        options = SparseGptOptions(bits=bits, asymmetry=asymmetry)
        made = sparsegpt(weight, statistics, options, cross).form.dense()
        return float((x @ made.T - wanted).square().sum() / wanted.square().sum())

    assert error(1.0) < error(0.5) < error(0.0)


def expected_support(scores: Tensor, kept: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(kept).indices] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_joint_mask_is_by_what_removing_costs_more_than_rounding(bits: int, granularity: str) -> None:
    """`(w^2 - (w - Q(w))^2) / U_jj^2`, all columns in one block, on the grid of the first pass."""
    weight, _, statistics = layer(12, 16)
    options = SparseGptOptions(bits=bits, block=16, granularity=granularity)
    form = sparsegpt(weight, statistics, options).form
    assert isinstance(form, Sparse)
    pruned = sparsegpt(weight, statistics, SparseGptOptions(block=16)).form.dense()
    importance = statistics.require_hessian().diagonal()
    scale, _ = fit_grid(pruned, bits, granularity, clip=True, importance=importance)
    step = scale.float()
    rounded = (weight / step).round().clamp(-(1 << bits - 1), (1 << bits - 1) - 1) * step
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(statistics.require_hessian())), upper=True)
    saved = weight.double().square() - (weight - rounded).double().square()
    expected = expected_support(saved / upper.diagonal().square(), 96)
    assert torch.equal(form.pattern.mask(), expected)
    assert not torch.equal(expected, expected_support((weight.double() / upper.diagonal()).square(), 96))


def test_rows_count_by_the_square_of_their_weight() -> None:
    weight, _, statistics = layer(12, 16)
    counts = torch.linspace(0.5, 2.0, 12)
    form = sparsegpt(weight, statistics, SparseGptOptions(block=16), row_weights=counts).form
    assert isinstance(form, Sparse)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(statistics.require_hessian())), upper=True)
    scores = (weight.double() * counts[:, None] / upper.diagonal()).square()
    assert torch.equal(form.pattern.mask(), expected_support(scores, 96))
