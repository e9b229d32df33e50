"""Masks and the forms of survivors against brute force."""

import pytest
import torch

from lmpress.forms import Quantized, Sparse
from lmpress.methods.patterns import (
    Grid,
    dense_quantized_form,
    density_of,
    keep_largest,
    parse_pattern,
    sparse_quantized_form,
)

SCORES = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))


def test_names() -> None:
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)
    assert density_of("6:8", 0.5) == 0.75
    assert density_of("unstructured", 0.3) == pytest.approx(0.7)
    for wrong in ("2:", "4:2", "0:4", "half", "2:64", "²:4"):
        with pytest.raises(ValueError, match="a pattern is"):
            parse_pattern(wrong)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (6, 8)])
def test_n_of_m_keeps_the_best_of_each_group(n: int, m: int) -> None:
    mask = keep_largest(SCORES, 0.5, (n, m), per_row=False)
    for i in range(6):
        for start in range(0, 16, m):
            group = SCORES[i, start : start + m].tolist()
            kept = {j for j in range(m) if mask[i, start + j]}
            assert kept == set(sorted(range(m), key=lambda j: -group[j])[:n])


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_exact_counts(density: float) -> None:
    assert int(keep_largest(SCORES, density, None, per_row=False).sum()) == round(density * 96)
    assert keep_largest(SCORES, density, None, per_row=True).sum(1).tolist() == [round(density * 16)] * 6
    whole = keep_largest(SCORES, density, None, per_row=False)
    if 0 < density < 1:
        assert float(SCORES[whole].min()) > float(SCORES[~whole].max())


def test_groups_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        keep_largest(torch.rand(2, 6), 0.5, (2, 4), per_row=False)


@pytest.mark.parametrize("group", [None, (2, 4)])
@pytest.mark.parametrize("granularity", [(1, 1), (6, 1), (6, 2)])
def test_survivors_on_their_grid(group: tuple[int, int] | None, granularity: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (6, 16), generator=generator, dtype=torch.int8)
    scale = torch.rand(granularity, generator=generator) + 0.1
    mask = keep_largest(SCORES, 0.4, group, per_row=False)
    expected = codes * scale.expand(6, granularity[1]).repeat_interleave(16 // granularity[1], 1) * mask
    form = sparse_quantized_form(codes, mask, group, Grid(scale, None, 4))
    assert isinstance(form, Sparse)
    assert torch.equal(form.dense(), expected)
    assert torch.equal(form.pattern.mask(), mask)
    assert torch.equal(dense_quantized_form(codes, mask, Grid(scale, None, 4)).dense(), expected)


def test_asymmetric_grids() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (6, 16), generator=generator)
    scale, zero = torch.rand(6, 2, generator=generator), torch.randint(0, 16, (6, 2), generator=generator)
    grid = Grid(scale, zero, 4)
    mask = keep_largest(SCORES, 0.5, (2, 4), per_row=False)
    expected = (codes - zero.repeat_interleave(8, 1)) * scale.repeat_interleave(8, 1) * mask
    assert torch.equal(sparse_quantized_form(codes, mask, (2, 4), grid).dense(), expected)
    filled = dense_quantized_form(codes, mask, grid)
    assert isinstance(filled, Quantized)
    assert torch.equal(filled.dense(), expected)
    ragged = keep_largest(SCORES, 0.4, None, per_row=False)
    with pytest.raises(ValueError, match="symmetric grid"):
        sparse_quantized_form(codes, ragged, None, grid)
