"""Ranks that modules share, against every other way to share the same parameters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.forms import LowRank
from lmpress.recipes.steps import Svd
from lmpress.survey.budgets import BUDGETS, Pool, Sight
from lmpress.survey.budgets.ranks import Ranks
from tests.methods.data import inputs, statistics_of, weights
from tests.survey.budgets.made import recipe

SHAPES = {"a": (6, 8), "b": (7, 5), "c": (10, 7)}
SIZE = sum(rows * columns for rows, columns in SHAPES.values())


def budget(allocation: str, *, pivoted: bool = False, **options: Any) -> Ranks:
    step = Svd(method="svd_llm", allocation=allocation, **{"ratio": 0.6} | options)  # type: ignore[arg-type]
    kinds = frozenset({"svd", "pivot"} if pivoted else {"svd"})
    made = BUDGETS["ranks"](Pool(step, "r: step 1 (svd)", SHAPES, kinds))
    assert isinstance(made, Ranks)
    return made


def spectra() -> dict[str, Tensor]:
    """Squared singular values that fall at different speeds, and from different heights."""
    falls = {"a": (9.0, 0.5), "b": (1.0, 0.8), "c": (3.0, 0.65)}
    return {
        name: torch.tensor([first * fall**i for i in range(min(SHAPES[name]))], dtype=torch.float64)
        for name, (first, fall) in falls.items()
    }


def cost(ranks: dict[str, int], pivoted: bool) -> int:
    """Parameters; rank 0 stands for the dense weight."""
    total = 0
    for name, rank in ranks.items():
        rows, columns = SHAPES[name]
        total += rank * (rows + columns) - rank * rank * pivoted if rank else rows * columns
    return total


def every(most: float, pivoted: bool) -> Iterator[dict[str, int]]:
    """All ways to give ranks, or none, that take `most` parameters at the most."""
    for ranks in itertools.product(*(range(min(shape) + 1) for shape in SHAPES.values())):
        found = dict(zip(SHAPES, ranks, strict=True))
        if cost(found, pivoted) <= most:
            yield found


def lost(name: str, rank: int) -> float:
    return float(spectra()[name][rank:].sum()) if rank else 0.0


def relative(ranks: dict[str, int]) -> float:
    """The largest relative squared error."""
    return max(lost(name, rank) / float(spectra()[name].sum()) for name, rank in ranks.items())


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.75])
def test_by_error_no_ranks_have_a_smaller_largest_error(ratio: float, pivoted: bool) -> None:
    ranks = budget("error", ratio=ratio, pivoted=pivoted).give_out(spectra())["ranks"]
    assert cost(ranks, pivoted) <= ratio * SIZE
    assert relative(ranks) == pytest.approx(min(map(relative, every(ratio * SIZE, pivoted))))


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.6])
def test_by_sensitivity_no_ranks_of_as_many_parameters_lose_less(ratio: float) -> None:
    """Of factors, that is: a weight left dense loses nothing at once."""

    def loss(ranks: dict[str, int]) -> float:
        return sum(lost(name, rank) for name, rank in ranks.items())

    ranks = budget("sensitivity", ratio=ratio).give_out(spectra())["ranks"]
    own = cost(ranks, False)
    assert ratio * SIZE - max(map(sum, SHAPES.values())) < own <= ratio * SIZE
    assert loss(ranks) == pytest.approx(min(loss(r) for r in every(own, False) if all(r.values())))
    assert ranks != budget("error", ratio=ratio).give_out(spectra())["ranks"]


def test_ranks_are_aligned() -> None:
    ranks = budget("error", multiple_of=2, ratio=0.75).give_out(spectra())["ranks"]
    assert cost(ranks, False) <= 0.75 * SIZE
    assert all(rank % 2 == 0 for rank in ranks.values())
    assert ranks != budget("error", ratio=0.75).give_out(spectra())["ranks"]


def test_what_is_given_out_are_the_shares_and_zero_is_dense() -> None:
    kind = budget("error", ratio=1.0)
    given = kind.give_out(spectra())
    assert json.loads(json.dumps(given)) == {"ranks": dict.fromkeys(SHAPES, 0)}
    state = kind.begin({"ranks": {"a": 3, "b": 0}})
    assert state.shares == {"a": 3, "b": 0}
    assert state.given == {"ranks": {"a": 3, "b": 0}}
    assert kind.next(state, ["a", "elsewhere"]) == {"a": 3}


@pytest.mark.parametrize(("allocation", "weighed"), [("error", False), ("sensitivity", True)])
def test_a_look_tells_the_loss_of_every_component(allocation: str, weighed: bool) -> None:
    """The eigenvalues of W H W^T, every output counted as often as the model's loss feels it."""
    weight, statistics = weights(6, 8, seed=1), statistics_of(inputs(8, 60, seed=2))
    sensitivity = torch.tensor([4.0, 0.0, 1.0, 0.25, 9.0, 1.0], dtype=torch.float64)
    told = budget(allocation).look(Sight(weight, statistics, sensitivity))
    counts = sensitivity.clamp_min(1e-4 * float(sensitivity.mean())).sqrt() if weighed else torch.ones(6)
    hessian = statistics.require_hessian()
    damped = hessian + 0.01 * torch.diag(hessian.diagonal())
    counted = counts.double()[:, None] * weight
    expected = torch.linalg.eigvalsh(counted @ damped @ counted.T).flip(0)
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=1e-9)


def test_without_gradients_outputs_count_all_the_same() -> None:
    sight = Sight(weights(6, 8, seed=1), statistics_of(inputs(8, 60, seed=2)))
    torch.testing.assert_close(budget("sensitivity").look(sight), budget("error").look(sight))


@pytest.mark.parametrize("allocation", ["error", "sensitivity"])
def test_a_model_keeps_to_its_share(
    allocation: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    step = {"targets": "linears", "method": "svd_llm", "allocation": allocation, "ratio": 0.6}
    lmpress.compress(tiny("llama"), recipe({"svd": step}), tmp_path / "out", calibration=str(text_file))
    forms = list(plan_of(tmp_path / "out").values())
    total = sum(form.shape[0] * form.shape[1] for form in forms)
    kept = sum(
        form.left.shape[1] * sum(form.shape) if isinstance(form, LowRank) else form.shape[0] * form.shape[1]
        for form in forms
    )
    assert 0.55 * total < kept <= 0.6 * total
    assert len({form.left.shape[1] for form in forms if isinstance(form, LowRank)}) > 1
