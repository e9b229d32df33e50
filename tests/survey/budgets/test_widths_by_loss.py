"""What the neurons of all blocks are weighed by when they share one removal, by brute force."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.methods.neuron_pruning import removal_curve
from lmpress.statistics import InputStatistics, StatisticsAccumulator

RECIPE: dict[str, Any] = {
    "name": "widths",
    "calibration": {"samples": 16, "seq_len": 32, "precision": "float32"},
    "dtype": "float32",
    "steps": [{"prune_neurons": {"allocation": "loss", "ratio": 0.25, "multiple_of": 8}}],
}


def looked_at(model: Any, windows: Tensor) -> tuple[list[InputStatistics], list[float]]:
    """Of every block: the moments in front of its down projection, and the energy of its hidden states."""
    inputs = [StatisticsAccumulator(layer.mlp.down_proj.in_features, True) for layer in model.model.layers]
    energies = [0.0] * len(inputs)
    for i, layer in enumerate(model.model.layers):

        def gather(module: nn.Module, args: tuple[Any, ...], i: int = i) -> None:
            inputs[i].update(args[0])

        def measure(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
            states = output[0] if isinstance(output, tuple) else output
            energies[i] = float(states.double().square().sum(-1).mean())

        layer.mlp.down_proj.register_forward_pre_hook(gather)
        layer.register_forward_hook(measure)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    return [accumulator.result() for accumulator in inputs], energies


@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_losses_count_by_the_energy_of_the_stream_that_they_reach(
    loud: float, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama-untied"), dtype=torch.float32)
    with (
        torch.no_grad()
    ):  # a loud MLP in the last block: its losses are large, and so is the stream behind it
        model.model.layers[-1].mlp.down_proj.weight.mul_(loud)
    model.save_pretrained(tmp_path / "model")
    for file in tiny("llama-untied").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    done = lmpress.compress(tmp_path / "model", RECIPE, tmp_path / "out", calibration=str(text_file))
    windows = load_file(tmp_path / "out" / "calibration.safetensors")["input_ids"].long()
    chosen = done.manifest["survey"]["widths"]
    statistics, energies = looked_at(model.eval(), windows[:16])
    widths = list(range(96, 0, -8))
    losses = []
    for layer, known, energy in zip(model.model.layers, statistics, energies, strict=True):
        curve = removal_curve(layer.mlp.down_proj.weight.data, known, widths)
        losses.append({width: loss / energy for width, loss in zip(widths, curve, strict=True)})
    told = done.manifest["survey"]["relative_loss"]
    expected = [curve[width] for curve, width in zip(losses, chosen, strict=True)]
    assert told == pytest.approx(expected, rel=0.02, abs=1e-6)
    allowed = [choice for choice in product(widths, repeat=3) if 3 * 96 - sum(choice) >= round(0.25 * 3 * 96)]
    best = min(sum(c[w] for c, w in zip(losses, choice, strict=True)) for choice in allowed)
    assert sum(expected) == pytest.approx(best, rel=0.02)
    stored = [layer.mlp.down_proj.in_features for layer in done.load().model.layers]
    assert stored == chosen
