"""What decides the widths is measured behind the steps that come before the pruning."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmpress
from lmpress.families import layout_of
from lmpress.methods.neuron_pruning import removal_curve
from lmpress.recipes.steps import PruneNeurons
from lmpress.survey.budgets import Pool, Sight
from lmpress.survey.budgets import widths as module
from lmpress.survey.budgets.widths import MOST, POINTS, Widths
from tests.methods.data import inputs, statistics_of, weights
from tests.tiny import TINY


def test_activations_are_those_behind_the_svd(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    svd = {"svd": {"targets": "attention", "keep_variance": 0.5, "whiten": False}}
    prune = {"prune_neurons": {"allocation": "activation", "max_ratio": 0.3, "importance": "activation"}}
    size = {"samples": 8, "seq_len": 32}
    found = {}
    for name, steps in {"alone": [prune], "behind": [svd, prune]}.items():
        recipe = {"name": name, "calibration": size, "dtype": "float32", "steps": steps}
        out = tmp_path / name
        lmpress.compress(tiny("llama"), recipe, out, calibration=str(text_file))
        found[name] = json.loads((out / "lmpress.json").read_text())["survey"]["mean_activation"]
    windows = load_file(tmp_path / "alone" / "calibration.safetensors")["input_ids"].long()
    factored = {"name": "svd", "calibration": size, "dtype": "float32", "steps": [svd]}
    lmpress.compress(tiny("llama"), factored, tmp_path / "svd", calibration=str(text_file))
    expected = _mean_activations(lmpress.load(tmp_path / "svd"), windows)
    assert found["behind"] == pytest.approx(expected, rel=1e-4)
    assert found["alone"] != pytest.approx(expected, rel=1e-2)


def _mean_activations(model: Any, windows: torch.Tensor) -> list[float]:
    means: list[float] = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(
            lambda module, args, output: means.append(float(output.abs().mean()))
        )
    with torch.no_grad():
        model(windows)
    return means


@pytest.mark.parametrize(("samples", "told"), [(2, True), (8, False)])
def test_too_few_tokens_for_a_hessian_are_told(
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    samples: int,
    told: bool,
) -> None:
    """2 x 32 tokens are fewer than the 96 inputs of the down projection, 8 x 32 are not."""
    size = {"samples": samples, "seq_len": 32}
    recipe = {"name": "few", "calibration": size, "steps": [{"quantize": {"bits": 4, "solver": "gptq"}}]}
    lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
    message = " ".join(capsys.readouterr().err.split())
    assert ("Calibration has 64 tokens, and some Hessians have 96 inputs" in message) is told


SHAPES = {"a": (8, 32), "b": (8, 48)}


def budget(**options: Any) -> Widths:
    return Widths(Pool(PruneNeurons(**options), "step 1", SHAPES))


@pytest.mark.parametrize(
    ("width", "unit", "ratio", "expected"),
    [
        (96, 8, 0.1, [96, 88, 80, 72, 64, 56]),  # down to four times the share: 57.6, aligned
        (98, 8, 0.1, [98, 96, 88, 80, 72, 64, 56]),
        (96, 32, 0.25, [96, 64, 32]),  # 9.6 of them are left: no fewer than one unit
        (100, 10, 0.95, [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]),
        (16, 32, 0.1, [16]),  # narrower than a unit: nothing goes
        (40, 8, 0.0, [40]),
    ],
)
def test_widths_to_choose_from(
    width: int, unit: int, ratio: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "removal_curve", lambda weight, inputs, widths, has_bias: list(widths))
    own = budget(allocation="loss", ratio=ratio, multiple_of=unit)
    curve, _ = own.look(Sight(torch.ones(2, width), statistics_of(inputs(2, 4, seed=0))))
    assert list(curve) == expected


@pytest.mark.parametrize(("width", "unit", "ratio"), [(1000, 4, 0.2), (4096, 64, 0.05), (1536, 1, 0.1)])
def test_many_widths_are_chosen_among_a_few(
    width: int, unit: int, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "removal_curve", lambda weight, inputs, widths, has_bias: list(widths))
    own = budget(allocation="loss", ratio=ratio, multiple_of=unit)
    found = list(own.look(Sight(torch.ones(2, width), statistics_of(inputs(2, 4, seed=0))))[0])
    assert found == sorted(set(found), reverse=True)
    assert all(size % unit == 0 for size in found)
    assert found[0] == width
    assert found[-1] == int(width * (1 - MOST * ratio)) // unit * unit
    steps = [a - b for a, b in itertools.pairwise(found)]
    aligned = (found[0] - found[-1]) // unit
    assert len(found) <= POINTS + 2
    assert max(steps) == unit * -(-aligned // POINTS)
    assert sum(step != max(steps) for step in steps) <= 2  # to the first aligned width, and to the last


@pytest.mark.parametrize(("energy", "biased"), [(4.0, False), (0.5, True)])
def test_a_look_tells_the_loss_of_every_width_and_what_it_counts(energy: float, biased: bool) -> None:
    weight, known = weights(8, 32, seed=1), statistics_of(inputs(32, 90, seed=2))
    own = budget(allocation="loss", ratio=0.1, multiple_of=4)
    curve, counts = own.look(Sight(weight, known, energy=energy, has_bias=biased))
    expected = removal_curve(weight, known, list(curve), has_bias=biased)
    assert list(curve.values()) == pytest.approx(expected)
    assert counts == pytest.approx(1 / energy)
    assert own.look(Sight(weight, known, energy=0.0))[1] == pytest.approx(1e30)


def test_by_loss_the_removals_that_cost_least() -> None:
    own = budget(allocation="loss", ratio=0.2, multiple_of=8)
    told = {
        "b": ({48: 0.0, 40: 1.0, 32: 2.5, 24: 9.0}, 2.0),
        "a": ({32: 0.0, 24: 2.0, 16: 5.0}, 0.5),
    }
    given = own.give_out(told)  # 16 of 80 go: both units of a for 2.5, one of each for 3, two of b for 5
    assert given == {"widths": {"a": 16, "b": 48}, "relative_loss": [2.5, 0.0]}
    state = own.begin(given)
    assert state.shares == {"a": 16, "b": 48}
    assert own.facts(state) == {"widths": [16, 48], "relative_loss": [2.5, 0.0]}
    assert own.hessian
    assert own.signal(layout_of(TINY["llama"]()).block(0)) is None


def test_by_activation_the_quiet_lose_more() -> None:
    own = budget(allocation="activation", min_ratio=0.0, max_ratio=0.5, multiple_of=4)
    magnitude = torch.tensor([1.0, 2.0, 6.0])
    assert own.look(Sight(torch.ones(2, 3), statistics_of(inputs(3, 9, seed=0)), activation=magnitude)) == 3.0
    given = own.give_out({"b": 1.0, "a": 5.0})
    assert given == {"widths": {"a": 32, "b": 24}, "mean_activation": [5.0, 1.0]}
    assert not own.hessian
    block = layout_of(TINY["llama"]()).block(0)
    assert own.signal(block) == block.neurons.signal
