"""Parameters that modules share: the whole keeps what it was told to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.errors import RequestError
from lmpress.forms import Form, Sparse
from lmpress.methods.sparsity_allocation import QUANTILES, removal_costs, removal_curve
from lmpress.recipes import parse_recipe
from lmpress.recipes.steps import SparseLowRank, Sparsify
from lmpress.survey.budgets import Pool, Sight
from lmpress.survey.budgets.density import Density
from tests.methods.data import inputs, statistics_of, weights
from tests.survey.budgets.made import leaves, recipe


@pytest.mark.parametrize(
    "step",
    [
        {"sparsify": {"sparsity": 0.6, "allocation": "sensitivity"}},
        {"sparsify": {"method": "alps", "sparsity": 0.6, "allocation": "sensitivity"}},
        {"sparse_low_rank": {"sparsity": 0.6, "allocation": "sensitivity", "iterations": 10}},
    ],
    ids=["sparsegpt", "alps", "sslc"],
)
def test_sparsity_is_shared_and_met(
    step: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    result = lmpress.compress(tiny("llama"), recipe(step), tmp_path / "out", calibration=str(text_file))
    kept, total, shares = 0.0, 0, []
    for name, form in plan_of(tmp_path / "out").items():
        weights = math.prod(form.shape)
        own = sum(_parameters(leaf) for leaf in leaves(form))
        kept, total = kept + own, total + weights
        shares.append(own / weights)
        assert "density" in result.manifest["modules"][name]["steps"][0]
    assert kept / total == pytest.approx(0.4, abs=0.02)  # ranks are whole numbers
    assert max(shares) - min(shares) > 0.05


def _parameters(leaf: Form) -> int:
    return leaf.pattern.kept if isinstance(leaf, Sparse) else math.prod(leaf.shape)


def test_a_pattern_leaves_no_sparsity_to_share() -> None:
    for step in (
        {"sparsify": {"pattern": "2:4", "allocation": "sensitivity"}},
        {"sparsify": {"method": "wanda", "sparsity": 0.5, "allocation": "sensitivity"}},
        {"sparsify": {"method": "wanda", "sparsity": 0.5, "asymmetry": 0.5}},
    ):
        with pytest.raises(RequestError):
            parse_recipe(recipe(step), "r")


def test_with_a_pattern_outputs_count_all_the_same(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    def made(name: str, **step: Any) -> list[bytes]:
        how = {"pattern": "2:4", "iterations": 10} | step
        lmpress.compress(
            tiny("llama"), recipe({"sparse_low_rank": how}), tmp_path / name, calibration=str(text_file)
        )
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("model-*.safetensors"))]

    plain, shared = made("plain"), made("shared", allocation="sensitivity")
    assert [len(data) for data in plain] == [len(data) for data in shared]
    assert plain != shared


SHAPES = {"a": (12, 16), "b": (8, 16)}
SHARED = Sparsify(sparsity=0.6, allocation="sensitivity", damping=0.02)
PAIRS = SparseLowRank(pattern="2:4", allocation="sensitivity")


def test_a_look_tells_what_removal_costs() -> None:
    weight, known = weights(12, 16, seed=1).float(), statistics_of(inputs(16, 80, seed=2), torch.float32)
    counts = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.1
    told = Density(Pool(SHARED, "step 1", SHAPES)).look(Sight(weight, known, counts))
    assert told == removal_curve(weight, removal_costs(known, 0.02), counts)
    assert len(told) == QUANTILES
    assert Density(Pool(SHARED, "step 1", SHAPES)).look(Sight(weight, known)) == []
    assert Density(Pool(PAIRS, "step 1", SHAPES)).look(Sight(weight, known, counts)) == []


def test_shares_of_all_that_there_is_to_keep() -> None:
    """Entries of one module are missed more, so it keeps more; together they keep what was asked."""
    budget = Density(Pool(SHARED, "step 1", SHAPES))
    told = {"b": [k / 32 for k in range(QUANTILES)], "a": [k / 32 + 1 for k in range(QUANTILES)], "c": []}
    given = budget.give_out(told)
    assert given == {"curves": {"a": told["a"], "b": told["b"]}}
    state = budget.begin(given)
    assert state.given == given
    assert list(state.shares) == ["a", "b"]
    assert state.shares["a"] > 0.4 > state.shares["b"]
    assert 192 * state.shares["a"] + 128 * state.shares["b"] == pytest.approx(0.4 * 320, rel=1e-3)


def test_of_a_pattern_nothing_is_given_out() -> None:
    given = {"curves": {"a": [], "b": []}}
    state = Density(Pool(PAIRS, "step 1", SHAPES)).begin(given)
    assert (state.given, state.shares) == (given, {})


def test_recipes_that_remove_alike_share_a_survey() -> None:
    def decides(**options: Any) -> Any:
        step = Sparsify(**{"sparsity": 0.5, "allocation": "sensitivity"} | options)
        return Density(Pool(step, "step 1", SHAPES)).decides

    assert decides() == decides(sparsity=0.6)
    assert decides() != decides(damping=0.5)
    assert decides() != Density(Pool(PAIRS, "step 1", SHAPES)).decides
