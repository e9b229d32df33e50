"""Coded bits: real sizes meet their target, whatever the curves foretold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.errors import LmpressError
from lmpress.forms import Dense, EntropyCoded
from lmpress.methods.entropy_quantization import RateCurve
from lmpress.recipes import EntropyQuantize
from lmpress.survey.budgets.base import Pool, Record, State
from lmpress.survey.budgets.rate import Rate
from tests.survey.budgets.made import leaves, recipe


def coded_rate(directory: Path) -> float:
    """Bits a weight of all that the files hold for the coded linears of the blocks."""
    forms = {name: form for name, form in plan_of(directory).items() if ".layers." in f".{name}"}
    sizes = {
        key: tensor.numel() * tensor.element_size()
        for file in directory.glob("model-*.safetensors")
        for key, tensor in load_file(file).items()
    }
    own = [
        size for key, size in sizes.items() if key.rpartition(".")[0] in forms and not key.endswith(".bias")
    ]
    weights = 0
    for form in forms.values():
        for leaf in leaves(form):
            assert isinstance(leaf, EntropyCoded)
            weights += math.prod(leaf.shape)
    return 8 * sum(own) / weights


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_coded_bits_meet_the_target(
    bits: float, family: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    made = recipe({"entropy_quantize": {"bits": bits}}, {"entropy_quantize": {"targets": "embeddings"}})
    result = lmpress.compress(tiny(family), made, tmp_path / "out", calibration=str(text_file))
    told = result.manifest["allocation"]["step 1"]["bits_per_weight"]
    assert coded_rate(tmp_path / "out") == pytest.approx(told, abs=1e-6)
    assert told == pytest.approx(bits, abs=0.05)
    assert result.manifest["sizes"]["linear_bpw"] == pytest.approx(told, abs=1e-5)


@pytest.mark.parametrize(
    "before",
    [
        {"svd": {"ratio": 0.7, "targets": "linears"}},
        {"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 8}},
    ],
)
def test_so_they_do_behind_other_steps(
    before: dict[str, Any], tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """What factors and narrower weights take is not what the curves of the dense weights foretell."""
    made = recipe(before, {"entropy_quantize": {"bits": 4}})
    lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
    assert coded_rate(tmp_path / "out") == pytest.approx(4.0, abs=0.06)


def test_a_glob_that_reaches_the_embedding(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    made = recipe({"entropy_quantize": {"targets": "*", "bits": 4}})
    result = lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
    table = result.manifest["modules"]["model.embed_tokens"]
    assert 3.97 <= table["steps"][0]["bits_per_weight"] <= 4.0
    assert coded_rate(tmp_path / "out") == pytest.approx(4.0, abs=0.05)


def curve(weights: int, middle: float) -> RateCurve:
    """A bit an octave down to zero, with a bend: what a Gaussian weight of size 2^middle takes."""
    logs = [middle + k / 2 for k in range(-22, 8)]
    bits = [weights * math.log2(1 + 2.0 ** (middle - log) * 4) for log in logs]
    return RateCurve(weights, 16.0 * 40, tuple(logs), tuple(bits))


Truth = Callable[[RateCurve, float], float]


TRUTHS: dict[str, Truth] = {
    "5 % more": lambda c, step: 1.05 * c.total_bits(step),
    "5 % less": lambda c, step: 0.95 * c.total_bits(step),
    "larger values": lambda c, step: c.total_bits(step / 1.3),
    "much larger values": lambda c, step: c.total_bits(step / 4),
}


def begun(curves: Mapping[str, RateCurve], target: float) -> tuple[Rate, State]:
    """A budget and where it stands before the first block."""
    pool = Pool(EntropyQuantize(bits=target), "step 1", {name: (c.weights, 1) for name, c in curves.items()})
    budget = Rate(pool)
    return budget, budget.begin({"curves": {name: asdict(c) for name, c in curves.items()}})


def next_step(budget: Rate, state: State, names: list[str], tried: Record | None = None) -> float:
    shares = budget.next(state, names, tried)
    assert list(shares) == names
    (step,) = set(shares.values())
    return step


@pytest.mark.parametrize("truth", list(TRUTHS))
@pytest.mark.parametrize("target", [2.0, 4.0])
def test_real_sizes_correct_the_step(target: float, truth: str) -> None:
    """Thirty blocks, one after the other as a run does them, whose sizes are not those of the curves."""
    blocks = {
        i: {f"{i}.{k}": curve(50_000 * (k + 1), (i * 7 + k * 3) % 5 - 2.0) for k in range(3)}
        for i in range(30)
    }
    curves = {name: c for block in blocks.values() for name, c in block.items()}
    budget, state = begun(curves, target)
    repeated = 0
    for block in blocks.values():
        tried: Record | None = None
        for attempt in range(2):
            repeated += attempt
            step = next_step(budget, state, list(block), tried)
            tried = {
                "modules": list(block),
                "bits": sum(TRUTHS[truth](c, step) for c in block.values()),
                "weights": sum(c.weights for c in block.values()),
                "predicted": sum(c.total_bits(step) for c in block.values()),
            }
            if budget.settled(state, tried):
                break
        state = state.then(tried)
    spent = sum(record["bits"] for record in state.past)
    far = truth == "much larger values"  # a coarse step, at which small modules are all zeros already
    rate = spent / sum(c.weights for c in curves.values())
    assert rate == pytest.approx(target, rel=0.004 if far else 0.002)
    assert budget.facts(state)["bits_per_weight"] == pytest.approx(rate)
    assert far or repeated <= 4


def test_weights_that_went_do_not_leave_their_budget_behind() -> None:
    """Half of every module is gone: the target is for the weights that are coded."""
    curves = {f"{i}": curve(100_000, 0.0) for i in range(10)}
    budget, state = begun(curves, 3.0)
    for name, c in curves.items():
        half = c.total_bits(next_step(budget, state, [name])) / 2
        state = state.then({"modules": [name], "bits": half, "weights": 50_000, "predicted": half})
    spent = sum(record["bits"] for record in state.past)
    assert spent / 500_000 == pytest.approx(3.0, rel=0.002)


def test_a_budget_that_is_spent_leaves_the_widest_step() -> None:
    curves = {f"{i}": curve(1000, 0.0) for i in range(2)}
    budget, state = begun(curves, 3.0)
    state = state.then({"modules": ["0"], "bits": 9000, "weights": 1000, "predicted": 3000.0})
    step = next_step(budget, state, ["1"])
    assert math.log2(step) == pytest.approx(curves["1"].log_steps[-1], abs=0.5)


def test_modules_that_do_not_draw_on_it_get_nothing() -> None:
    budget, state = begun({"0": curve(1000, 0.0)}, 3.0)
    assert budget.next(state, ["other"]) == {}
    assert budget.took(state, {"other": Dense(torch.ones(2, 2))}, {}) is None


def test_a_table_whose_bits_cannot_be_met_is_told_by_name(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    made = recipe({"entropy_quantize": {"targets": "embeddings", "bits": 0.01}})
    with pytest.raises(LmpressError, match=r"model\.embed_tokens: 0\.010 bits a weight cannot be met"):
        lmpress.compress(tiny("llama"), made, tmp_path / "out")
