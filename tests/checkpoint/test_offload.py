"""Parts of a model on disk: accelerate brings them for each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.errors import LmpressError

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
ENDS = ("model.embed_tokens", "lm_head")
REST = ("model.norm", "model.rotary_emb", "model.layers.0")
RECIPES: dict[str, list[dict[str, Any]]] = {
    "codes": [{"quantize": {"bits": 4}}, {"quantize": {"targets": "embeddings", "bits": 8}}],
    "sparse": [{"sparsify": {"sparsity": 0.5}}],
    "coded": [{"entropy_quantize": {"bits": 4}}, {"entropy_quantize": {"targets": "embeddings", "bits": 5}}],
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def placed(family: str, on_disk: str) -> dict[str, str]:
    blocks = ("model.layers.1", "model.layers.2") if family == "llama-untied" else ("model.layers.1",)
    places = {"blocks": blocks, "ends": ENDS, "most": (*ENDS, *blocks)}[on_disk]
    return {name: "disk" if name in places else "cpu" for name in (*ENDS, *REST, *blocks)}


@pytest.fixture(scope="module")
def checkpoint(
    tiny: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("offload")

    def directory(family: str, recipe: str) -> Path:
        path = root / f"{family}-{recipe}"
        if not path.is_dir():
            steps = {"calibration": {"samples": 4, "seq_len": 32}, "steps": RECIPES[recipe]}
            lmpress.compress(tiny(family), steps, path, calibration=str(text_file))
        return path

    return directory


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("on_disk", ["blocks", "ends", "most"])
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_parts_on_disk_change_no_number(
    family: str,
    recipe: str,
    on_disk: str,
    buffers: bool,
    checkpoint: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    path = checkpoint(family, recipe)
    expected = logits(lmpress.load(path, dtype=torch.float32))
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        device_map=placed(family, on_disk),
        offload_folder=tmp_path / "parts",
        offload_buffers=buffers,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_the_memory_that_there_is_decides(
    family: str, checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = checkpoint(family, "codes")
    model = lmpress.load(
        path,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": "40KB"},
        offload_folder=tmp_path / "parts",
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), logits(lmpress.load(path, dtype=torch.float32)))


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_it_is_saved_from_where_it_lies_and_not_made_dense_there(
    family: str, checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = checkpoint(family, "codes")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map=placed(family, "most"), offload_folder=tmp_path / "parts"
    )
    model.save_pretrained(tmp_path / "again")
    again = lmpress.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(lmpress.load(path, dtype=torch.float32)))
    with pytest.raises(LmpressError, match="offloaded"):
        model.dequantize()
