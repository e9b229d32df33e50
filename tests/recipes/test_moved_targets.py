"""The target of a whole expression: its parts with what asymmetric calibration moved in its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmpress.forms import Dense, Form, LowRank, Pivoted, Sum
from lmpress.recipes import LeafContext, Pivot, Quantize, Svd
from lmpress.statistics import InputStatistics, StatisticsAccumulator

GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(24, 32, generator=GENERATOR)
INPUTS = torch.randn(500, 32, generator=GENERATOR) @ torch.randn(32, 32, generator=GENERATOR) / 4
CROSS = (0.5 * INPUTS.roll(1, 1)).T @ INPUTS / len(INPUTS)
CONTEXT = LeafContext(weight=WEIGHT, cross=CROSS)
STEP = Quantize(bits=4, solver="gptq", asymmetry=1.0, damping=1e-6)


def statistics() -> InputStatistics:
    accumulator = StatisticsAccumulator(32, hessian=True)
    accumulator.update(INPUTS)
    return accumulator.result()


def factors() -> LowRank:
    form = Svd(ratio=0.5).rewrite(Dense(WEIGHT), statistics(), CONTEXT).form
    assert isinstance(form, LowRank)
    return form


def pivoted() -> Form:
    form = Pivot(largest_bits_lost=None).rewrite(factors(), None, CONTEXT).form
    assert isinstance(form, Pivoted)
    return form


@pytest.mark.parametrize(
    "form",
    [Dense(WEIGHT), factors(), pivoted(), Sum((factors(), Dense(0.1 * WEIGHT)))],
    ids=["dense", "factors", "pivoted", "sum"],
)
def test_every_expression_tells_where_it_was_moved(form: Form) -> None:
    hessian = INPUTS.double().T @ INPUTS.double() / len(INPUTS)
    move = form.dense(torch.float64) @ CROSS.double() @ torch.linalg.inv(hessian)
    target = STEP.rewrite(form, statistics(), CONTEXT).target
    assert target is not None
    assert float((target - form.dense() - move).norm()) < 2e-2 * float(move.norm())
    assert STEP.rewrite(form, statistics(), replace(CONTEXT, cross=None)).target is None
