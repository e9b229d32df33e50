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
from lmpress.errors import LmpressError, RequestError
from lmpress.forms import Dense, EntropyCoded, LowRank
from lmpress.methods.entropy_quantization import RateCurve
from lmpress.recipes import EntropyQuantize
from lmpress.survey.budgets.base import Pool, Record, State
from lmpress.survey.budgets.rate import SLACK, Rate
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


def rate(curves: list[RateCurve], step: float) -> float:
    """Bits a weight at a step."""
    return sum(c.total_bits(step) for c in curves) / sum(c.weights for c in curves)


def test_the_first_step_is_that_of_the_curves() -> None:
    curves = {"0": curve(1000, 0.0), "1": curve(3000, -1.5), "2": curve(500, 1.0)}
    budget, state = begun(curves, 3.0)
    step = next_step(budget, state, ["0", "1"])
    assert rate(list(curves.values()), step) == pytest.approx(3.0 - SLACK, rel=1e-4)


@pytest.mark.parametrize(("blocks", "trusted"), [(1, 1 / 3), (2, 1 / 1.5), (4, 1 / 1.125)])
def test_what_is_left_is_for_what_is_to_come(blocks: int, trusted: float) -> None:
    """Surplus bits of the blocks that are done are expected of the others too, the more the more tell it."""
    curves = {f"{i}": curve(1000, i / 4) for i in range(6)}
    budget, state = begun(curves, 3.0)
    for i in range(blocks):
        state = state.then({"modules": [f"{i}"], "bits": 3100.0, "weights": 1000, "predicted": 3040.0})
    step = next_step(budget, state, [f"{blocks}"])
    left = 6 - blocks
    wanted = ((3.0 - SLACK) * 6 - 3.1 * blocks) / left - 0.06 * trusted
    assert rate(list(curves.values())[blocks:], step) == pytest.approx(wanted, rel=1e-4)


def test_a_block_that_is_done_again_is_believed() -> None:
    curves = {f"{i}": curve(1000, i / 4) for i in range(4)}
    budget, state = begun(curves, 3.0)
    tried = {"modules": ["0"], "bits": 3300.0, "weights": 1000, "predicted": 3000.0}
    step = next_step(budget, state, ["0"], tried)
    assert rate(list(curves.values()), step) == pytest.approx(3.0 - SLACK - 0.3, rel=1e-4)
    first = next_step(budget, state, ["0"])
    assert rate(list(curves.values()), first) == pytest.approx(3.0 - SLACK, rel=1e-4)


@pytest.mark.parametrize(
    ("bits", "settled"), [(3085.0, True), (2920.0, True), (3110.0, False), (2900.0, False)]
)
def test_a_surprise_is_three_per_cent(bits: float, settled: bool) -> None:
    budget, state = begun({f"{i}": curve(1000, 0.0) for i in range(3)}, 3.0)
    record = {"modules": ["0"], "bits": bits, "weights": 1000, "predicted": 3000.0}
    assert budget.settled(state, record) is settled
    other = {"modules": ["1"], "bits": 3600.0, "weights": 1000, "predicted": 3000.0}
    behind = state.then(other)  # 0.6 bits too many, a third of them to be expected again
    again = record | {"modules": ["2"], "bits": bits + 200.0}
    assert budget.settled(behind, again) is (abs(bits - 3000.0) <= 0.03 * (bits + 200.0))


def test_what_was_taken_is_what_the_coder_made() -> None:
    def coded(rows: int, columns: int) -> EntropyCoded:
        codes = torch.randint(-3, 4, (rows, columns), generator=torch.Generator().manual_seed(rows))
        return EntropyCoded.from_codes(codes, torch.ones(rows, 1), torch.ones(1, columns))

    curves = {"whole": curve(24 * 16, 0.0), "factored": curve(24 * 16, -1.0), "later": curve(100, 0.0)}
    budget, state = begun(curves, 3.0)
    left, right, whole = coded(24, 4), coded(4, 16), coded(24, 16)
    forms = {"whole": whole, "factored": LowRank(left, right), "other": coded(8, 8)}
    record = budget.took(state, forms, {"whole": 0.5, "factored": 0.25, "other": 1.0})
    assert record is not None
    assert record["modules"] == ["whole", "factored"]
    assert record["bits"] == 8 * (whole.num_bytes + left.num_bytes + right.num_bytes)
    assert record["weights"] == 24 * 16 + 24 * 4 + 4 * 16
    share = (24 * 4 + 4 * 16) / (24 * 16)
    expected = curves["whole"].total_bits(0.5) + curves["factored"].total_bits(0.25) * share
    assert record["predicted"] == pytest.approx(expected)
    assert budget.facts(state) == {}
    assert budget.facts(state.then(record)) == {
        "bits_per_weight": record["bits"] / record["weights"],
        "predicted": record["predicted"] / record["weights"],
    }


def test_what_all_modules_take_at_least() -> None:
    curves = {"0": curve(1000, 0.0), "1": curve(3000, -1.5)}
    last = max(c.log_steps[-1] for c in curves.values())
    least = 1.001 * rate(list(curves.values()), 2.0**last) + SLACK
    begun(curves, least + 1e-6)
    with pytest.raises(RequestError, match="which is the least") as caught:
        begun(curves, least - 1e-6)
    assert f"take {math.ceil(least * 1000) / 1000:.3f}" in str(caught.value)


def test_recipes_of_other_bits_ask_the_same() -> None:
    pool = {"a": (8, 8)}
    told = [Rate(Pool(EntropyQuantize(bits=bits), "step 1", pool)).decides for bits in (3.0, 4.0)]
    assert told[0] == told[1]
    assert told[0] != Rate(Pool(EntropyQuantize(bits=3.0, damping=0.5), "step 1", pool)).decides


def test_nothing_is_left_behind_the_last_block() -> None:
    budget, state = begun({"0": curve(1000, 0.0)}, 3.0)
    behind = state.then({"modules": ["0"], "bits": 3000, "weights": 1000, "predicted": 3000.0})
    assert budget.next(behind, ["0"]) == {"0": 1.0}


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
