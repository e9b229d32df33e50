"""The rotation of the residual stream as a step: it comes first, once, and in front of any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.errors import RequestError
from tests.recipes.steps.data import refused

TURNS = ("llama", "llama-untied", "llama-bias", "mistral", "qwen2", "qwen3", "phi3")
ROTATED: dict[str, Any] = {
    "name": "rotated",
    "calibration": {"samples": 4, "seq_len": 32},
    "dtype": "float32",
    "steps": [{"rotate": {}}, {"quantize": {"bits": 8}}],
}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"quantize": {}}, {"rotate": {}}], ["rotate turns the dense model: it comes first"]),
        ([{"awq": {}}, {"rotate": {}}], ["it comes first"]),
        ([{"quantize": {"targets": "embeddings"}}, {"rotate": {}}], ["it comes first"]),
        ([{"rotate": {}}, {"rotate": {}}], ["the residual stream is turned once in a recipe"]),
    ],
)
def test_what_it_cannot_follow(steps: list[dict[str, Any]], words: list[str]) -> None:
    refused(steps, words)


@pytest.mark.parametrize("name", TURNS)
def test_eight_bits_behind_it_are_nearly_the_dense_model(
    name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    result = lmpress.compress(tiny(name), ROTATED, tmp_path / "out", calibration=str(text_file))
    loaded = result.load(dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense(ids).logits
        assert float((loaded(ids).logits - expected).norm() / expected.norm()) < 0.03
    assert not loaded.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "opt", "opt-post-norm"])
def test_models_that_do_not_turn_are_refused(
    name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        lmpress.compress(tiny(name), ROTATED, tmp_path / "out", calibration=str(text_file))
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert message.startswith(f"recipe rotated: step 1 (rotate) cannot be applied to {tiny(name)}: ")
