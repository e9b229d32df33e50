"""Directories whose tensors are more, fewer or others than their config tells of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lmpress
from lmpress.errors import RequestError
from lmpress.source import open_source
from tests.tiny import save_tiny

Q = "model.layers.0.self_attn.q_proj."
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def copy(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def directory(name: str) -> Path:
        return Path(shutil.copytree(tiny(name), tmp_path / name))

    return directory


def change(directory: Path, changed: Change) -> Path:
    tensors = load_file(directory / "model.safetensors")
    changed(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def config(directory: Path, **values: object) -> Path:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | values))
    return directory


def adding(**shapes: tuple[int, ...]) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    "added",
    [
        {Q + "bias": (64,)},
        {Q + "lora_A.weight": (4, 64), Q + "lora_B.weight": (64, 4)},
        {"base_model.model." + Q + "lora_A.weight": (4, 64)},
        {Q.removeprefix("model.") + "lora_A.weight": (4, 64)},
        {Q + "SCB": (64,)},
        {Q + "weight_scale": (1,)},
        {"model.layers.1.mlp.down_proj.qzeros": (64, 12)},
        {"model.layers.1.self_attn.q_norm.weight": (16,)},
        {"model.layers.1.self_attn.sinks": (4,)},
        {"model.layers.1.mlp.experts.0.up_proj.weight": (96, 64)},
        {"model.norm.bias": (64,)},
        {"model.embed_tokens.weight_scale": (256,)},
        {"lm_head.bias": (256,)},
    ],
)
def test_what_belongs_to_a_module_is_not_left_out(added: dict[str, tuple[int, ...]], copy: Callable) -> None:
    path = change(copy("llama"), adding(**added))
    with pytest.raises(RequestError, match="no place for") as refusal:
        open_source(path)
    assert next(iter(added)) in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_biases_that_the_config_denies(copy: Callable) -> None:
    with pytest.raises(RequestError, match=r"k_proj\.bias.*and \d+ more"):
        lmpress.compress(config(copy("llama-bias"), attention_bias=False), "int8", Path("out"))


def test_what_belongs_to_nothing_is_told(copy: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(copy("llama-untied"), num_hidden_layers=2)
    change(path, adding(**{"v_head.summary.weight": (1, 64)}))
    capsys.readouterr()  # what saving the model told
    open_source(path)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "not used" in told[0]
    assert "model.layers.2." in told[0]
    assert "and 7 more" in told[0]


FREQUENCIES = 1e4 ** -(torch.arange(8, dtype=torch.float64) / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_frequencies_of_old_checkpoints_pass_in_silence(
    scaling: dict | None, dtype: torch.dtype, copy: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    path = change(copy("llama"), lambda t: t.update({name: FREQUENCIES.to(dtype) for name in names}))
    if scaling:
        config(path, rope_parameters=scaling | {"rope_theta": 1e4})
    capsys.readouterr()
    open_source(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", [5e5 ** -(torch.arange(8) / 8), FREQUENCIES[:4], FREQUENCIES.new_ones(8)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_frequencies_of_another_model_are_refused(family: str, other: Tensor, copy: Callable) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = change(copy(family), lambda t: t.update({name: other.float()}))
    with pytest.raises(RequestError, match=rf"{name} holds other rotary frequencies.*rope_theta"):
        open_source(path)


def test_a_head_of_another_task_is_told(copy: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(copy("llama"), adding(**{"score.weight": (2, 64)}))
    capsys.readouterr()
    open_source(path)
    assert "not used: score.weight" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_head_beside_a_tied_embedding(
    family: str, copy: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "model.embed_tokens.weight" if family == "llama" else "model.decoder.embed_tokens.weight"
    path = change(copy(family), lambda t: t.update({"lm_head.weight": t[table].clone()}))
    capsys.readouterr()
    open_source(path)
    assert capsys.readouterr().err == ""
    change(path, lambda t: t["lm_head.weight"][255, 63].add_(1))
    with pytest.raises(RequestError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        open_source(path)


def test_a_tied_model_may_store_its_head_alone(copy: Callable) -> None:
    path = copy("llama")
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    change(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    name = "model.embed_tokens.weight"
    assert torch.equal(open_source(path).read([name])[name], table)


def test_an_untied_model_without_its_head(copy: Callable) -> None:
    path = change(copy("llama-untied"), lambda t: t.pop("lm_head.weight"))
    with pytest.raises(RequestError, match=r"lacks the weight lm_head\.weight"):
        open_source(path)


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.model."])
def test_other_prefixes(prefix: str, copy: Callable) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    path = change(copy("llama"), rename)
    if not prefix:  # the checkpoint of a base model
        assert "model.norm.weight" in open_source(path).names
        return
    with pytest.raises(RequestError, match=rf"lacks the weight .*it holds {prefix}"):
        open_source(path)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")],
)
@pytest.mark.parametrize("name", [Q + "weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_weight_is_a_floating_point_number(
    name: str, dtype: torch.dtype, kind: str, copy: Callable
) -> None:
    path = change(copy("llama"), lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(RequestError, match=rf"{name} is of type {kind}.*quantized already"):
        open_source(path)


def test_packed_weights_tell_what_is_there_instead(copy: Callable) -> None:
    def pack(tensors: dict[str, Tensor]) -> None:
        tensors[Q + "qweight"] = tensors.pop(Q + "weight").to(torch.int32)
        tensors[Q + "qzeros"] = torch.zeros(2, 8, dtype=torch.int32)

    path = change(copy("llama"), pack)
    with pytest.raises(RequestError, match=r"lacks the weight .*q_proj\.weight; it holds .*q_proj\.qweight"):
        open_source(path)


def test_a_shard_that_is_missing_cut_off_or_there_twice(tmp_path: Path) -> None:
    path = save_tiny("llama-untied", tmp_path / "sharded", max_shard_size="100KB")
    shard = path / "model-00002-of-00003.safetensors"
    shards = sorted(path.glob("model-*.safetensors"))
    shard, data = shards[1], shards[1].read_bytes()
    shard.unlink()
    with pytest.raises(RequestError, match=rf"{shard.name} is missing"):
        open_source(path)
    for length in (0, 5, 100, len(data) - 1):
        shard.write_bytes(data[:length])
        with pytest.raises(RequestError, match=shard.name):
            open_source(path)
    shutil.copy(shards[0], shard)
    with pytest.raises(RequestError, match="both hold"):
        open_source(path)


def test_an_index_that_names_more_than_there_is(tmp_path: Path) -> None:
    path = (
        save_tiny("llama-untied", tmp_path / "sharded", max_shard_size="100KB")
        / "model.safetensors.index.json"
    )
    index = json.loads(path.read_text())
    index["weight_map"][Q + "bias"] = index["weight_map"][Q + "weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(RequestError, match=rf"index\.json names {Q}bias, and no file of it holds that"):
        open_source(path.parent)


@pytest.mark.parametrize("size", ["100KB", "5GB"])
def test_weights_in_other_files_are_told(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_tiny("llama-untied", tmp_path / "model", max_shard_size=size)
    save_file({Q + "lora_A.weight": torch.ones(4, 64)}, path / "adapter_model.safetensors")
    capsys.readouterr()
    open_source(path)
    assert "not used: adapter_model.safetensors" in capsys.readouterr().err


def test_one_file_beside_the_shards(copy: Callable, tmp_path: Path) -> None:
    path = save_tiny("llama-untied", tmp_path / "sharded", max_shard_size="100KB")
    shutil.copy(copy("llama-untied") / "model.safetensors", path)
    with pytest.raises(RequestError, match=r"model\.safetensors and the shards of"):
        open_source(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"shape":[96,64]', '"shape":[64,64]'),
        ('"shape":[96,64]', '"shape":[96,6.]'),
        ('"F32"', '"F99"'),
        ('"dtype"', '"dtypo"'),
    ],
)
def test_a_header_that_contradicts_itself(old: str, new: str, copy: Callable, tmp_path: Path) -> None:
    path = config(copy("llama"), intermediate_size=64) if "[64,64]" in new else copy("llama")
    data = (path / "model.safetensors").read_bytes()
    assert old.encode() in data
    (path / "model.safetensors").write_bytes(data.replace(old.encode(), new.encode(), 1))
    with pytest.raises(RequestError, match=r"model"):
        lmpress.compress(path, "int8", tmp_path / "out")


def test_the_type_is_that_of_most_of_the_weights(copy: Callable) -> None:
    path = copy("llama")
    change(path, lambda t: t.update({n: x.bfloat16() for n, x in t.items() if x.dim() > 1}))
    assert open_source(path).dtype == torch.bfloat16
