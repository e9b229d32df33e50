"""The fingerprint of a model follows what it is, not where it lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from lmpress.source import open_source
from lmpress.source.accounting import Stored
from lmpress.source.fingerprint import PIECE, PIECES, WHOLE, places
from lmpress.source.fingerprint import fingerprint as sampled
from tests.tiny import save_tiny, tiny_model
from tests.tiny_gguf import write_gguf

MIDDLE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama-untied"), tmp_path / "model"))


def fingerprint(path: Path) -> str:
    return open_source(path).fingerprint


def test_a_directory_that_was_moved_is_the_same_model(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    model.rename(tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == before


def test_shards_are_the_same_model_as_one_file(model: Path, tmp_path: Path) -> None:
    sharded = save_tiny("llama-untied", tmp_path / "sharded", max_shard_size="100KB")
    assert fingerprint(sharded) == fingerprint(model)


@pytest.mark.parametrize("row", [0, 50, 95])
def test_one_value_of_a_middle_layer(row: int, model: Path) -> None:
    before = fingerprint(model)
    tensors = load_file(model / "model.safetensors")
    tensors[MIDDLE][row, 7] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(model) != before


def test_config_and_tokenizer_count(model: Path) -> None:
    seen = {fingerprint(model)}
    for name, old, new in (
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ("tokenizer.json", '"ByteLevel"', '"ByteLevel" '),
    ):
        text = (model / name).read_text()
        assert old in text
        (model / name).write_text(text.replace(old, new, 1))
        seen.add(fingerprint(model))
    assert len(seen) == 3


def test_a_gguf_file(tmp_path: Path) -> None:
    tiny = tiny_model("llama-untied")
    first = write_gguf(tiny, "llama", tmp_path / "first.gguf")
    before = fingerprint(first)
    moved = first.rename(tmp_path / "moved.gguf")
    assert fingerprint(moved) == before
    with torch.no_grad():
        tiny.get_parameter(MIDDLE)[50, 7] += 1
    assert fingerprint(write_gguf(tiny, "llama", tmp_path / "other.gguf")) != before
    other = write_gguf(tiny_model("llama-untied"), "llama", tmp_path / "keys.gguf", {"general.name": "else"})
    assert fingerprint(other) != before


@pytest.mark.parametrize("length", [0, 1, WHOLE, WHOLE + 1, 10**7 + 3, 2**33])
def test_places_reach_from_the_start_to_the_end(length: int) -> None:
    found = places(length)
    assert found[0][0] == 0
    assert sum(found[-1]) == length
    assert all(low >= 0 and low + count <= length for low, count in found)
    assert sum(count for _, count in found) <= max(WHOLE, PIECE * PIECES)
    gaps = [b[0] - a[0] for a, b in pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_large_tensor_is_looked_at_from_start_to_end(tmp_path: Path) -> None:
    """One that a fingerprint does not read whole: what touches every value is seen, at any of its places."""
    path = tmp_path / "large.bin"
    values = torch.arange(100_000, dtype=torch.float32)
    stored = Stored("w", path, "F32", True, (100_000,), 0, values.nbytes)

    def of(changed: torch.Tensor) -> str:
        path.write_bytes(changed.numpy().tobytes())
        return sampled(LlamaConfig(), {"w": stored}, ())

    before = of(values)
    for part in (slice(0, 2000), slice(49_000, 51_000), slice(98_000, 100_000), slice(None)):
        changed = values.clone()
        changed[part] *= 1.001
        assert of(changed) != before
