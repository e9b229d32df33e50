"""Patterns against brute force: every subset, every width, exact bytes."""

from itertools import combinations
from math import ceil, comb, log2

import pytest
import torch

from lmpress.forms import Bitmap, NofM, Pattern
from lmpress.forms.pattern import index_bits


def n_of_m_mask(rows: int, columns: int, n: int, m: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(2, scores.topk(n, 2).indices, True).view(rows, columns)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 77])
def test_bitmap_bits_are_where_the_docstring_says(columns: int) -> None:
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.4
    pattern = Bitmap.from_mask(mask)
    assert pattern.packed.dtype == torch.uint8
    assert pattern.packed.shape == (5, -(-columns // 8))
    assert pattern.kept == int(mask.sum())
    for i in range(5):
        for j in range(columns):
            assert bool(pattern.packed[i, j // 8].item() >> (j % 8) & 1) == bool(mask[i, j])
    assert torch.equal(pattern.mask(), mask)


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (4, 8), (6, 8), (2, 8), (1, 4), (3, 4), (1, 2), (4, 16), (8, 16), (4, 4)]
)
def test_n_of_m_round_trip_at_the_true_cost(n: int, m: int) -> None:
    rows, columns = 6, 16 * m
    mask = n_of_m_mask(rows, columns, n, m)
    pattern = NofM.from_mask(mask, n, m)
    bits = ceil(log2(comb(m, n)))
    assert index_bits(n, m) == bits
    assert pattern.packed.numel() * 8 == rows * (columns // m) * bits  # 16 groups: no rounding up
    assert torch.equal(pattern.mask(), mask)
    assert pattern.kept == int(mask.sum())


def test_ranks_count_the_subsets_in_lexicographic_order() -> None:
    subsets = list(combinations(range(4), 2))
    mask = torch.zeros(1, 24, dtype=torch.bool)
    for group, subset in enumerate(subsets):
        mask[0, [4 * group + j for j in subset]] = True
    assert NofM.from_mask(mask, 2, 4).ranks().tolist() == [[0, 1, 2, 3, 4, 5]]


def test_groups_that_do_not_fill_a_byte() -> None:
    mask = n_of_m_mask(3, 20, 2, 4)  # five groups of three bits
    pattern = NofM.from_mask(mask, 2, 4)
    assert pattern.packed.shape == (3, 3)
    assert torch.equal(pattern.mask(), mask)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="keep 2 of every 4"):
        NofM.from_mask(torch.ones(2, 8, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match="whole groups"):
        NofM.from_mask(torch.ones(2, 6, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match="not 5:4"):
        NofM.from_mask(torch.ones(2, 8, dtype=torch.bool), 5, 4)
    with pytest.raises(ValueError, match="unknown pattern"):
        Pattern.from_description({"kind": "stripes"}, (2, 8))


@pytest.mark.parametrize(
    "pattern", [Bitmap.from_mask(torch.eye(3, 12) > 0), NofM.from_mask(n_of_m_mask(3, 12, 2, 4), 2, 4)]
)
def test_description_rebuilds_the_shapes(pattern: Pattern) -> None:
    empty = Pattern.from_description(pattern.describe(), pattern.shape)
    assert empty.packed.is_meta
    assert (empty.packed.shape, empty.packed.dtype) == (pattern.packed.shape, pattern.packed.dtype)
    assert (empty.kept, empty.shape, type(empty)) == (pattern.kept, pattern.shape, type(pattern))
    assert torch.equal(empty.with_packed(pattern.packed).mask(), pattern.mask())


@pytest.mark.parametrize(
    "pattern",
    [
        Bitmap.from_mask(n_of_m_mask(5, 24, 3, 8)),
        NofM.from_mask(n_of_m_mask(5, 24, 3, 8), 3, 8),
        NofM.from_mask(n_of_m_mask(3, 20, 2, 4), 2, 4),
        NofM.from_mask(n_of_m_mask(2, 8, 4, 4), 4, 4),
    ],
)
def test_values_are_spread_in_the_order_of_the_kept_entries(pattern: Pattern) -> None:
    values = torch.arange(1.0, pattern.kept + 1)
    expected, left = torch.zeros(pattern.shape), iter(values.tolist())
    for i, row in enumerate(pattern.mask().tolist()):
        for j, kept in enumerate(row):
            expected[i, j] = next(left) if kept else 0.0
    assert torch.equal(pattern.spread(values), expected)
    assert torch.equal(pattern.spread(values.view(pattern.shape[0], -1).double()), expected.double())
