"""GPTQ and entropy coding of embeddings and heads, in the metric that the survey gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.families import layout_of
from lmpress.source import load_dense, open_source
from lmpress.survey.tables import HEAD, LOOKED_UP, TOKENS, multiplier, table_metric
from tests.tiny import TINY, tiny_model

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


def told(width: int = 4, looked_up: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, width, generator=generator)
    return {
        TOKENS: torch.rand(8, generator=generator),
        HEAD: x.T @ x / 20,
        LOOKED_UP: torch.rand(looked_up, generator=generator) + 0.5,
    }


@pytest.mark.parametrize(
    ("family", "table", "seen", "looked_up"),
    [
        ("llama", "model.embed_tokens", 1.0, 1.0),  # one table is both
        ("llama-untied", "model.embed_tokens", 0.0, 1.0),
        ("llama-untied", "lm_head", 1.0, 0.0),
    ],
)
def test_what_errors_in_a_table_cost(family: str, table: str, seen: float, looked_up: float) -> None:
    sensitivity, layout = told(), layout_of(TINY[family]())
    before = {name: tensor.clone() for name, tensor in sensitivity.items()}
    metric = table_metric(table, layout, sensitivity, tokens=20)
    assert metric is not None
    expected = seen * sensitivity[HEAD] + looked_up * torch.diag(sensitivity[LOOKED_UP])
    torch.testing.assert_close(metric.statistics.require_hessian(), expected)
    assert torch.equal(metric.statistics.second_moment, expected.diagonal())
    assert torch.equal(metric.statistics.mean, torch.zeros(4))
    assert metric.statistics.count == 20
    assert torch.equal(metric.probability, sensitivity[TOKENS])
    assert all(torch.equal(tensor, before[name]) for name, tensor in sensitivity.items())
    with pytest.raises(FrozenInstanceError):
        metric.probability = metric.probability  # type: ignore[misc]
    moved = metric.to(torch.device("meta"))
    assert moved.probability.is_meta
    assert moved.statistics.require_hessian().is_meta


def test_rows_that_are_projected_first_count_alike() -> None:
    """Their gradients have another width than what the head sees."""
    layout = layout_of(TINY["llama-untied"]())
    metric = table_metric("model.embed_tokens", layout, told(looked_up=2), tokens=20)
    assert metric is not None
    assert torch.equal(metric.statistics.require_hessian(), torch.eye(4))


def test_where_nobody_looked_nothing_is_told() -> None:
    assert table_metric("lm_head", layout_of(TINY["llama-untied"]()), {}, tokens=20) is None


@pytest.mark.parametrize(("family", "expected"), [("llama", 1.0), ("gemma2", 8.0)])
def test_gemma_multiplies_what_it_looks_up(family: str, expected: float) -> None:
    assert multiplier(tiny_model(family), layout_of(TINY[family]())) == expected
