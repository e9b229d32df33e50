"""A damaged checkpoint is an error in one line, and never a weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.errors import LmpressError, RequestError

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def copy(compressed: Callable[[str], Path], tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(compressed("llama"), target)
    return target


def test_a_healthy_one_loads(copy: Path) -> None:
    assert lmpress.load(copy).config.model_type == "llama"


def test_truncated(copy: Path) -> None:
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[:-100])
    with pytest.raises(RequestError, match="truncated"):
        lmpress.load(copy)


def test_a_flipped_bit(copy: Path) -> None:
    data = bytearray((copy / SHARD).read_bytes())
    data[-5] ^= 1
    (copy / SHARD).write_bytes(data)
    with pytest.raises(RequestError, match="sha256"):
        lmpress.load(copy)


def test_a_header_that_lies(copy: Path) -> None:
    (copy / SHARD).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(RequestError, match="header"):
        lmpress.load(copy)


def test_a_missing_shard(copy: Path) -> None:
    (copy / SHARD).unlink()
    with pytest.raises(RequestError, match="missing"):
        lmpress.load(copy)


def test_a_path_that_leaves_the_directory(copy: Path) -> None:
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../elsewhere.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="outside"):
        lmpress.load(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("form", "magic", "unknown form"),
        ("shape", [64, 63], "shape"),
        ("bits", 77, "bits"),
        ("scale_dtype", "int8", "floating-point"),
    ],
)
def test_a_plan_that_was_tampered_with(copy: Path, key: str, value: object, words: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    plan = config["quantization_config"]["plan"]
    plan["model.layers.0.mlp.up_proj"][key] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=words):
        lmpress.load(copy)


def test_a_manifest_that_is_broken(copy: Path) -> None:
    (copy / "lmpress.json").write_text("{")
    with pytest.raises(RequestError, match="broken"):
        lmpress.load(copy)


def test_without_a_manifest_no_hashes_are_compared_and_the_rest_is(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "lmpress.json").unlink()
    lmpress.load(copy)
    assert "no hashes are compared" in capsys.readouterr().err
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[:-100])
    with pytest.raises(RequestError, match="truncated"):
        lmpress.load(copy)


def test_saved_again_over_itself_it_says_what_to_delete(copy: Path) -> None:
    lmpress.load(copy).save_pretrained(copy)
    with pytest.raises(RequestError, match=r"does not know model\.safetensors: .*delete lmpress\.json"):
        lmpress.load(copy)
    (copy / "lmpress.json").unlink()
    lmpress.load(copy)


@pytest.mark.parametrize("value", ["2", None, [1]])
def test_a_version_that_is_no_number(copy: Path, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="version"):
        lmpress.load(copy)


def test_a_plan_that_was_emptied(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["plan"] = {}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="does not tell what"):
        lmpress.load(copy)


@pytest.mark.parametrize(("key", "value"), [("files", [1]), ("modules", None), ("sizes", 3)])
def test_a_manifest_with_a_wrong_part(copy: Path, key: str, value: object) -> None:
    manifest = json.loads((copy / "lmpress.json").read_text())
    (copy / "lmpress.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(RequestError, match=key):
        lmpress.load(copy)


def edit_plan(copy: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((copy / "config.json").read_text())
    edit(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))


UP = {"form": "dense", "shape": [96, 64], "dtype": "float16"}


def rename(quantization: dict[str, Any]) -> None:
    quantization["plan"]["model.layers.0.mlp.upp_proj"] = quantization["plan"].pop(
        "model.layers.0.mlp.up_proj"
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename, "model.layers.0.mlp.up"),
        (lambda q: q["plan"].update({"model.layers.77.mlp.up_proj": UP}), "layers.77.mlp.up_proj.weight"),
        (
            lambda q: q["plan"]["model.layers.0.mlp.up_proj"].update(form="magic"),
            "up_proj: unknown form 'magic'",
        ),
        (lambda q: q["plan"]["model.layers.0.mlp.up_proj"].update(bits=4), "up_proj.weight has shape"),
        (lambda q: q.update(version="2"), "a format version is a number"),
        (lambda q: q.update(version=99, plan={"x": {"form": "of tomorrow"}}), "format 99"),
        (lambda q: q.update(plan=[1]), "a plan is an object"),
    ],
)
def test_transformers_gives_one_line_as_well(copy: Path, edit: Any, words: str) -> None:
    edit_plan(copy, edit)
    for load in (lmpress.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(LmpressError) as refused:
            load(copy)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)


def test_transformers_is_told_of_a_tensor_that_is_not_there(copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.scale"
    tensors = load_file(copy / SHARD)
    del tensors[name]
    save_file(tensors, copy / SHARD, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=f"lacks the tensor {name}"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no checkpoint"):
        lmpress.load(tmp_path / "nowhere")
