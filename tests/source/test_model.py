"""Models that cannot be compressed are refused in one line that says why; others are read exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.errors import RequestError
from lmpress.source import open_source
from tests.tiny import TINY, save_tiny


@pytest.fixture
def copy(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(tiny("llama-untied"), target)
    return target


@pytest.mark.parametrize("family", list(TINY))
def test_tensors_are_those_that_transformers_loads(family: str, tiny: Callable[[str], Path]) -> None:
    source = open_source(tiny(family))
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    state = model.state_dict()
    for name, tensor in source.read(source.names).items():
        assert torch.equal(tensor, state[name]), name


def test_shards_are_read(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    path = save_tiny("llama-untied", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    whole, parts = open_source(tiny("llama-untied")), open_source(path)
    for name in whole.names:
        assert torch.equal(whole.read([name])[name], parts.read([name])[name])


def test_a_directory_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="has no weights"):
        lmpress.compress(copy, "int8", copy.parent / "out")


def test_pickled_weights_are_not_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError, match="pickled"):
        lmpress.compress(copy, "int8", copy.parent / "out")


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no config\.json"):
        lmpress.compress(tmp_path, "int8", tmp_path / "out")


def test_an_unsupported_family_says_which_are_supported(copy: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"gpt2.*llama.*opt"):
        lmpress.compress(copy, "int8", copy.parent / "out")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_weight_that_is_not_finite_is_named(copy: Path, value: float, kind: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight.*{kind}"):
        lmpress.compress(copy, "int8", copy.parent / "out")


def test_a_missing_weight_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight"):
        lmpress.compress(copy, "int8", copy.parent / "out")


def test_a_wrong_shape_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(RequestError, match="config asks for"):
        lmpress.compress(copy, "int8", copy.parent / "out")


def test_a_truncated_source(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(RequestError, match="truncated"):
        lmpress.compress(copy, "int8", copy.parent / "out")


def test_a_compressed_checkpoint_is_not_compressed_again(
    compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="already quantized"):
        lmpress.compress(compressed("llama"), "int8", tmp_path / "out")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no model"):
        lmpress.compress(tmp_path / "nowhere", "int8", tmp_path / "out")


def test_too_little_text(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    recipe = {"calibration": {"samples": 8, "seq_len": 32}, "steps": [{"svd": {"ratio": 0.5}}]}
    with pytest.raises(RequestError, match="token"):
        lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(tmp_path / "short.txt"))


def test_windows_beyond_the_context(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    recipe = {"calibration": {"samples": 2, "seq_len": 512}, "steps": [{"svd": {"ratio": 0.5}}]}
    with pytest.raises(RequestError, match="context of 256"):
        lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
