"""What the tests of steps share: one weight, its inputs, a step at work on it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.errors import RequestError
from lmpress.forms import Dense, Form
from lmpress.recipes import LeafContext, parse_recipe
from lmpress.statistics import InputStatistics
from lmpress.statistics.inputs import StatisticsAccumulator

GENERATOR = torch.Generator().manual_seed(7)
WEIGHT = torch.randn(24, 32, generator=GENERATOR)
MIXED = torch.eye(32) + 0.2 * torch.randn(32, 32, generator=GENERATOR)
INPUTS = torch.randn(400, 32, generator=GENERATOR) @ MIXED * torch.linspace(0.1, 2.0, 32)
CONTEXT = LeafContext(seed=3, weight=WEIGHT)


def statistics() -> InputStatistics:
    accumulator = StatisticsAccumulator(32, hessian=True)
    accumulator.update(INPUTS)
    return accumulator.result()


def strayed(form: Form, weight: torch.Tensor = WEIGHT) -> float:
    """The relative squared error of the outputs, by running them."""
    return float(((form.dense() - weight) @ INPUTS.T).square().sum() / (weight @ INPUTS.T).square().sum())


def after(step: Any, form: Form | None = None) -> Form:
    made: Form = step.rewrite(Dense(WEIGHT) if form is None else form, statistics(), CONTEXT).form
    return made


def refused(steps: list[dict[str, Any]], words: list[str]) -> None:
    """These steps cannot follow one another, which is said in one line, with these words."""
    with pytest.raises(RequestError) as caught:
        parse_recipe({"steps": steps}, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"r.yaml: step {len(steps)} ")
    for word in words:
        assert word in message
