"""What every budget does: what cannot be met is told, with the least that can."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.errors import RequestError
from lmpress.recipes.steps import Svd
from lmpress.survey.budgets import BUDGETS, Pool, Sight, State
from lmpress.survey.budgets.base import upwards
from tests.methods.data import inputs, statistics_of
from tests.survey.budgets.made import recipe


@pytest.mark.parametrize(
    "step",
    [
        {"quantize": {"bits": 2.0, "allocation": "mixed", "granularity": "group:32"}},
        {"entropy_quantize": {"bits": 0.1}},
    ],
)
def test_a_budget_that_cannot_be_met_names_the_least_that_can(
    step: dict[str, dict[str, Any]],
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RequestError, match=r"cannot be met.* which is the least") as caught:
        lmpress.compress(tiny("llama"), recipe(step), tmp_path / "out", calibration=str(text_file))
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capfd.readouterr().err
    (least,) = re.findall(r"(\d+\.\d+), which is the least", str(caught.value))
    ((kind, options),) = step.items()
    made = recipe({kind: options | {"bits": float(least)}})
    lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))


@pytest.mark.parametrize(
    ("bits", "told"),
    [(2.0, "2.000"), (2.0001, "2.001"), (0.0101, "0.011"), (3.9995, "4.000"), (17.25, "17.250")],
)
def test_the_least_is_rounded_up_and_no_further(bits: float, told: str) -> None:
    assert upwards(bits) == told


def test_states_go_in_and_come_out() -> None:
    state = State({"ranks": {"a": 3}}, {"a": 3.0})
    later = state.then({"bits": 5}).then(None).then({"bits": 7})
    assert state.past == ()
    assert later.past == ({"bits": 5}, {"bits": 7})
    assert (later.given, later.shares) == (state.given, state.shares)
    statistics = statistics_of(inputs(4, 10, seed=0))
    for value in (state, Sight(torch.ones(2, 4), statistics), Pool(Svd(ratio=0.5), "step 1", {})):
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)


def test_what_a_budget_does_unless_it_says_otherwise() -> None:
    """Ranks are given out once, and nobody has to hear what became of them."""
    pool = Pool(Svd(ratio=0.5), "step 1", {"a": (4, 6), "b": (3, 5)})
    assert pool.weights == 4 * 6 + 3 * 5
    budget = BUDGETS["ranks"](pool)
    state = State({"ranks": {"a": 3}}, {"a": 3.0})
    assert budget.decides is None
    assert budget.hessian
    assert budget.gradients
    assert budget.next(state, ["b", "a"]) == {"a": 3.0}
    assert budget.took(state, {}, {}) is None
    assert budget.settled(state, {})
    assert budget.facts(state) == {}
    with pytest.raises(NotImplementedError):
        budget._weigh(statistics_of(inputs(4, 10, seed=0)))


def test_columns_are_weighed_once_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[Any] = []

    def weigh(statistics: Any) -> torch.Tensor:
        weighed.append(statistics)
        return statistics.mean + len(weighed)

    budget = BUDGETS["ranks"](Pool(Svd(ratio=0.5), "step 1", {}))
    monkeypatch.setattr(budget, "_weigh", weigh)
    one, other = statistics_of(inputs(4, 10, seed=0)), statistics_of(inputs(4, 10, seed=1))
    first = budget._columns(one)
    assert torch.equal(first, one.mean + 1)
    assert budget._columns(one) is first
    assert torch.equal(budget._columns(other), other.mean + 2)
    assert torch.equal(budget._columns(one), one.mean + 3)
    assert len(weighed) == 3
