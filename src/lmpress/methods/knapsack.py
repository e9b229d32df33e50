"""Exact allocation of a budget: one choice for every item, the least total cost within a total size.

The multiple-choice knapsack `min sum_i cost_i(k_i)` subject to `sum_i size_i(k_i) <= budget`. The Lagrangian
`sum_i min_k cost + u size` is minimised by points on each item's lower convex hull; the best multiplier,
found by a walk along the hulls' edges, gives a solution and a lower bound (Sinha & Zoltners 1979). A choice
whose own bound is no better than the best solution known is left out. What is left is solved by dynamic
programming over the undominated pairs (size, cost) of the first items (Nemhauser & Ullmann 1969), pruned by
the same bound: exact, whatever the sizes. Only where millions of pairs are left are they thinned out, and
the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

MOST_STATES = 2_000_000
"""Undominated pairs that are kept at most; beyond, those of nearly the same size are merged."""


@dataclass(frozen=True)
class Allocation:
    """The result of `solve`.

    Attributes:
        choices: the choice of every item.
        cost: the total cost.
        size: the total size, within the budget.
        bound: no solution within the budget costs less.
        exact: whether the search was complete; if not, `cost - bound` bounds what was lost.
    """

    choices: list[int]
    cost: float
    size: int
    bound: float
    exact: bool


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice of every item with the least total cost within the budget; see `solve`."""
    return solve(costs, sizes, budget).choices


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> Allocation:
    """Choose for every item.

    Args:
        costs: by item and choice, finite.
        sizes: by item and choice, whole numbers >= 0 (bits or bytes).
        budget: the most that the chosen sizes may add up to.

    Raises:
        ValueError: lists that do not match, an item without a choice, a cost that is not finite, a size below
            0; or a budget below the least possible size, which the message tells.
    """
    _check(costs, sizes)
    least = sum(min(own) for own in sizes)
    if least > budget:
        raise ValueError(f"a budget of {budget} cannot be met: the smallest choices alone take {least}")
    if not costs:
        return Allocation([], 0.0, 0, 0.0, True)
    hulls = [_hull(c, s) for c, s in zip(costs, sizes, strict=True)]
    multiplier, choices = _relax(costs, sizes, hulls, budget)
    choices = _improve(costs, sizes, choices, budget)
    reduced = [
        [c + multiplier * s for c, s in zip(own, size, strict=True)]
        for own, size in zip(costs, sizes, strict=True)
    ]
    bound = sum(min(own) for own in reduced) - multiplier * budget
    known = _total(costs, choices)
    better, exact = _search(costs, sizes, reduced, budget, multiplier, bound, known)
    if better is not None:
        choices = better
    cost = _total(costs, choices)
    size = int(sum(own[k] for own, k in zip(sizes, choices, strict=True)))
    return Allocation(choices, cost, size, cost if exact else min(bound, cost), exact)


