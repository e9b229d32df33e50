"""Masks and the forms of survivors against brute force."""

import pytest
import torch

from lmpress.forms import Dense, Quantized, Sparse
from lmpress.forms.pattern import MAX_GROUP
from lmpress.methods.patterns import (
    Grid,
    check_grid_fits,
    dense_quantized_form,
    density_of,
    keep_largest,
    parse_pattern,
    sparse_quantized_form,
    survivors,
    with_priority,
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


def test_the_ends_of_what_is_allowed() -> None:
    assert density_of("unstructured", 0.0) == 1
    assert density_of("unstructured", 1.0) == 0
    for sparsity in (-0.01, 1.01):
        with pytest.raises(ValueError, match="sparsity lies in"):
            density_of("unstructured", sparsity)
    assert parse_pattern(f"1:{MAX_GROUP}") == (1, MAX_GROUP)
    assert parse_pattern("4:4") == (4, 4)
    for wrong in (f"1:{MAX_GROUP + 1}", "4", "4:", ":4", "a:4", "2:b"):
        with pytest.raises(ValueError, match="a pattern is"):
            parse_pattern(wrong)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("group", [None, (2, 4)])
def test_which_grids_survivors_can_have(
    symmetric: bool, per_tensor: bool, group: tuple[int, int] | None
) -> None:
    """One zero point for all, none, or as many survivors in every row."""
    if symmetric or per_tensor or group:
        check_grid_fits(symmetric, per_tensor, group)
    else:
        with pytest.raises(ValueError, match="symmetric grid"):
            check_grid_fits(symmetric, per_tensor, group)


def test_unstructured_survivors_with_one_zero_point() -> None:
    codes = torch.randint(0, 16, (6, 16), generator=torch.Generator().manual_seed(3))
    grid = Grid(torch.tensor([[0.5]]), torch.tensor([[7]]), 4)
    mask = keep_largest(SCORES, 0.4, None, per_row=False)
    form = sparse_quantized_form(codes, mask, None, grid)
    assert torch.equal(form.dense(), (codes - 7) * 0.5 * mask)
    assert form.scale is None
    assert torch.equal(dense_quantized_form(codes, mask, grid).dense(), (codes - 7) * 0.5 * mask)


def test_scales_move_to_where_they_fit() -> None:
    """With the values where rows keep as many, else to the pattern."""
    codes = torch.randint(-8, 8, (6, 16), generator=torch.Generator().manual_seed(4), dtype=torch.int8)
    by_row = Grid(torch.rand(6, 1) + 0.1, None, 4)
    even = keep_largest(SCORES, 0.5, None, per_row=True)
    assert sparse_quantized_form(codes, even, None, by_row).scale is None
    ragged = keep_largest(SCORES, 0.5, None, per_row=False)
    assert sparse_quantized_form(codes, ragged, None, by_row).scale is not None
    by_group = Grid(torch.rand(6, 4) + 0.1, None, 4)
    assert sparse_quantized_form(codes, even, None, by_group).scale is not None  # groups keep unlike numbers
    pattern = keep_largest(SCORES, 0.5, (2, 4), per_row=False)
    assert sparse_quantized_form(codes, pattern, (2, 4), by_group).scale is None
    for mask, grid in ((even, by_row), (ragged, by_row), (even, by_group)):
        scale = grid.scale.repeat_interleave(16 // grid.scale.shape[1], 1)
        torch.testing.assert_close(
            sparse_quantized_form(codes, mask, None, grid).dense(), codes * scale * mask
        )


def test_protected_scores_come_first_and_keep_their_order() -> None:
    protected = torch.zeros(6, 16, dtype=torch.bool)
    protected[2, :5] = True
    raised = with_priority(SCORES, protected)
    assert float(raised[protected].min()) > float(raised[~protected].max())
    assert torch.equal(raised[2, :5].argsort(), SCORES[2, :5].argsort())
    assert torch.equal(raised[~protected], SCORES[~protected])
    zeros = torch.zeros(2, 3)
    zeros[0, 0] = 4.0
    first = with_priority(zeros, zeros.new_tensor([[0, 0, 0], [0, 1, 0]]).bool())
    assert int(first.argmax()) == 4  # even where its own score is nothing
    assert with_priority(SCORES, None) is SCORES


def test_survivors_are_the_pattern_or_what_is_not_zero() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    mask = torch.tensor([[True, True], [False, True]])
    for form, expected in ((Dense(weight), weight != 0), (Sparse.from_dense(weight, mask), mask)):
        dense, found = survivors(form)
        assert torch.equal(dense, weight)
        assert torch.equal(found, expected)
