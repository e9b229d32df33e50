"""Faults that damaged files have found, each with the least input that shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from lmpress.errors import RequestError
from lmpress.source import open_source
from tests.tiny import tiny_model
from tests.tiny_gguf import write_gguf


def test_a_vocabulary_that_no_tensor_has(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    target = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 10**30}))
    _refused(target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_type": [1], "rope_theta": 1e4}),
        ("attention_dropout", ["much"] * 1000),
        ("architectures", 3),
        ("architectures", {"a": 1}),
        ("model_type", "no such type"),
        ("hidden_act", [1]),
        ("pad_token_id", 10**9),
        ("rms_norm_eps", {}),
    ],
)
def test_a_value_that_the_config_has_no_use_for(
    tiny: Callable[[str], Path], tmp_path: Path, key: str, value: object
) -> None:
    target = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {key: value}))
    _refused(target)


def test_a_gguf_tensor_of_fewer_rows_than_its_heads_have(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama"), "llama", path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors["blk.0.attn_k.weight"].field.parts[3][1] -= 1
    _refused(path)


def test_a_gguf_file_of_no_key_and_value_heads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama"), "llama", path)
    field = gguf.GGUFReader(path, "r+").get_field("llama.attention.head_count_kv")
    assert field is not None
    field.parts[-1][0] = 0
    _refused(path)


def _refused(path: Path) -> None:
    with pytest.raises(RequestError) as refusal:
        _read(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 2000


def _read(path: Path) -> None:
    source = open_source(path)
    source.read(source.names)
