"""A method that fails says where, in one line, whichever pass it fails in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.errors import LmpressError, RequestError
from lmpress.source import failing_at
from tests.tiny import tiny_model, tiny_tokenizer

GPTQ = {"quantize": {"bits": 4, "solver": "gptq"}}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with finite weights whose block 1 computes infinities."""
    directory = tmp_path_factory.mktemp("overflowing")
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data *= 1e38
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("steps", "place"),
    [
        ([GPTQ], "model.layers.1.down: "),
        ([{"awq": {}}, GPTQ], "model.layers.1.down: "),
        ([{"prune_neurons": {}}], "model.layers.1: "),
        ([{"entropy_quantize": {}}], "model.layers.1: "),
    ],
    ids=["gathered", "ahead", "forwards", "backwards"],
)
def test_activations_that_overflow_are_told_with_their_place(
    steps: list[dict[str, Any]], place: str, overflowing: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = {"calibration": {"samples": 8, "seq_len": 32, "precision": "float32"}, "steps": steps}
    with pytest.raises(LmpressError, match=f"^{place}the activations are not finite") as caught:
        lmpress.compress(overflowing, recipe, tmp_path / "out", calibration=str(text_file))
    assert "\n" not in str(caught.value)


def test_factorizations_and_requests() -> None:
    with pytest.raises(LmpressError, match=r"^there: linalg"), failing_at("there"):
        torch.linalg.cholesky(-torch.eye(2))
    with pytest.raises(RequestError, match=r"^as it is$"), failing_at("there"):
        raise RequestError("as it is")
