"""Sparse + low-rank: budgets, curves, and what it has to beat."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmpress.forms import CompressedLinear, LowRank, Quantized, Sparse, Sum, form_from_description
from lmpress.methods.alps import AlpsOptions, alps
from lmpress.methods.low_rank_correction import CorrectionOptions
from lmpress.methods.sparsegpt import SparseGptOptions, sparsegpt
from lmpress.methods.sslc import SslcOptions, split_budget, sslc
from lmpress.methods.svd_llm import SvdLlmOptions, svd_llm
from lmpress.methods.wanda import WandaOptions, wanda
from lmpress.statistics import InputStatistics
from tests.methods.layers import layer, output_error


def built(rows: int = 64, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, InputStatistics]:
    """A weight made as sparse (10 %) + rank 6 + noise, over correlated inputs."""
    _, x, statistics = layer(rows, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randn(rows, columns, generator=generator) * 3
    spikes *= torch.rand(rows, columns, generator=generator) < 0.1
    low = torch.randn(rows, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    noise = 0.2 * torch.randn(rows, columns, generator=generator)
    return spikes + low + noise, x, statistics


def parameters(form: Sum | Sparse | LowRank) -> int:
    """Kept values and factor entries."""
    if isinstance(form, Sum):
        return sum(parameters(term) for term in form.terms if isinstance(term, Sparse | LowRank))
    return form.pattern.kept if isinstance(form, Sparse) else form.rank * sum(form.shape)


@pytest.mark.parametrize("metric", ["hessian", "diagonal"])
@pytest.mark.parametrize("seed", [0, 1])
def test_beats_either_part_alone_at_the_same_parameters(metric: str, seed: int) -> None:
    weight, x, statistics = built(seed=seed)
    errors = {}
    for kappa in (0.0, 0.4, 1.0):
        options = SslcOptions(sparsity=0.6, kappa=kappa, metric=metric, damping=0.01, iterations=60)
        form = sslc(weight, statistics, options).form
        assert isinstance(form, Sum | Sparse | LowRank)
        assert 0.38 * weight.numel() < parameters(form) <= 0.4 * weight.numel() + 1
        errors[kappa] = output_error(weight, form.dense(), x)
    assert errors[0.4] < 0.8 * min(errors[0.0], errors[1.0])


def test_the_contest_at_one_parameter_budget() -> None:
    weight, x, statistics = built()
    kept = {
        "sslc": sslc(weight, statistics, SslcOptions(kappa=0.3)),
        "alps": alps(weight, statistics, AlpsOptions()),
        "sparsegpt": sparsegpt(weight, statistics, SparseGptOptions(block=32)),
        "wanda": wanda(weight, statistics, WandaOptions()),
        "svd": svd_llm(weight, statistics, SvdLlmOptions(ratio=0.5)),
    }
    errors = {name: output_error(weight, result.form.dense(), x) for name, result in kept.items()}
    assert errors["sslc"] < 0.8 * min(error for name, error in errors.items() if name != "sslc")
    assert errors["alps"] < errors["sparsegpt"] < errors["wanda"]


@pytest.mark.parametrize("metric", ["hessian", "diagonal"])
def test_the_curve_falls_to_the_error_of_the_result(metric: str) -> None:
    weight, _, statistics = built()
    options = SslcOptions(metric=metric, kappa=0.3, damping=0.0, iterations=40)
    result = sslc(weight, statistics, options)
    curve = result.report["curve"]
    assert len(curve) > 5
    assert all(after <= before for before, after in pairwise(curve))
    assert curve[-1] < 0.5 * curve[0]
    hessian = statistics.require_hessian().double()
    if metric == "diagonal":
        hessian = torch.diag(hessian.diagonal())
    difference = weight.double() - result.form.dense(torch.float64)
    loss = (difference @ hessian * difference).sum() / (weight.double() @ hessian * weight.double()).sum()
    assert curve[-1] == pytest.approx(float(loss), rel=2e-3)


def test_the_full_metric_beats_the_diagonal_on_the_outputs() -> None:
    weight, x, statistics = built()
    errors = [
        output_error(weight, sslc(weight, statistics, SslcOptions(metric=metric)).form.dense(), x)
        for metric in ("hessian", "diagonal")
    ]
    assert errors[0] < errors[1]


def test_one_seed_one_result() -> None:
    weight, _, statistics = built(32, 32)
    forms = [sslc(weight, statistics, SslcOptions(seed=seed, iterations=30)).form for seed in (3, 3, 4)]
    for name, tensor in forms[0].tensors().items():
        assert torch.equal(tensor, forms[1].tensors()[name])
    assert not torch.equal(forms[0].dense(), forms[2].dense())


def test_the_most_salient_weights_stay() -> None:
    weight, x, statistics = built()
    form = sslc(weight, statistics, SslcOptions(protect=0.05, kappa=0.4, sparsity=0.7)).form
    assert isinstance(form, Sum)
    assert isinstance(form.terms[0], Sparse)
    salience = weight.abs() * x.square().mean(0).sqrt()
    salient = salience >= salience.flatten().sort(descending=True).values[round(0.05 * 64 * 96) - 1]
    assert bool(form.terms[0].pattern.mask()[salient].all())


def test_the_search_finds_a_good_split() -> None:
    weight, x, statistics = built()
    result = sslc(weight, statistics, SslcOptions(kappa=None, sparsity=0.6))
    splits = {float(kappa): error for kappa, error in result.report["splits"].items()}
    assert result.report["kappa"] == min(splits, key=lambda kappa: splits[kappa])
    assert 0 < result.report["kappa"] < 1
    sparse = sslc(weight, statistics, SslcOptions(kappa=0.0, sparsity=0.6)).form
    assert output_error(weight, result.form.dense(), x) < output_error(weight, sparse.dense(), x)


def test_budgets() -> None:
    assert split_budget((4096, 4096), 0.5, 0.25) == (256, 0.375)
    assert split_budget((64, 64), 0.5, 0.0) == (0, 0.5)
    assert split_budget((64, 64), 0.5, 1.0) == (16, 0.0)
    # 2:4 keeps a half; with kappa = 0.5 the factors take as much again
    assert split_budget((64, 64), 0.9, 0.5, (2, 4)) == (16, 0.5)


def test_n_of_m() -> None:
    weight, x, statistics = built()
    result = sslc(weight, statistics, SslcOptions(pattern="2:4", kappa=0.2))
    assert isinstance(result.form, Sum)
    sparse, low = result.form.terms
    assert isinstance(sparse, Sparse)
    assert isinstance(low, LowRank)
    assert sparse.pattern.name == "2:4"
    assert low.rank == result.report["rank"] == int(0.25 * 0.5 * 64 * 96 / 160)
    plain = alps(weight, statistics, AlpsOptions(pattern="2:4")).form
    assert output_error(weight, result.form.dense(), x) < output_error(weight, plain.dense(), x)


def test_quantized_parts_make_up_for_each_other(tmp_path: Path) -> None:
    weight, x, statistics = built()
    survivors = SparseGptOptions(bits=4, sweeps=1, per_channel_damping=True, damping=0.1)
    floating = sslc(weight, statistics, SslcOptions(kappa=0.3)).form
    factors = CorrectionOptions(bits=4)
    result = sslc(weight, statistics, SslcOptions(kappa=0.3, survivors=survivors, factors=factors))
    form = result.form
    assert isinstance(form, Sum)
    assert isinstance(floating, Sum)
    sparse, low = form.terms
    assert isinstance(sparse, Sparse)
    assert isinstance(low, LowRank)
    assert isinstance(low.left, Quantized)
    assert isinstance(sparse.values, Quantized)

    def separately(matrix: Tensor, bits: int) -> Tensor:
        scale = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (matrix / scale).round() * scale

    term = floating.terms[1]
    assert isinstance(term, LowRank)
    naive = separately(floating.terms[0].dense(), 4)
    naive += separately(term.left.dense(), 4) @ separately(term.right.dense(), 4)
    errors = [output_error(weight, w, x) for w in (naive, form.dense(), floating.dense())]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.6 * errors[0]
    assert result.report["output_error"] == pytest.approx(errors[1], rel=1e-3)
    # the whole expression stores, loads and runs
    save_file(form.tensors(), tmp_path / "f.safetensors")
    loaded = form_from_description(form.describe()).with_tensors(load_file(tmp_path / "f.safetensors"))
    assert torch.equal(loaded.dense(), form.dense())
    torch.testing.assert_close(CompressedLinear(loaded)(x), x @ form.dense().T, rtol=1e-3, atol=1e-2)
    size = (tmp_path / "f.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "f.safetensors").read_bytes()[:8], "little") + 8
    assert form.num_bytes == size - header


def test_the_weights_dtype_is_kept() -> None:
    weight, _, statistics = built(32, 32)
    form = sslc(weight.bfloat16(), statistics, SslcOptions(iterations=30)).form
    assert form.formula == "Sparse(bf16; 40%) + LowRank(bf16, bf16; r=1)"


def test_what_is_refused() -> None:
    weight, _, statistics = built(32, 32)
    with pytest.raises(ValueError, match="kappa below 1"):
        SslcOptions(pattern="2:4", kappa=None)
    with pytest.raises(ValueError, match="another pattern"):
        SslcOptions(survivors=SparseGptOptions(pattern="2:4", bits=4))
    with pytest.raises(ValueError, match="the metric"):
        SslcOptions(metric="taste")
    with pytest.raises(ValueError, match="statistics of"):
        sslc(weight[:, :16], statistics, SslcOptions())
    with pytest.raises(ValueError, match="infinity"):
        sslc(weight * torch.inf, statistics, SslcOptions())


@pytest.mark.parametrize("how", [{}, {"metric": "diagonal"}, {"kappa": 1.0}])
def test_outputs_that_count_more_lose_less(how: dict[str, object]) -> None:
    weight, x, statistics = built()
    weights = torch.ones(64)
    weights[:20] = 5
    options = SslcOptions(**({"kappa": 0.3, "sparsity": 0.6, "damping": 0.01} | how))  # type: ignore[arg-type]

    def error(rows: Tensor | None) -> float:
        form = sslc(weight, statistics, options, row_weights=rows).form
        return output_error(weight * weights[:, None], form.dense() * weights[:, None], x)

    assert error(weights) < 0.9 * error(None)
    torch.testing.assert_close(error(torch.full((64,), 3.0)), error(None), rtol=2e-2, atol=0)


def test_outputs_count_in_quantized_terms_too() -> None:
    weight, x, statistics = built()
    weights = torch.ones(64)
    weights[:20] = 5
    options = SslcOptions(
        kappa=0.3, sparsity=0.6, survivors=SparseGptOptions(bits=5), factors=CorrectionOptions(bits=5)
    )

    def error(rows: Tensor | None) -> float:
        form = sslc(weight, statistics, options, row_weights=rows).form
        return output_error(weight * weights[:, None], form.dense() * weights[:, None], x)

    assert error(weights) < 0.9 * error(None)


@pytest.mark.parametrize("kappa", [0.3, None])
def test_asymmetric_calibration_comes_back_to_the_dense_output(kappa: float | None) -> None:
    weight, x, statistics = built()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    original = x + 0.3 * noise * x.std(0)
    cross = (original - x).T @ x / len(x)
    wanted = original @ weight.T

    def error(asymmetry: float) -> float:
        options = SslcOptions(kappa=kappa, asymmetry=asymmetry, damping=0.01, iterations=40)
        made = sslc(weight, statistics, options, cross).form.dense()
        return float((x @ made.T - wanted).square().sum() / wanted.square().sum())

    assert error(1.0) < error(0.0)


@pytest.mark.parametrize("metric", ["hessian", "diagonal"])
@pytest.mark.parametrize("protect", [0.04, 0.2, 0.9])
def test_protection_never_takes_what_the_sparse_term_keeps(metric: str, protect: float) -> None:
    """Where all of the support were protected, there would be nothing left to solve for."""
    weight, x, statistics = built()
    options = SslcOptions(
        sparsity=0.9, kappa=0.6, metric=metric, protect=protect, damping=0.01, iterations=30
    )
    result = sslc(weight, statistics, options)
    assert isinstance(result.form, Sum)
    sparse, low_rank = result.form.terms
    assert isinstance(sparse, Sparse)
    assert isinstance(low_rank, LowRank)
    assert sparse.density == pytest.approx(0.04, abs=0.006)  # a whole number of entries, a row
    assert result.report["density"] == sparse.density
    assert result.report["rank"] == low_rank.rank
    assert result.report["parameters"] == pytest.approx(parameters(result.form) / weight.numel())
    free = sslc(weight, statistics, replace(options, protect=0.0)).form
    assert output_error(weight, result.form.dense(), x) < 1.25 * output_error(weight, free.dense(), x)


def test_a_row_with_more_salient_entries_than_it_keeps() -> None:
    """The largest of them stay, and no row loses its share to another."""
    weight, _, statistics = built()
    weight[3] *= 100
    form = sslc(weight, statistics, SslcOptions(metric="diagonal", kappa=0.3, protect=0.015)).form
    assert isinstance(form, Sum)
    assert isinstance(form.terms[0], Sparse)
    mask = form.terms[0].pattern.mask()
    assert bool((mask.sum(1) == round(0.35 * 96)).all())
    assert result_error(form, weight) < 0.2


def result_error(form: Sum, weight: Tensor) -> float:
    return float((form.dense() - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("metric", ["hessian", "diagonal"])
def test_what_is_protected_is_most_salient_in_both_metrics(metric: str) -> None:
    """Entries that a low-rank term explains would leave S, were they not protected."""
    weight, x, statistics = built()
    options = SslcOptions(protect=0.02, kappa=0.6, sparsity=0.7, metric=metric, iterations=40)
    salience = weight.abs() * x.square().mean(0).sqrt()
    salient = salience >= salience.flatten().sort(descending=True).values[round(0.02 * 64 * 96) - 1]
    kept = {}
    for name, share in (("protected", options), ("free", replace(options, protect=0.0))):
        form = sslc(weight, statistics, share).form
        assert isinstance(form, Sum)
        assert isinstance(form.terms[0], Sparse)
        kept[name] = float(form.terms[0].pattern.mask()[salient].float().mean())
    assert kept["protected"] == 1 > kept["free"]
