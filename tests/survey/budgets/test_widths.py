"""What decides the widths is measured behind the steps that come before the pruning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmpress


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