def _check(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> None:
    if len(costs) != len(sizes):
        raise ValueError(f"{len(costs)} items have costs, {len(sizes)} have sizes")
    for i, (own, size) in enumerate(zip(costs, sizes, strict=True)):
        if not own or len(own) != len(size):
            raise ValueError(f"item {i} has {len(own)} costs and {len(size)} sizes")
        if not all(abs(c) < float("inf") for c in own):
            raise ValueError(f"item {i} has a cost that is not finite")
        if any(int(s) != s or s < 0 for s in size):
            raise ValueError(f"item {i} has a size that is no whole number from 0 on")


def _total(costs: Sequence[Sequence[float]], choices: Sequence[int]) -> float:
    return sum(own[k] for own, k in zip(costs, choices, strict=True))


def _hull(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The choices on the lower convex hull, from the smallest size on, costs falling."""
    order = sorted(range(len(costs)), key=lambda k: (sizes[k], costs[k]))
    hull: list[int] = []
    for k in order:
        if hull and costs[k] >= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            left = (costs[a] - costs[b]) * (sizes[k] - sizes[b])
            if left > (costs[b] - costs[k]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


def _relax(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], hulls: list[list[int]], budget: int
) -> tuple[float, list[int]]:
    """The best multiplier, and the last solution on the hulls that is within the budget."""
    edges = []
    for i, hull in enumerate(hulls):
        for a, b in pairwise(hull):
            grown = sizes[i][b] - sizes[i][a]
            edges.append(((costs[i][a] - costs[i][b]) / grown, i, b, grown))
    edges.sort(key=lambda edge: -edge[0])
    choices = [hull[0] for hull in hulls]
    used = sum(own[k] for own, k in zip(sizes, choices, strict=True))
    for slope, i, b, grown in edges:
        if used + grown > budget:
            return slope, choices
        choices[i] = b
        used += grown
    return 0.0, choices


def _improve(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], choices: list[int], budget: int
) -> list[int]:
    """Take single changes that fit and save most, until there are none."""
    choices = list(choices)
    used = sum(own[k] for own, k in zip(sizes, choices, strict=True))
    while True:
        best = (0.0, -1, -1)
        for i, (own, size) in enumerate(zip(costs, sizes, strict=True)):
            now = choices[i]
            for k in range(len(own)):
                if used + size[k] - size[now] <= budget and own[now] - own[k] > best[0]:
                    best = (own[now] - own[k], i, k)
        _, i, k = best
        if i < 0:
            return choices
        used += sizes[i][k] - sizes[i][choices[i]]
        choices[i] = k


def _search(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    reduced: list[list[float]],
    budget: int,
    multiplier: float,
    bound: float,
    known: float,
) -> tuple[list[int] | None, bool]:
    """Dynamic programming over what may still be better than `known`; (better choices or None, complete)."""
    slack = 1e-9 * max(1.0, abs(known), abs(bound))
    gap = known - bound + slack
    kept = []
    for own in reduced:
        least = min(own)
        kept.append([k for k, value in enumerate(own) if value - least <= gap])
    order = sorted(range(len(kept)), key=lambda i: len(kept[i]))
    rest_least = [0.0] * (len(order) + 1)  # of the reduced costs of the items still to come
    rest_size = [0] * (len(order) + 1)
    for at in range(len(order) - 1, -1, -1):
        i = order[at]
        rest_least[at] = rest_least[at + 1] + min(reduced[i])
        rest_size[at] = rest_size[at + 1] + min(sizes[i][k] for k in kept[i])
    size = torch.zeros(1, dtype=torch.int64)
    cost = torch.zeros(1, dtype=torch.float64)
    history: list[tuple[int, Tensor, Tensor]] = []  # item, choice and predecessor of every state
    exact = True
    for at, i in enumerate(order):
        options = kept[i]
        sizes_of = torch.tensor([sizes[i][k] for k in options])
        costs_of = torch.tensor([costs[i][k] for k in options], dtype=torch.float64)
        grown = (size[:, None] + sizes_of).reshape(-1)
        spent = (cost[:, None] + costs_of).reshape(-1)
        possible = (grown + rest_size[at + 1] <= budget) & (
            spent + multiplier * (grown - budget) + rest_least[at + 1] <= known + slack
        )
        index = possible.nonzero()[:, 0]
        index = index[_undominated(grown[index], spent[index])]
        if len(index) > MOST_STATES:
            exact = False
            index = index[:: len(index) // MOST_STATES + 1]
        size, cost = grown[index], spent[index]
        history.append((i, torch.tensor(options)[index % len(options)], index // len(options)))
    if not len(cost) or float(cost[-1]) >= known:
        return None, exact
    state, choices = len(cost) - 1, [0] * len(kept)  # costs fall with size: the last is the least
    for i, choice, before in reversed(history):
        choices[i] = int(choice[state])
        state = int(before[state])
    return choices, exact


def _undominated(size: Tensor, cost: Tensor) -> Tensor:
    """Numbers of the states that no state of at most their size undercuts, by ascending size."""
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(size[order], stable=True)]
    sorted_cost = cost[order]
    if not len(order):
        return order
    best_before = torch.cat([sorted_cost.new_tensor([float("inf")]), sorted_cost.cummin(0).values[:-1]])
    return order[sorted_cost < best_before]
