"""GPTQ and entropy coding of embeddings and heads, in the metric that the survey gathers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.source import load_dense, open_source

SIZE = {"samples": 8, "seq_len": 32, "precision": "float32"}


def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(windows).logits.float()
    return found


def divergence(model: Path, step: dict[str, Any], out: Path, text: Path) -> tuple[float, int]:
    """KL to the dense model on the beginning of the text, and the bytes of the weights."""
    recipe = {"name": "table", "calibration": SIZE, "steps": [step]}
    done = lmpress.compress(model, recipe, out, calibration=str(text))
    windows = torch.tensor(list(text.read_bytes()[:1024])).view(16, 64)  # a token is a byte
    dense = logits(load_dense(open_source(model), torch.float32), windows).log_softmax(-1)
    own = logits(lmpress.load(out, dtype=torch.float32), windows).log_softmax(-1)
    kl = float((dense.exp() * (dense - own)).sum(-1).mean())
    return kl, int(done.manifest["sizes"]["weight_bytes"])


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2", "opt", "opt-post-norm"])
def test_a_coded_table_in_its_metric_beats_a_flat_one(
    family: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The same bits for codes, put where the hidden states and the gradients ask for them.

    A scale a row takes 16 / 64 bits a weight of so narrow a table; the flat grid, which has one scale, does
    without them.
    """
    found = {}
    for name, (weight, bits) in {"flat": (0.0, 4.75), "metric": (0.5, 5.0)}.items():
        step = {"entropy_quantize": {"targets": "embeddings", "bits": bits, "token_weight": weight}}
        found[name] = divergence(tiny(family), step, tmp_path / name, text_file)[0]
    assert found["metric"] < found["flat"]


def test_gptq_of_a_head_beats_rounding(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    found = {}
    for solver in ("round", "gptq"):
        step = {"quantize": {"targets": "lm_head", "bits": 3, "solver": solver}}
        found[solver] = divergence(tiny("llama-untied"), step, tmp_path / solver, text_file)
    assert found["gptq"][1] == found["round"][1]
    assert found["gptq"][0] < 0.8 * found["round"][0]
