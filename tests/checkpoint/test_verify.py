"""A damaged checkpoint is an error in one line, and never a weight."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import lmpress
from lmpress.api import inspect, write_card
from lmpress.errors import LmpressError, RequestError
from lmpress.source import open_source

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


@pytest.mark.parametrize("value", ["2", None, [1], True])
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
            "up_proj': unknown form 'magic'",
        ),
        (lambda q: q["plan"]["model.layers.0.mlp.up_proj"].update(bits=4), "up_proj.weight is I8 of shape"),
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


def test_a_weight_that_no_plan_names_is_missed(copy: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    tensors = load_file(copy / SHARD)
    del tensors[name]
    save_file(tensors, copy / SHARD, metadata={"format": "pt"})
    forge(copy)
    for read in (lmpress.load, inspect):
        with pytest.raises(RequestError, match=f"lacks the tensor {name} of a causal language model"):
            read(copy)


def test_a_model_without_its_head_gets_no_random_one(
    compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    AutoModel.from_pretrained(compressed("llama-untied")).save_pretrained(tmp_path / "bare")
    with pytest.raises(RequestError, match=r"lacks the tensor lm_head\.weight"):
        lmpress.load(tmp_path / "bare")
    AutoModel.from_pretrained(tmp_path / "bare")


def test_transformers_gets_no_plan_of_another_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 255}))
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(RequestError, match=r"embed_tokens as .* and the config asks for \(255, 64\)"):
            kind.from_pretrained(copy)


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


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("sizes", "bytes_16bit"), 0, "sizes.bytes_16bit"),
        (("sizes", "linear_bpw"), float("nan"), "sizes.linear_bpw"),
        (("calibration", 0, "name"), None, "calibration.0.name"),
        (("files", SHARD, "bytes"), "12", "bytes"),
        (("modules", "model.embed_tokens", "steps"), [3], "steps.0"),
        (("modules", "model.embed_tokens", "relative_weight_error"), "much", "relative_weight_error"),
        (("recipe", "name"), 3, "recipe.name"),
    ],
)
def test_a_manifest_whose_parts_are_others(
    copy: Path, keys: tuple[str | int, ...], value: object, words: str
) -> None:
    manifest = json.loads((copy / "lmpress.json").read_text())
    part = manifest
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (copy / "lmpress.json").write_text(json.dumps(manifest))
    for read in (lmpress.load, inspect, lambda path: write_card(path, {})):
        with pytest.raises(RequestError, match=words):
            read(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, and there are"),
        ("num_hidden_layers", -1, "num_hidden_layers"),
        ("hidden_size", 10**12, "hidden_size is 1000000000000, and the weights take"),
        ("head_dim", 10**12, "head_dim"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("num_attention_heads", 5, "transformers makes no model"),
        ("hidden_size", "64", "transformers makes no model"),
        ("model_type", ["llama"], "names no model_type"),
        ("vocab_size", 255, "asks for"),
    ],
)
def test_a_config_of_another_model(
    copy: Path, tiny: Callable[[str], Path], tmp_path: Path, key: str, value: object, words: str
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    for read in (lmpress.load, inspect):
        with pytest.raises(RequestError, match=words):
            read(copy)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("hidden_size", 10**12)])
def test_a_dense_model_larger_than_its_files(
    tiny: Callable[[str], Path], tmp_path: Path, key: str, value: int
) -> None:
    target = tmp_path / "dense"
    shutil.copytree(tiny("llama"), target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {key: value}))
    for read in (lmpress.load, open_source):
        with pytest.raises(RequestError, match=key):
            read(target)


def test_a_tensor_of_another_type(copy: Path) -> None:
    """Its bytes, its shape and its hash are right; it is not what the plan says."""
    data = (copy / SHARD).read_bytes()
    damaged = data.replace(b'"I8"', b'"U8"')
    assert damaged != data
    (copy / SHARD).write_bytes(damaged)
    forge(copy)
    with pytest.raises(RequestError, match=r"is U8 of shape .* and its plan says I8"):
        lmpress.load(copy)


def forge(checkpoint: Path) -> None:
    """Let the manifest call healthy what is there."""
    manifest = json.loads((checkpoint / "lmpress.json").read_text())
    told = hashlib.sha256((checkpoint / SHARD).read_bytes()).hexdigest()
    manifest["files"][SHARD] = {"bytes": (checkpoint / SHARD).stat().st_size, "sha256": told}
    (checkpoint / "lmpress.json").write_text(json.dumps(manifest))


def test_a_bitmap_that_keeps_too_many(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    recipe = {
        "calibration": {"samples": 2, "seq_len": 16},
        "steps": [{"sparsify": {"targets": "mlp", "sparsity": 0.5, "method": "magnitude"}}],
    }
    target = tmp_path / "sparse"
    lmpress.compress(tiny("llama"), recipe, target, calibration=str(text_file))
    tensors = load_file(target / SHARD)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name].fill_(255)
    save_file(tensors, target / SHARD, metadata={"format": "pt"})
    forge(target)
    with pytest.raises(LmpressError, match=rf"{name.removesuffix('.weight')}: a bitmap keeps 6144 entries"):
        lmpress.load(target)


def test_a_calibration_text_that_was_changed(copy: Path, other_text: Path) -> None:
    data = bytearray((copy / "calibration.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "calibration.safetensors").write_bytes(data)
    with pytest.raises(RequestError, match=r"calibration\.safetensors is not what was written"):
        lmpress.evaluate(copy, text=str(other_text), window=32, max_tokens=64)
    (copy / "calibration.safetensors").write_bytes(data[:-9])
    with pytest.raises(RequestError, match=r"calibration\.safetensors is truncated"):
        lmpress.evaluate(copy, text=str(other_text), window=32, max_tokens=64)
