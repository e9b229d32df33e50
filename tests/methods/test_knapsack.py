"""The allocator against exhaustive search, and at the size of a model."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpress.methods import knapsack
from lmpress.methods.knapsack import allocate, solve

items = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=5
)


def exhaustive(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float | None:
    found = None
    for choices in itertools.product(*(range(len(own)) for own in costs)):
        if sum(own[k] for own, k in zip(sizes, choices, strict=True)) <= budget:
            cost = sum(own[k] for own, k in zip(costs, choices, strict=True))
            found = cost if found is None else min(found, cost)
    return found


@settings(max_examples=150, deadline=None)
@given(items, st.integers(0, 40), st.booleans())
def test_as_good_as_exhaustive_search(
    cases: list[list[tuple[int, int]]], budget: int, negative: bool
) -> None:
    costs = [[c / 7 - (1 if negative else 0) for c, _ in item] for item in cases]
    sizes = [[s for _, s in item] for item in cases]
    best = exhaustive(costs, sizes, budget)
    if best is None:
        with pytest.raises(ValueError, match="cannot be met"):
            solve(costs, sizes, budget)
        return
    result = solve(costs, sizes, budget)
    assert result.exact
    assert result.cost == pytest.approx(best)
    assert result.bound <= best + 1e-9
    assert result.size == sum(own[k] for own, k in zip(sizes, result.choices, strict=True)) <= budget
    assert result.cost == sum(own[k] for own, k in zip(costs, result.choices, strict=True))


def model_like(count: int, seed: int = 0) -> tuple[list[list[float]], list[list[int]]]:
    """Bits 2..8 for modules of a transformer: errors fall by four a bit, noisily; sizes in bits."""
    draw = random.Random(seed)
    costs, sizes = [], []
    for _ in range(count):
        weights = draw.choice([331776, 110592, 884736])
        sensitivity = draw.lognormvariate(0, 1.5) * weights
        costs.append([sensitivity * draw.uniform(0.8, 1.2) * 4.0**-bits for bits in range(2, 9)])
        sizes.append([weights * bits + 16 * weights // 64 for bits in range(2, 9)])
    return costs, sizes


@pytest.mark.parametrize("bits", [2.5, 3.25, 4.25, 6.0])
def test_a_whole_model_is_solved_exactly_and_soon(bits: float) -> None:
    costs, sizes = model_like(220)
    weights = sum((own[1] - own[0]) for own in sizes)
    start = time.perf_counter()
    result = solve(costs, sizes, int(bits * weights))
    assert time.perf_counter() - start < 10
    assert result.exact
    assert result.size <= bits * weights
    greedy = _greedy(costs, sizes, int(bits * weights))
    assert result.cost <= greedy


def _greedy(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    choices = [0] * len(costs)
    used = sum(own[0] for own in sizes)
    while True:
        steps = [
            ((own[k] - own[k + 1]) / (size[k + 1] - size[k]), i)
            for i, (own, size) in enumerate(zip(costs, sizes, strict=True))
            if (k := choices[i]) + 1 < len(own) and used + size[k + 1] - size[k] <= budget
        ]
        if not steps or max(steps)[0] <= 0:
            return sum(own[k] for own, k in zip(costs, choices, strict=True))
        _, i = max(steps)
        used += sizes[i][choices[i] + 1] - sizes[i][choices[i]]
        choices[i] += 1


def test_more_budget_is_never_worse() -> None:
    costs, sizes = model_like(25, seed=3)
    low, high = sum(min(own) for own in sizes), sum(max(own) for own in sizes)
    totals = [solve(costs, sizes, low + (high - low) * k // 20).cost for k in range(21)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(totals))
    assert allocate(costs, sizes, low) == [0] * 25
    assert totals[-1] == pytest.approx(sum(min(own) for own in costs))


def test_choices_that_are_dominated_or_larger_for_nothing() -> None:
    assert allocate([[3.0, 1.0, 1.0, 0.5]], [[1, 2, 1, 9]], 8) == [2]
    assert allocate([], [], 0) == []
    assert allocate([[1.0], [2.0]], [[0], [0]], 0) == [0, 0]


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="cannot be met: the smallest choices alone take 7"):
        allocate([[1.0, 2.0], [1.0]], [[5, 4], [3]], 6)
    with pytest.raises(ValueError, match="have sizes"):
        allocate([[1.0]], [], 1)
    with pytest.raises(ValueError, match="item 0"):
        allocate([[]], [[]], 1)
    with pytest.raises(ValueError, match="finite"):
        allocate([[float("nan")]], [[1]], 1)
    with pytest.raises(ValueError, match="whole"):
        allocate([[1.0]], [[-1]], 1)


@pytest.mark.parametrize("most", [3, 20])
def test_thinned_states_are_told_and_bounded(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many states the search is not complete: it says so, and the bound still holds."""
    draw = random.Random(1)
    costs = [[draw.random() * 4 ** (3 - k) for k in range(4)] for _ in range(14)]
    sizes = [[draw.randint(90, 110) * (k + 1) for k in range(4)] for _ in range(14)]
    budget = int(0.6 * sum(own[-1] for own in sizes))
    best = solve(costs, sizes, budget)
    assert best.exact
    assert best.bound == best.cost
    monkeypatch.setattr(knapsack, "MOST_STATES", most)
    thinned = solve(costs, sizes, budget)
    assert not thinned.exact
    assert thinned.bound <= best.cost <= thinned.cost <= 1.2 * best.cost
    assert thinned.bound > 0.8 * best.cost
    assert thinned.size == sum(own[k] for own, k in zip(sizes, thinned.choices, strict=True)) <= budget


def test_a_budget_that_is_just_met() -> None:
    assert solve([[2.0, 1.0]], [[3, 5]], 5).choices == [1]
    assert solve([[2.0, 1.0]], [[3, 5]], 4).choices == [0]
    assert solve([[2.0, 1.0]], [[3, 5]], 3).size == 3
    empty = solve([], [], 0)
    assert (empty.choices, empty.cost, empty.size, empty.bound, empty.exact) == ([], 0.0, 0, 0.0, True)
