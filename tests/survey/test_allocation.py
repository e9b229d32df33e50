"""Several budgets beside one another: shares by step and module, and where each stands behind some blocks."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch

from lmpress.forms import Dense, Form
from lmpress.methods.entropy_quantization import EntropyOptions, RateCurve, entropy_quantize
from lmpress.recipes import EntropyQuantize, PruneNeurons, Quantize
from lmpress.statistics import InputStatistics
from lmpress.survey import Allocation
from lmpress.survey.budgets.base import Pool
from lmpress.survey.budgets.bits import Bits
from lmpress.survey.budgets.rate import Rate
from lmpress.survey.budgets.widths import Widths

SHAPE = (32, 64)
NAMES = [f"{block}.{linear}" for block in (0, 1, 2) for linear in ("q", "down")]


def curve(middle: float) -> RateCurve:
    logs = [middle + k / 2 for k in range(-22, 8)]
    bits = [math.prod(SHAPE) * math.log2(1 + 2.0 ** (middle - log) * 4) for log in logs]
    return RateCurve(math.prod(SHAPE), 640.0, tuple(logs), tuple(bits))


CURVES = {name: curve(place % 3 - 6.0) for place, name in enumerate(NAMES)}
WIDTHS = {"widths": {f"{block}.down": 32 for block in (0, 1, 2)}, "mean_activation": [1.0, 1.0, 1.0]}


@pytest.fixture
def allocation() -> Allocation:
    """Bits for the `q` of step 1, a rate for all modules of step 2; the widths of step 0 come later."""
    mixed = Pool(Quantize(bits=4.5, allocation="mixed"), "step 2", {n: SHAPE for n in NAMES if "q" in n})
    coded = Pool(EntropyQuantize(bits=4.0), "step 3", dict.fromkeys(NAMES, SHAPE))
    given = {
        "1": {"bits": {name: 3 + place for place, name in enumerate(mixed.shapes)}, "exact": True},
        "2": {"curves": {name: asdict(c) for name, c in CURVES.items()}},
    }
    return Allocation.begun({1: Bits(mixed), 2: Rate(coded)}, given, {}, tokens=7)


def coded(name: str, step: float) -> Form:
    generator = torch.Generator().manual_seed(NAMES.index(name))
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    x = torch.randn(200, SHAPE[1], generator=generator)
    statistics = InputStatistics(200, x.mean(0), x.square().mean(0), None, x.T @ x / 200)
    return entropy_quantize(weight, statistics, step, EntropyOptions()).form


def test_a_module_may_draw_on_two_budgets(allocation: Allocation) -> None:
    shares = allocation.next(["0.q", "0.down"])
    assert set(shares) == {(1, "0.q"), (2, "0.q"), (2, "0.down")}
    assert shares[1, "0.q"] == 3
    assert shares[2, "0.q"] == shares[2, "0.down"]
    assert allocation.next(["elsewhere"]) == {}


def test_what_blocks_took_is_heard_by_the_budget_that_it_was_taken_of(allocation: Allocation) -> None:
    """The journal's entries, in any number, leave it where it stood when they were written."""
    entries: list[dict[str, object]] = []
    for block in range(2):
        names = [f"{block}.q", f"{block}.down"]
        before = allocation.after(entries)
        shares = before.next(names)
        forms = {name: coded(name, shares[2, name]) for name in names}
        took = before.took(forms, shares)
        assert set(took) == {"2"}  # whole bits are what they are
        assert took["2"]["modules"] == names
        assert took["2"]["bits"] == 8 * sum(form.num_bytes for form in forms.values())
        assert took["2"]["weights"] == 2 * math.prod(SHAPE)
        expected = sum(CURVES[name].total_bits(shares[2, name]) for name in names)
        assert took["2"]["predicted"] == pytest.approx(expected)
        entries.append({"block": block, "rates": json.loads(json.dumps(took))})
    behind = allocation.after(entries)
    assert behind.states[1] == allocation.states[1]
    assert behind.states[2].past == tuple(entry["rates"]["2"] for entry in entries)  # type: ignore[index]
    assert behind.next(["2.q"])[2, "2.q"] != allocation.next(["2.q"])[2, "2.q"]
    assert behind.after([]).states == allocation.states
    assert behind.after([{"block": 0}]).states == allocation.states  # a block that took nothing


def test_a_block_is_settled_where_all_its_budgets_are(allocation: Allocation) -> None:
    record = {"modules": ["0.q"], "weights": 1000, "predicted": 4000.0}
    assert allocation.settled({})
    assert allocation.settled({"2": record | {"bits": 4050.0}})
    assert not allocation.settled({"2": record | {"bits": 4500.0}})
    assert not allocation.settled({"1": {}, "2": record | {"bits": 3500.0}})


def test_what_is_told_of_each(allocation: Allocation) -> None:
    step = PruneNeurons(allocation="activation", max_ratio=0.5)
    widths = Widths(Pool(step, "step 1", {name: SHAPE for name in NAMES if "down" in name}))
    whole = allocation.with_budget(0, widths, WIDTHS)
    assert whole.next(["1.q", "1.down"])[0, "1.down"] == 32
    assert whole.took({"0.down": Dense(torch.ones(SHAPE))}, {(0, "0.down"): 32.0, (2, "0.down"): 0.01}) == {
        "2": {"modules": ["0.down"], "bits": 0, "weights": 0, "predicted": 0.0}
    }
    assert set(whole.facts(gradients=True)) == {1, 2}
    assert whole.facts(gradients=True)[1] == {"exact": True}
    assert whole.facts(gradients=False) == {0: WIDTHS | {"widths": [32, 32, 32]}}
    assert set(allocation.budgets) == {1, 2}  # values, both of them
    with pytest.raises(FrozenInstanceError):
        allocation.tokens = 8  # type: ignore[misc]
